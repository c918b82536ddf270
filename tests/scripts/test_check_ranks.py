"""scripts/check_ranks.py and bench_ranks.py: what they make of runs; the runs themselves are those of test_ranks_runs.py."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SCRIPTS = Path(__file__).parents[2] / "scripts"


def pretend(folder: Path, adapter: torch.Tensor, ledger: str = "{}\n") -> Path:
    (folder / "adapter").mkdir(parents=True)
    save_file({"q.lora_A.weight": torch.ones(3), "q.lora_B.weight": adapter}, folder / "adapter" / "adapter_model.safetensors")
    (folder / "ledger.jsonl").write_text(ledger)
    return folder


RESULTS = {"epsilon": {"release": {"epsilon": 8.0}}, "loss": 0.5, "seconds": {"total": 3.0}}


@pytest.mark.parametrize(("off", "agree"), [(1e-6, True), (1e-4, False), (float("nan"), False)])
def test_adapters_agree_within_a_small_part_of_what_training_changed(off, agree, tmp_path):
    compared = runpy.run_path(str(SCRIPTS / "check_ranks.py"))["compared"]
    one, two = pretend(tmp_path / "one", torch.tensor([0.01, 0.0, 0.0])), pretend(tmp_path / "two", torch.tensor([0.01, off, 0.0]))
    assert compared(two, one, RESULTS, RESULTS)["adapters_agree"] is agree


def test_an_adapter_that_training_left_alone_agrees_with_nothing(tmp_path):
    compared = runpy.run_path(str(SCRIPTS / "check_ranks.py"))["compared"]
    one, two = (pretend(tmp_path / name, torch.zeros(3)) for name in ("one", "two"))
    assert not compared(two, one, RESULTS, RESULTS)["adapters_agree"]


def test_another_ledger_or_epsilon_is_seen(tmp_path):
    compared = runpy.run_path(str(SCRIPTS / "check_ranks.py"))["compared"]
    one, two = pretend(tmp_path / "one", torch.zeros(3)), pretend(tmp_path / "two", torch.zeros(3), '{"clip": 1}\n')
    found = compared(two, one, RESULTS | {"epsilon": {"release": {"epsilon": 9.0}}}, RESULTS)
    assert not found["same_ledger"] and not found["same_epsilon"]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"clip": 0.5000001}, True),
        ({"codec": "cd", "prior": "public:ef"}, True),
        ({"clip": 0.501}, False),
        ({"prior": "none"}, False),
        ({"noise_multiplier": 1.0000001}, False),
        ({"attempt": 2}, False),
    ],
)
def test_ledgers_may_differ_in_what_rounding_reaches_only(change, same, tmp_path):
    entry = {"clip": 0.5, "codec": "ab", "prior": "public:cd", "noise_multiplier": 1.0, "attempt": 1}
    for name, values in (("one", entry), ("other", entry | change)):
        (tmp_path / name).write_text(json.dumps(values) + "\n")
    assert runpy.run_path(str(SCRIPTS / "check_ranks.py"))["same_ledger"](tmp_path / "one", tmp_path / "other") is same


def test_throughput_is_compared_round_by_round(tmp_path, monkeypatch):
    script = runpy.run_path(str(SCRIPTS / "bench_ranks.py"))

    def train(config, folder, ranks, threads, overrides):
        cycle = int(folder.name.split("-")[-1])
        seconds = [10.0, 1.0 + cycle, 2.0] if ranks == 1 else [5.0, 2.0 + 2 * cycle, 4.0]
        phases = {"setup": 100.0, "evaluation": 50.0, "local_training": 8.0, "codec": 1.0, "privacy": 0.5, "messages": 0.25, "server": 0.25}
        history = [{"round": 0}, *({"seconds": taken} for taken in seconds)]
        return {"history": history, "model": "m", "expected_cohort": 10, "rounds": 3, "seconds": phases | {"total": 160.0}}

    monkeypatch.setitem(script["bench"].__globals__, "train", train)
    answer = script["bench"](tmp_path / "config.yaml", [], 2, tmp_path)
    assert answer["round_ratio"]["median"] == 2.0 and answer["first_round_ratio"]["median"] == 0.5
    assert [row["outside_model"] for row in answer["rows"]] == [0.2, 0.2]
    assert json.dumps(answer, allow_nan=False) and "2.000 (2.000 - 2.000)" in script["table"](answer)
