"""What bad input gets on the command line: one line, exit status 2, and nothing half-written."""

import shutil
from pathlib import Path

import pytest

from fedllm import cli


@pytest.fixture
def command(tiny, tmp_path, capfd):
    """command(overrides...): exit status and what the user reads."""

    def go(*overrides, config=None):
        arguments = ["train", str(config or tiny / "config.yaml"), f"output_dir={tmp_path / 'run'}", *overrides]
        status = cli.run(arguments)
        out, err = capfd.readouterr()
        assert out == ""
        return status, err

    return go


def edited(tiny, tmp_path, change) -> Path:
    path = tmp_path / "edited.csv"
    path.write_text(change((tiny / "train.csv").read_text()))
    return path


BAD_INPUT = [
    (["federation.roundz=3"], "did you mean federation.rounds?"),
    (["federation.rounds=x"], "federation.rounds"),
    (["task.source=/nowhere/train.csv"], "/nowhere/train.csv: no such file"),
    (["task.public=/nowhere/public.csv"], "/nowhere/public.csv: no such file"),
    (["task.columns.text=body"], "no column 'body'"),
    (["task.columns.label=class"], "no column 'class'"),
    (["task.columns.user=patient"], "no column 'patient'"),
    (["lora.targets=[q_proj,z_proj]"], "no linear module z_proj; it has"),
    (["lora.targets=[]"], "lora.targets"),
    (["model.name=/nowhere/model.gguf"], "no such file"),
    (["privacy.target.epsilon=0"], "privacy.target.epsilon=0"),
    (["privacy.target.delta=1"], "privacy.target.delta=1"),
    (["federation.expected_cohort=41"], "expected 1 <= expected_cohort <= 40"),
    (["codec.code_size=24", "lora.targets=[v_proj]", "lora.r=1", "lora.train=b"], "codec.code_size=24: expected at most 16"),
    (["codec.public_examples=61"], "59 texts, expected at least"),
    (["privacy.clip.mode=adaptive", "privacy.clip.bit_multiplier=0.51", "privacy.target.epsilon=0.1"], "bit"),
    (["federation.partition.kind=column"], "task.columns.user"),
    (["federation.partition.kind=dirichlet", "federation.clients=500"], "federation.clients=500"),
    (["task.eval_examples=160"], "too few to hold out"),
    (["task.words=[good,bad,ugly]"], "task.words"),
    (["task.prompt=no place"], "task.prompt"),
]


@pytest.mark.parametrize(("overrides", "says"), BAD_INPUT, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_input_is_one_line_and_leaves_nothing(overrides, says, command, tmp_path):
    status, err = command(*overrides)
    lines = [line for line in err.splitlines() if "fedllm: error:" in line]
    assert status == 2 and len(lines) == 1 and says in lines[0] and "Traceback" not in err
    assert err.splitlines()[-1] == lines[0]
    assert not (tmp_path / "run").exists()


def test_an_unknown_label_in_the_test_file(command, tiny, tmp_path):
    path = edited(tiny, tmp_path, lambda text: text.replace("negative", "meh", 1))
    status, err = command(f"task.test={path}")
    assert status == 2 and "unknown label 'meh'" in err and not (tmp_path / "run").exists()


def test_a_copy_of_the_private_file_is_not_public(command, tiny, tmp_path):
    for public in (tiny / "train.csv", shutil.copy(tiny / "train.csv", tmp_path / "copy.csv")):
        status, err = command(f"task.public={public}")
        assert status == 2 and "task.public" in err and err.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("left", ["results.json", "ledger.jsonl", "notes.txt"])
def test_a_folder_that_holds_another_run(left, command, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_text("mine")
    status, err = command()
    assert status == 2 and "already holds a run" in err and err.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == [left] and (tmp_path / "run" / left).read_text() == "mine"


def test_a_folder_that_is_a_file(command, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert command()[0] == 2 and (tmp_path / "run").read_text() == "mine"


def test_resuming_what_is_no_run(tmp_path, capfd):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        assert cli.run(["resume", str(tmp_path / folder)]) == 2
        assert capfd.readouterr().err.count("\n") == 1
