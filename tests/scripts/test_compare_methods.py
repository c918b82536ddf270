"""scripts/compare_methods.sh and the reproduce_*.sh: a tiny grid to its end and again; which runs the papers' scripts begin."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.config import load_config

ROOT = Path(__file__).parents[2]
PAPERS = ("dr_encoder", "cg_fedllm", "dp_lora", "dp_fedlora", "ew_tune")


@pytest.fixture
def checkout(tmp_path):
    """call(script, options...): a copy of a script, with this Python and in the place of `fedllm` what only writes down its calls."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "scripts" / "setup.sh").write_text("")
    stand_ins = {
        "python": f'PYTHONPATH={shlex.quote(str(ROOT))} OMP_NUM_THREADS=1 exec {shlex.quote(sys.executable)} "$@"',
        "fedllm": "IFS=$'\\t'; printf '%s\\n' \"$*\" >> calls",
    }
    for name, line in stand_ins.items():
        path = tmp_path / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{line}\n")
        path.chmod(0o755)

    def call(script, *options):
        return subprocess.run(
            ["bash", str(tmp_path / "scripts" / script), *options], cwd="/", env=dict(os.environ), capture_output=True, text=True
        )

    return call


def test_quick_compares_and_the_second_call_trains_nothing(checkout, tmp_path):
    done = checkout("compare_methods.sh", "--quick", "--only", "one")
    assert done.returncode == 0, done.stderr
    assert "tuning took 8 runs" in done.stderr
    out = tmp_path / "runs" / "methods-quick"
    assert all((out / "comparison" / name).stat().st_size > 0 for name in ("table.md", "table.json", "accuracy.png", "bytes.png"))
    table = json.loads((out / "comparison" / "table.json").read_text())
    rows = {row["variant"]: row for row in table["rows"]}
    assert rows["one-dr_encoder-eps3"]["seeds"] == [1, 2] and 2.9 < rows["one-dr_encoder-eps3"]["epsilon_release"] <= 3
    assert rows["one-full_noise-inf"]["accuracy"] == rows["one-fedit-inf"]["accuracy"] and rows["one-fedit-inf"]["epsilon_release"] is None
    assert rows["one-full_noise-eps3"]["difference"]["half_width"] >= 0 and rows["two-dr_encoder-eps3"]["seeds"] == []
    chosen = {entry["chosen"] for entry in table["tuned"]["choices"].values()}
    assert chosen <= {0.01, 0.03}
    ledgers = {path: path.read_bytes() for path in out.glob("*/ledger.jsonl")}
    assert len(ledgers) == 8 + 4 * 2

    again = checkout("compare_methods.sh", "--quick", "--only", "one")
    assert again.returncode == 0 and again.stdout == done.stdout
    assert ledgers == {path: path.read_bytes() for path in out.glob("*/ledger.jsonl")}
    shutil.rmtree(out / "one")
    report = checkout("compare_methods.sh", "--quick", "--report")  # from results/ and runs/, without training
    assert report.returncode == 0 and report.stdout == done.stdout


def test_wrong_options(checkout):
    for script in ("compare_methods.sh", "reproduce_dp_lora.sh"):
        done = checkout(script, "--frob")
        assert done.returncode == 2 and "unknown option --frob" in done.stderr
    done = checkout("compare_methods.sh", "--report", "--only", "nosuch")
    assert done.returncode == 2 and done.stderr.startswith("grid: --only nosuch: expected movie-reviews, dr_encoder, ")


def trained(folder):
    """Configs of the runs that a script has begun."""
    calls = [line.split("\t") for line in (folder / "calls").read_text().splitlines()]
    return [load_config(folder / call[1], call[2:]) for call in calls if call[0] == "train"]


def lay_out(tiny, tmp_path, paper):
    """The tiny model of a paper's --quick, which the script makes where it is missing."""
    shutil.copytree(tiny, tmp_path / "runs" / "reproduce" / f"{paper}-quick" / "tiny")


@pytest.mark.parametrize("paper", PAPERS)
def test_the_papers_runs_have_configs_that_hold_together(checkout, tmp_path, tiny, paper):
    if paper != "dp_lora":  # that one makes it
        lay_out(tiny, tmp_path, paper)
    done = checkout(f"reproduce_{paper}.sh", "--quick")
    assert done.returncode == 0, done.stderr
    configs = trained(tmp_path)
    folders = [config.output_dir for config in configs]
    assert len(set(folders)) == len(configs) >= 3 and all(folder.startswith(f"runs/reproduce/{paper}-quick/") for folder in folders)
    assert {paper, f"{paper}:published"} <= {config.method for config in configs}
    assert paper == "ew_tune" or "fedit" in {config.method for config in configs}
    epsilon = {"dp_lora": 2, "dp_fedlora": 25}.get(paper, 8)
    assert {config.privacy.target.epsilon for config in configs} == {epsilon}
    assert done.stdout.strip().endswith("no finished run yet")
    assert not list((tmp_path / "runs").rglob("table.md"))


