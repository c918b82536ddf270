"""scripts/bench_per_example.py and bench_round.py on a tiny model: they run through, and say what they promise. No time is asserted."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from fedllm.bench.measure import Seconds, alternate, median_interval, peak_bytes, ratios

SCRIPTS = Path(__file__).parents[2] / "scripts"
RATIO = {"median", "low", "high", "coverage"}

pytestmark = pytest.mark.usefixtures("one_thread")


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_bench_per_example(capsys):
    script = load("bench_per_example")
    steps = ["plain", "ours", "opacus", "ghost"] if script.have_opacus() else ["plain", "ours"]
    assert script.main(["--quick", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in answer["rows"]] == steps and answer["held"] is None and answer["threads"] == 1
    for row in answer["rows"]:
        assert row.keys() >= {"model", "dtype", "examples", "tokens", "seconds", "step_bytes", "peak_bytes", "memory_ratio"}
        assert row["wall_ratio"].keys() == row["processor_ratio"].keys() == RATIO
    assert answer["rows"][0]["wall_ratio"]["median"] == 1
    lines = script.table(answer["rows"]).splitlines()
    assert len(lines) == 2 + len(steps) and len({line.count("|") for line in lines}) == 1


@pytest.mark.filterwarnings("ignore")
def test_all_private_steps_of_the_bench_make_the_same_gradient(tmp_path, monkeypatch):
    """What is timed is the same work: but for the noise and the clip, the plain gradient comes out of each."""
    script = load("bench_per_example")
    script.tiny_model.write_model(tmp_path / "tiny")
    monkeypatch.setattr(script, "NOISE_MULTIPLIER", 1e-9)
    steps = ["ours", "opacus", "ghost"] if script.have_opacus() else ["ours"]
    for clip in (None, 1e3):
        making = script.Steps("tiny", tmp_path, "float32")
        if clip is not None:
            making.clip = clip
        gradients = {step: torch.cat([part.flatten() for part in making.make(step)()]).float() for step in ["plain", *steps]}
        for step in steps:
            away = (gradients[step] - gradients["ours"]).norm()
            assert away <= 1e-4 * gradients["ours"].norm(), step
        away = (gradients["ours"] - gradients["plain"]).norm()
        assert (away < 1e-4 * gradients["plain"].norm()) == (clip is not None)  # half of the examples are clipped


def test_bench_round(capsys):
    script = load("bench_round")
    assert script.main(["--quick", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [row["case"] for row in answer["rows"]] == list(script.CASES) and answer["held"] is None
    assert (answer["clients"], answer["expected_cohort"], answer["examples_per_client"]) == (40, 10, 4)
    assert answer["pure"]["batch_size"] in (8, 40) and answer["pure"]["seconds"] > 0
    for row in answer["rows"]:
        assert row["seconds"] > 0 and row["first_round_seconds"] > 0
        assert row["wall_ratio"].keys() == row["processor_ratio"].keys() == RATIO
        assert row["phase_seconds"].keys() >= {"local_training", "codec", "privacy", "messages", "server", "evaluation"}
    assert len(script.table(answer).splitlines()) == 4 + len(script.CASES)


def test_the_interval_of_a_median():
    found = median_interval([float(value) for value in range(15)])  # P[4th <= median <= 12th of 15] = 0.9648, of the next pair 0.8815
    assert found == {"median": 7.0, "low": 3.0, "high": 11.0, "coverage": pytest.approx(0.96484375)}
    assert median_interval([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "coverage": 0.75}
    assert median_interval([5.0]) == {"median": 5.0, "low": 5.0, "high": 5.0, "coverage": 0.0}
    draw = random.Random(0)
    covered = [median_interval([draw.gauss(0, 1) for _ in range(15)]) for _ in range(2000)]
    assert 0.95 < sum(one["low"] <= 0 <= one["high"] for one in covered) / 2000 < 0.98


def test_steps_take_turns_and_the_order_rotates():
    order = []
    cycles = list(alternate({name: lambda name=name: order.append(name) for name in "abc"}, 3))
    assert len(cycles) == 3 and all(list(sorted(cycle)) == ["a", "b", "c"] for cycle in cycles)
    assert ["".join(order[start : start + 3]) for start in range(0, 12, 3)] == ["cab", "abc", "bca", "cab"]
    pairs = [{"x": Seconds(2.0 * k, 3.0), "y": Seconds(1.0 * k, 1.0)} for k in (1, 2, 3)]
    assert ratios(pairs, "x", "y")["wall"]["median"] == 2 and ratios(pairs, "x", "y")["processor"]["median"] == 3


def test_peak_memory_is_the_calls_own():
    above, whole = peak_bytes(lambda: bytearray(64 * 2**20).count(1))
    assert 60 * 2**20 < above < 100 * 2**20 and whole > above
