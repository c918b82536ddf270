"""scripts/train_deepspeed.sh with the real `deepspeed` launcher: two ranks train, one is killed, the run goes on; and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedllm import parallel, ranks, run
from fedllm.config import load_config
from fedllm.errors import UserError

ROOT = Path(__file__).parents[2]
OVERRIDES = ["seed=5", "federation.server.optimizer=sgd", "federation.rounds=8", "codec.refresh=3"]


@pytest.fixture
def project(tmp_path):
    """start(arguments) -> the script's process, in a project whose .venv is this Python."""
    (tmp_path / "project" / "scripts").mkdir(parents=True)
    (tmp_path / "project" / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "train_deepspeed.sh", tmp_path / "project" / "scripts")
    (tmp_path / "project" / "scripts" / "setup.sh").write_text('[ "$*" = deepspeed ]\n')
    python = tmp_path / "project" / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)

    def start(*arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(tmp_path / "project" / "scripts" / "train_deepspeed.sh"), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def ranks_of(process: subprocess.Popen) -> dict[str, psutil.Process]:
    """The processes of a launched run by their rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.cmdline()[2:4] == ["-m", "fedllm"]:
            found[child.environ()["RANK"]] = child
    return found


def rounds_done(folder: Path) -> int:
    return len(list((folder / "checkpoints").glob("state-*"))) and max(
        int(path.stem.split("-")[1]) for path in (folder / "checkpoints").glob("state-*")
    )


def test_a_killed_rank_ends_the_run_in_one_line_and_it_goes_on_alone_as_if_nothing_had_been(project, tiny, tmp_path, one_thread):
    process = project(str(tiny / "config.yaml"), "--num_gpus", "2", "--json", *OVERRIDES, f"output_dir={tmp_path / 'two'}")
    began = time.monotonic()
    while not (tmp_path / "two" / "checkpoints").exists() or rounds_done(tmp_path / "two") < 3:  # the codec counts as one
        assert process.poll() is None and time.monotonic() - began < 240, process.communicate()
        time.sleep(0.05)
    started = ranks_of(process)
    assert sorted(started) == ["0", "1"]
    started["1"].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and not any(one.is_running() for one in started.values())
    assert process.returncode == 1 and out == ""
    told = [line for line in err.splitlines() if "rank" in line or "error" in line.lower()]
    assert told == [err.splitlines()[-1]] and "a rank was killed" in told[0] and "--resume" in told[0]

    resumed = run.resume(tmp_path / "two")
    alone = run.train(load_config(tiny / "config.yaml", [*OVERRIDES, f"output_dir={tmp_path / 'one'}"]))
    assert resumed["epsilon"] == alone["epsilon"] and resumed["rounds"] == alone["rounds"] == 8
    found, expected = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("two", "one"))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=2e-6, rtol=1e-4)


def test_ranks_of_a_run_for_one_process_end_at_once(project, tiny, tmp_path):
    process = project(str(tiny / "config.yaml"), "--num_gpus", "2", "parallel.mode=none", f"output_dir={tmp_path / 'run'}")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == (
        "fedllm: error: parallel.mode=none: expected clients or data for the 2 ranks that were launched, or a run without launcher\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_deepspeed_file_that_contradicts_the_ranks_ends_them_all(project, tiny, tmp_path):
    (tmp_path / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "train_batch_size": 7}')
    engine = ["engine.name=deepspeed", f"engine.deepspeed={tmp_path / 'ds.json'}"]
    process = project(str(tiny / "config.yaml"), "--num_gpus", "2", *engine, f"output_dir={tmp_path / 'run'}")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == f"fedllm: error: {tmp_path / 'ds.json'}: train_batch_size=7: expected 2 a rank x 1 steps x 2 ranks = 4\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no config"),
        (["{config}"], "no GPU found"),
        (["{config}", "--num_gpus"], "--num_gpus: expected a value"),
        (["{config}", "--num_gpus", "two"], "--num_gpus two: expected a number"),
        (["{config}", "--num_gpu", "2"], "unknown option --num_gpu"),
        (["{config}", "other.yaml"], "two configs"),
        (["--resume", "runs/x", "seed=3"], "a resumed run keeps its config"),
        (["{config}", "--hostfile", "nowhere"], "nowhere: no such hostfile"),
        (["{config}", "--hostfile", "{hosts}"], "nobody.invalid"),
        (["{config}", "--hostfile", "{config}"], "expected lines such as: node1 slots=8"),
    ],
)
def test_wrong_use_is_one_line(arguments, told, project, tiny, tmp_path):
    (tmp_path / "hosts").write_text("# machines\nnobody.invalid slots=2\n")
    places = {"config": str(tiny / "config.yaml"), "hosts": str(tmp_path / "hosts")}
    process = project(*[argument.format(**places) for argument in arguments])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("train_deepspeed: ") and err.count("\n") == 1 and told in err


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["federation.expected_cohort=3"], "4 ranks, expected at most federation.expected_cohort=3"),
        (
            ["privacy.unit=user", "task.columns.user=user", "federation.unit_sampling_rate=0.5", "federation.clients=3"],
            "4 ranks, expected at most federation.clients=3",
        ),
    ],
)
def test_more_ranks_than_clients_are_refused(overrides, told, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "_team", ranks.Team(0, 4))
    config = load_config(tiny / "config.yaml", ["parallel.mode=clients", *overrides])
    with pytest.raises(UserError, match=told):
        parallel.check(config)


def test_ranks_share_the_cores_of_their_machine(monkeypatch, one_thread):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for given, expected in (({"LOCAL_SIZE": "2"}, 4), ({"LOCAL_WORLD_SIZE": "3"}, 2), ({"LOCAL_SIZE": "16"}, 1)):
        for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        ranks.share_cores()
        assert torch.get_num_threads() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    ranks.share_cores()
    assert torch.get_num_threads() == 1  # as it was set


def test_the_ledger_does_not_depend_on_the_ranks(tiny):
    alone, many = (load_config(tiny / "config.yaml", [f"parallel.mode={mode}"]) for mode in ("none", "clients"))
    assert run.fingerprint(alone) == run.fingerprint(many)
