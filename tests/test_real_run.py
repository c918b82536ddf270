"""One real run: SmolLM2-135M, real reviews, the command a user types; small enough for every check-in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = [
    "federation.rounds=2",
    "federation.expected_cohort=20",
    "task.eval_examples=200",
    "task.monitor_examples=40",
    "codec.code_size=32",
    "codec.public_examples=48",
    "task.generate.count=50",
    "task.generate.max_new_tokens=16",
]


def fedllm(*arguments: str) -> dict:
    """The JSON that a command prints; nothing else may be on its standard output."""
    command = [sys.executable, "-m", "fedllm", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("real") / "run"
    return folder, fedllm("train", "configs/quickstart.yaml", *SMALL, f"output_dir={folder}")


def test_the_run_is_private_and_within_its_target(finished):
    _, results = finished
    epsilon = results["epsilon"]
    assert epsilon["private"] and epsilon["release"]["kind"] == "bound"
    assert 0 < epsilon["release"]["epsilon"] <= 8 < epsilon["server"]["epsilon"]
    assert results["rounds"] == 2 and results["parameters"] == 460_800
    assert results["uplink_bytes_per_client_round"] <= 2 * 32 + 384
    assert results["update_bytes"] == 4 * 460_800


def test_evaluate_and_report_find_the_same_again(finished):
    folder, results = finished
    again = fedllm("evaluate", str(folder))
    assert again["accuracy"] == pytest.approx(results["accuracy"], abs=0.011)
    assert again["loss"] == pytest.approx(results["loss"], rel=2e-2)
    report = fedllm("privacy", "report", str(folder))["runs"][0]
    assert report["release"]["epsilon"] == pytest.approx(results["epsilon"]["release"]["epsilon"], rel=1e-9)


def test_the_adapter_loads_in_plain_peft_and_is_trained(finished):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedllm.models import resolve

    folder, _ = finished
    base, tokenizer = (auto.from_pretrained(resolve("smollm2-135m")) for auto in (AutoModelForCausalLM, AutoTokenizer))
    words = tokenizer("Review: a joy to watch\nSentiment:", return_tensors="pt")
    with torch.inference_mode():
        before = base(**words).logits
        after = PeftModel.from_pretrained(base, folder / "adapter").eval()(**words).logits
    assert (after - before).abs().max() > 1e-3
