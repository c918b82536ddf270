"""scripts/quickstart.sh with a stand-in for the command: which runs are begun, continued, kept and compared."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart.sh"
STAND_IN = """#!/usr/bin/env bash
echo "$*"
case $1 in
    train) folder=${!#}; folder=${folder#output_dir=}; mkdir -p "$folder"; touch "$folder/ledger.jsonl"
           if [ -n "${KILL:-}" ]; then exit 1; fi; touch "$folder/results.json" ;;
    resume) touch "$2/results.json" ;;
esac
"""


@pytest.fixture
def quickstart(tmp_path):
    """call(options) -> exit status and the commands that were given, from another working directory."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "scripts" / "setup.sh").write_text("")
    command = tmp_path / ".venv" / "bin" / "fedllm"
    command.write_text(STAND_IN)
    command.chmod(0o755)

    def call(*options, **environment):
        done = subprocess.run(
            ["bash", str(tmp_path / "scripts" / "quickstart.sh"), *options],
            cwd="/",
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        lines = done.stdout.splitlines()
        assert done.returncode or lines.pop().endswith("tensorboard --logdir runs")
        return done.returncode, lines

    return call


def test_a_finished_run_stays_and_an_unfinished_one_is_continued(quickstart):
    assert quickstart() == (0, ["train configs/quickstart.yaml output_dir=runs/quickstart"])
    assert quickstart(KILL="1") == (1, ["train configs/quickstart.yaml output_dir=runs/quickstart-2"])
    assert quickstart() == (0, ["resume runs/quickstart-2"])


def test_contrast_compares_three_runs_and_uses_finished_ones_again(quickstart):
    quickstart()
    comparison = (
        "compare runs/quickstart runs/quickstart-no-privacy runs/quickstart-full-noise --out runs/quickstart-comparison"
    )
    assert quickstart("--contrast") == (
        0,
        [
            "train configs/quickstart.yaml method=fedit output_dir=runs/quickstart-no-privacy",
            "train configs/quickstart_full_noise.yaml output_dir=runs/quickstart-full-noise",
            comparison,
        ],
    )
    assert quickstart("--contrast") == (0, [comparison])


@pytest.mark.parametrize("options", [["--frob"], ["--contrast", "x"]])
def test_wrong_options(quickstart, options):
    assert quickstart(*options) == (2, [])
