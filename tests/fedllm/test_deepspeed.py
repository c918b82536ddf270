"""The DeepSpeed engine on two ranks: the same numbers as the torch engine's in one process, from any ZeRO stage. One launch does it all."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fedllm.deepspeed_ranks import CASES, STAGES

pytest.importorskip("deepspeed")

ROWS = 1e-5  # beside the largest number: sums in another order, float32
PATH = 1e-4  # after three steps


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What rank 0 of two found, by case."""
    folder = tmp_path_factory.mktemp("deepspeed")
    launcher = Path(sys.executable).with_name("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, launcher, "--num_gpus", "2", "--master_port", port, "tests/fedllm/deepspeed_ranks.py", folder]
    alone = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": os.pathsep.join([str(launcher.parent), os.environ["PATH"]])}
    ended = subprocess.run([str(part) for part in command], env=os.environ | alone, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_any_stage_gives_the_torch_engines_numbers(found, case):
    one = found[case]
    assert one["start"] == 0 and one["rows"] < ROWS and one["path"] < PATH
    assert one["evaluation"] < ROWS and one.get("probabilities", 0) < ROWS


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_works_and_what_is_saved(found, case):
    one = found[case]
    assert one["after path"] == 0 and one["loaded"] == 0 and one["evaluation after"] < ROWS
    assert one["saved names"] and one["saved"] == 0 and one["saved zero"] == []


@pytest.mark.parametrize("case", CASES)
def test_a_unit_without_examples_has_the_zero_update(found, case):
    assert found[case]["empty unit"] == 0 and found[case]["nothing"] == 0


@pytest.mark.parametrize("stage", [name for name in STAGES if "offload" not in name])
def test_rows_are_deepspeeds_own_gradient(found, stage):
    assert found[stage]["native"] < ROWS
