import json

import pytest

from fedllm import compare
from fedllm.errors import UserError


@pytest.fixture
def folders(fake_results, run_folder):
    return [
        run_folder("private", fake_results()),
        run_folder("plain", fake_results("fedit", None, None, 0.858, 1_843_561, ["privacy disabled"])),
        run_folder("full", fake_results("full_noise", accuracy=0.761, up=461_000)),
    ]


def test_files(folders, tmp_path):
    table = compare.compare(folders, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy.png",
        "rounds.png",
        "table.json",
        "table.md",
    ]
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == table
    assert [run["run"] for run in table["runs"]] == ["private", "plain", "full"]
    assert [run["epsilon"]["release"]["epsilon"] for run in table["runs"]] == [7.999, None, 7.999]
    for name in ("rounds.png", "accuracy.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_markdown(folders):
    lines = compare.markdown(compare.load_runs(folders)).splitlines()
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    assert cells[""] == ["private", "plain", "full"]
    assert cells["accuracy after"] == ["82.4 %", "85.8 %", "76.1 %"]
    assert cells["gain, points"] == ["+6.2", "+9.6", "-0.1"]
    assert cells["ε release"] == ["8.00", "none: no noise", "8.00"]
    assert cells["ε server"] == ["900", "none: no noise", "900"]
    assert cells["private"] == ["yes", "no: privacy disabled", "yes"]
    assert cells["bytes up"] == ["611 B", "1.84 MB", "461 kB"]
    assert cells["overhead"] == ["10.0 %"] * 3
    assert len({len(line.split("|")) for line in lines if "|" in line}) == 1
    release = "ε release: bound for one client, add-or-remove-one, δ 1e-4, pld."
    assert [line.strip() for line in lines if line.startswith("ε release:")] == [release]


def test_a_claim_stands_beside_the_truth(fake_results, run_folder, folders):
    claiming = fake_results("dp_lora:published", epsilon=34.6, why=["published: claims 8.00, true is 34.60 (release), 900 (server)"])
    said = "sigma = C sqrt(2 ln(1.25/delta))/epsilon"
    claiming["epsilon"]["claimed"] = {"epsilon": 8.0, "delta": 1e-4, "against": ["release"], "statement": said}
    text = compare.markdown(compare.load_runs([folders[0], run_folder("published", claiming)]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["ε claimed", "-", "8.00 (release)"] in rows and ["ε release", "8.00", "34.60"] in rows
    assert ["private", "yes", "no: published: claims 8.00, true is 34.60 (release), 900 (server)"] in rows
    assert "ε claimed by dp_lora:published: as published, δ 1e-4: sigma = C sqrt(2 ln(1.25/delta))/epsilon." in text
    assert "claimed" not in compare.markdown(compare.load_runs(folders[:1]))


def test_text_runs_are_compared_by_loss(fake_results, run_folder, tmp_path):
    folders = [run_folder("a", fake_results(accuracy=None)), run_folder("b", fake_results(accuracy=None, up=900))]
    compare.compare(folders, tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "accuracy" not in text and "0.410" in text


def test_names_tell_runs_apart(fake_results, run_folder):
    folders = [run_folder(f"{seed}/quickstart", fake_results()) for seed in (1, 2)]
    assert list(compare.load_runs(folders)) == ["1/quickstart", "2/quickstart"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no results.json"),
        (lambda folder: (folder / "config.yaml").write_text(""), "fedllm resume"),
        (lambda folder: (folder / "results.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "results.json").write_text("[]"), "damaged"),
    ],
)
def test_folders_without_results_are_refused(make, message, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=message):
        compare.load_runs([folder])


def test_the_same_run_twice_is_refused(folders):
    with pytest.raises(UserError, match="twice"):
        compare.load_runs([folders[0], folders[0]])


def test_out_must_be_a_folder(folders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        compare.compare(folders, tmp_path / "file")
