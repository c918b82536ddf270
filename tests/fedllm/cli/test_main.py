"""Exit status and the one line of every failure."""

import subprocess
import sys
import types

import pytest

from fedllm import cli
from fedllm.errors import RunStopped, UserError


@pytest.fixture
def run_module(monkeypatch):
    """Stands for fedllm.run, so that no test loads a model."""
    module = types.ModuleType("fedllm.run")
    monkeypatch.setitem(sys.modules, "fedllm.run", module)
    monkeypatch.setattr("fedllm.run", module, raising=False)
    return module


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path / 'run'}\n")
    return str(path)


def raising(error):
    def act(*_):
        raise error

    return act


def only_line(capsys):
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("fedllm: error: ")
    return err


def test_help_is_light():
    code = "import sys, fedllm.cli; s = fedllm.cli.run(['--help']); print(s, [m for m in {} if m in sys.modules])"
    heavy = "('torch', 'numpy', 'scipy', 'transformers', 'peft', 'matplotlib', 'omegaconf', 'dp_accounting')"
    done = subprocess.run([sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    for command in ("train", "resume", "evaluate", "compare", "privacy"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["trian"],
        ["train"],
        ["--frob"],
        ["train", "x", "--frob"],
        ["compare", "a"],
        ["privacy"],
        ["privacy", "frob"],
        ["evaluate", "a", "b"],
    ],
)
def test_wrong_use(arguments, capsys):
    assert cli.run(arguments) == 2
    assert "see fedllm --help" in only_line(capsys)


def test_no_arguments_show_the_help(capsys):
    assert cli.run([]) == 0
    assert "Usage" in capsys.readouterr().out


def test_bad_config(config, capsys):
    assert cli.run(["train", config, "federation.round=3"]) == 2
    assert "federation.rounds" in only_line(capsys)


def test_missing_config(tmp_path, capsys):
    assert cli.run(["train", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in only_line(capsys)


@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_missing_run(command, tmp_path, capsys):
    assert cli.run([command, str(tmp_path / "none")]) == 2
    assert "no such run folder" in only_line(capsys)
    assert cli.run([command, str(tmp_path)]) == 2
    assert "no config.yaml" in only_line(capsys)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("task.source=x: no such file"), 2, "task.source=x"),
        (RunStopped("round 3: the public loss is not finite"), 1, "round 3"),
        (OSError(28, "No space left on device", "runs/x"), 2, "runs/x"),
        (ValueError("two\nlines"), 1, "ValueError: two lines"),
        (KeyError("missing"), 1, "FEDLLM_DEBUG"),
    ],
)
def test_failures(error, status, text, run_module, config, capsys, monkeypatch):
    monkeypatch.delenv("FEDLLM_DEBUG", raising=False)
    run_module.train = raising(error)
    assert cli.run(["train", config]) == status
    assert text in only_line(capsys)


def test_debug_shows_where(run_module, config, monkeypatch):
    monkeypatch.setenv("FEDLLM_DEBUG", "1")
    run_module.train = raising(KeyError("missing"))
    with pytest.raises(KeyError):
        cli.run(["train", config])


@pytest.mark.parametrize("begun", [True, False])
def test_interrupt_says_how_to_go_on(begun, run_module, config, tmp_path, capsys):
    if begun:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "ledger.jsonl").write_text("")
    run_module.train = raising(KeyboardInterrupt())
    assert cli.run(["train", config]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert (f"fedllm resume {tmp_path / 'run'}" in err) == begun
