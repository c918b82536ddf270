"""The DeepSpeed engine on two ranks: the same numbers as the torch engine's in one process, from any ZeRO stage. One launch does it all."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from fedllm import run
from fedllm.config import load_config
from fedllm.federation import Federation
from tests.fedllm.deepspeed_ranks import CASES, RUNS, SETTINGS, STAGES
from tests.fedllm.runs import Killed

pytest.importorskip("deepspeed")

ROWS = 1e-5  # beside the largest number: sums in another order, float32
PATH = 1e-4  # after three steps
OFF = 1e-4  # of final adapters, beside the way that training moved B, which began at zero: A's random start is large beside that
ROUNDING = 1e-7  # of the largest number, in float32


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The run of one process, and a folder with the same run interrupted after its first round."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    results = run.train(load_config(tiny / "config.yaml", [*SETTINGS, f"output_dir={folder / 'whole'}"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federation, "stage2_round", dies_before_round(1, Federation.stage2_round))
        with pytest.raises(Killed):
            run.train(load_config(tiny / "config.yaml", [*SETTINGS, f"output_dir={folder / 'begun'}"]))
    return folder, results


def dies_before_round(number, go_on):
    def dying(self):
        if self.progress.rounds == number:
            raise Killed
        return go_on(self)

    return dying


@pytest.fixture(scope="module")
def launched(alone, tiny, tmp_path_factory):
    """The folder that two ranks filled."""
    folder = tmp_path_factory.mktemp("deepspeed")
    shutil.copytree(alone[0] / "begun", folder / "begun")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", 2, "--master_port", port]
    command += ["--hostfile", os.devnull, "tests/fedllm/deepspeed_ranks.py", folder, tiny / "config.yaml"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=600)
    assert (folder / "death.json").exists(), (ended.stdout + ended.stderr)[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(launched):
    """What rank 0 found of engines, by case."""
    return json.loads((launched / "found.json").read_text())


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


@pytest.mark.parametrize("name", [*RUNS, "begun"])
def test_a_run_is_the_same_in_one_process_on_two_ranks_and_taken_up_by_them(launched, alone, name):
    whole, results = alone[0] / "whole", json.loads((launched / name / "results.json").read_text())
    assert results["epsilon"] == alone[1]["epsilon"] and results["rounds"] == alone[1]["rounds"]
    assert results["loss"] == pytest.approx(alone[1]["loss"], rel=1e-5)
    found, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (launched / name, whole))
    assert found.keys() == expected.keys()
    moved = max(value.abs().max() for key, value in expected.items() if "lora_B" in key)
    for key, value in expected.items():
        assert value.any()
        assert (found[key] - value).abs().max() <= OFF * moved + ROUNDING * value.abs().max()


@pytest.mark.parametrize("name", [*RUNS, "begun"])
def test_the_ledger_is_the_same_but_for_fingerprints_and_rounding(launched, alone, name):
    same_ledger = runpy.run_path("scripts/check_ranks.py")["same_ledger"]
    assert same_ledger(launched / name / "ledger.jsonl", alone[0] / "whole" / "ledger.jsonl")


def test_a_rank_that_dies_amid_the_work_ends_the_run_in_one_line(launched):
    death = json.loads((launched / "death.json").read_text())
    assert death["line"].startswith("another rank ended") and "resume" in death["line"] and death["seconds"] < 60