def test_the_runs_of_ew_tune_differ_in_nothing_but_the_noise(checkout, tmp_path, tiny):
    lay_out(tiny, tmp_path, "ew_tune")
    assert checkout("reproduce_ew_tune.sh", "--quick").returncode == 0
    edgeworth, prv, rdp = (
        dataclasses.asdict(config) | {"output_dir": None, "method": config.method.partition(":")[0]} for config in trained(tmp_path)[:3]
    )
    assert [config["privacy"].pop("calibration") for config in (edgeworth, prv, rdp)] == ["edgeworth_1", "exact", "rdp_classic"]
    assert edgeworth == prv == rdp and prv["privacy"]["target"]["epsilon"] == 8


def what(config):
    """What tells the paper's models, tasks and settings apart."""
    target = config.privacy.target
    return config.model.name, config.task.source, target.epsilon, target.delta, config.federation.clients, config.federation.rounds


@pytest.mark.parametrize(
    ("paper", "names"),
    [
        ("dr_encoder", ("llama-7b", "qwen-7b")),
        (
            "cg_fedllm",
            (
                *(f"{model}{budget}" for model in ("llama-7b", "qwen-7b") for budget in ("", "-eps2", "-eps0.25")),
                "llama-7b-three-ceval",
                "llama-7b-three-mmlu",
            ),
        ),
        (
            "dp_lora",
            (
                *(f"{model}{domain}" for model in ("llama-7b", "gpt2", "glm-4-9b") for domain in ("", "-finance", "-medical")),
                "bert-base",
                "bert-base-finance",
                "qwen-7b",
            ),
        ),
        ("dp_fedlora", ("llama-7b", "qwen-7b")),
        ("ew_tune", ("sst2", "qnli", "qnli-1e-6", "qqp", "qqp-1e-6", "mnli", "mnli-1e-6")),
    ],
)
def test_full_reaches_every_model_and_text_of_the_paper(checkout, tmp_path, paper, names):
    done = checkout(f"reproduce_{paper}.sh", "--full")
    assert done.returncode == 0, done.stderr
    configs = trained(tmp_path)
    for name in names:
        mine = [config for config in configs if config.output_dir.startswith(f"runs/reproduce/{paper}-full/{name}/")]
        assert len(mine) >= 3 and len({config.output_dir for config in mine}) == len(mine)
        assert len({what(config) for config in mine}) == 1
    assert len({what(config) for config in configs}) == len(names)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--full", "--only", "cola"], "--only cola: expected one of sst2 qnli qnli-1e-6 qqp"),
        (["--only", "sst2"], "--only sst2: expected with --full"),
        (["--full", "--only"], "--only: expected a name"),
    ],
)
def test_one_model_or_task_of_full(checkout, options, says):
    done = checkout("reproduce_ew_tune.sh", *options)
    assert done.returncode == 2 and says in done.stderr


def test_the_printed_table_is_kept_beside_the_runs(checkout, tmp_path):
    runs = tmp_path / "runs" / "reproduce" / "ew_tune-quick"
    (runs / "tiny").mkdir(parents=True)
    shutil.copy(ROOT / "configs" / "classify.yaml", runs / "tiny" / "config.yaml")  # not read: nothing is trained
    (runs / "PRV-seed1").mkdir()
    (runs / "PRV-seed1" / "results.json").write_text("{}")
    (tmp_path / "scripts" / "reproduce_table.py").write_text("import sys; print(*sys.argv[1:])")
    done = checkout("reproduce_ew_tune.sh", "--quick", "--report")
    assert done.returncode == 0 and done.stdout == "ew_tune runs/reproduce/ew_tune-quick/PRV-seed1\n"
    assert (runs / "table.md").read_text() == done.stdout


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import reproduce_table

    return reproduce_table


def test_a_gain_smaller_than_the_spread_of_seeds_is_told_as_that(table):
    def runs(gains):
        better = {f"EW-seed{seed}": {"accuracy": 0.9 + 0.01 * gain} for seed, gain in enumerate(gains)}
        return better | {f"PRV-seed{seed}": {"accuracy": 0.9} for seed in range(len(gains))}

    assert "within the noise of reseeding" in table.reseeding(runs([1, -1, 1.5]))
    assert "more than the noise of reseeding" in table.reseeding(runs([1, 1.1, 0.9]))
