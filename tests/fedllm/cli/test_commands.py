"""What the commands print."""

import json
import os
import subprocess
import sys
import types

import pytest

from fedllm import cli
from fedllm.cli.results import result_rows


@pytest.fixture
def noisy_run(monkeypatch, fake_results, tmp_path):
    """Stands for fedllm.run; it and its child processes write to standard output, as libraries do."""
    module = types.ModuleType("fedllm.run")

    def train(config):
        module.seen = config
        print("chatter")
        os.write(1, b"raw chatter\n")
        subprocess.run([sys.executable, "-c", "print('child chatter')"], check=True)
        return fake_results()

    module.train = train
    module.resume = lambda run_dir, overrides: train((run_dir, overrides))
    monkeypatch.setitem(sys.modules, "fedllm.run", module)
    monkeypatch.setattr("fedllm.run", module, raising=False)
    return module


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path / 'run'}\n")
    return str(path)


def test_train_json_is_all_of_standard_output(noisy_run, config, capfd, fake_results):
    assert cli.run(["train", config, "federation.rounds=3", "--json", "seed=7"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == fake_results()
    assert err.count("chatter") == 3
    assert (noisy_run.seen.federation.rounds, noisy_run.seen.seed) == (3, 7)


def test_train_prints_the_table_the_plot_and_tensorboard(noisy_run, config, capfd, tmp_path):
    assert cli.run(["train", config]) == 0
    out, _ = capfd.readouterr()
    assert "chatter" not in out
    for text in ("76.2 %", "82.4 %", "8.00", "900", "611 B", "1.84 MB", "3,017×", "add-or-remove-one", "replace-one"):
        assert text in out
    assert f"plot: {tmp_path / 'run' / 'rounds.png'}" in out
    assert f"--logdir {tmp_path / 'run'}" in out


def test_resume(noisy_run, run_folder, capfd):
    folder = run_folder("run")
    assert cli.run(["resume", str(folder), "parallel.mode=clients", "--json"]) == 0
    assert noisy_run.seen == (folder, ["parallel.mode=clients"])
    json.loads(capfd.readouterr().out)


def table(results):
    return {row[0]: row[1:] for row in result_rows(results) if row is not None}


def test_result_table_says_why_a_run_is_not_private(fake_results):
    rows = table(fake_results("fedit", None, None, why=["privacy disabled", "fixed seed"]))
    assert rows["private"][0] == "no: privacy disabled, fixed seed"
    assert rows["ε, release adversary"] == ("none", "no noise")
    assert "private" not in table(fake_results())


def test_result_table_of_a_trusted_server(fake_results):
    assert table(fake_results(server=None))["ε, server adversary"] == ("none", "none: trusted")


def test_result_table_of_a_text_task(fake_results):
    rows = table(fake_results(accuracy=None))
    assert "accuracy after" not in rows
    assert rows["loss after"] == ("0.4100", "perplexity 1.51")


def test_result_table_without_any_round(fake_results):
    empty = {"uplink_bytes_per_client_round": None, "downlink_bytes_per_client_round": None, "compression_ratio": None}
    rows = table(fake_results() | empty | {"code_size": None, "rounds": 0})
    assert rows["bytes up"][0] == "-" and rows["compression"][0] == "-"


def test_evaluate(monkeypatch, run_folder, capfd):
    module = types.ModuleType("fedllm.evaluation")
    found = {"loss": 0.41, "accuracy": 0.8245, "loss_saved": 0.41, "accuracy_saved": 0.824, "examples": 2000}
    module.evaluate_run = lambda run_dir, phase: found
    monkeypatch.setitem(sys.modules, "fedllm.evaluation", module)
    monkeypatch.setattr("fedllm.evaluation", module, raising=False)
    folder = str(run_folder("run"))
    assert cli.run(["evaluate", folder, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == found
    assert cli.run(["evaluate", folder]) == 0
    out = capfd.readouterr().out
    assert "82.45 %" in out and "82.40 %" in out and "2,000" in out


def test_compare(fake_results, run_folder, tmp_path, capfd):
    folders = [str(run_folder("a", fake_results())), str(run_folder("b", fake_results("fedit", None, None, why=["x"])))]
    assert cli.run(["compare", *folders, "--out", str(tmp_path / "out"), "--json"]) == 0
    assert [run["run"] for run in json.loads(capfd.readouterr().out)["runs"]] == ["a", "b"]
    assert cli.run(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    out = capfd.readouterr().out
    assert "82.4 %" in out and "table.md" in out and "no: x" in out
