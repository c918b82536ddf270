"""Runs that are interrupted: how they are taken up again, to the same bits or within the same target."""

import itertools
import json
import math

import pytest

from fedllm import federation, run
from fedllm import setting as settings
from fedllm.checkpoint import Checkpoints
from fedllm.errors import RunStopped, UserError
from fedllm.federation import Federation
from fedllm.privacy import adversaries
from fedllm.privacy.ledger import Ledger, counted, read_ledger
from fedllm.server import ServerOptimizer
from fedllm.training.engine import TorchEngine
from fedllm.transports.simulation import Simulation
from tests.fedllm.runs import MOMENTS, SETTINGS, Killed, adapter_of, told

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_fixed_seed_gives_the_same_adapter_and_another_another(configured, reference, tmp_path):
    adapter, results, _ = reference("public")
    again = run.train(configured("again", *SETTINGS["public"]))
    assert adapter_of(tmp_path / "again") == adapter and told(again) == told(results)
    run.train(configured("other", *SETTINGS["public"], "seed=6"))
    assert adapter_of(tmp_path / "other") != adapter


def test_without_a_seed_no_two_runs_are_alike(configured, tmp_path, no_plot):
    ids = [run.train(configured(name)) and read_ledger(tmp_path / name / "ledger.jsonl")[0]["run"] for name in ("one", "two")]
    assert ids[0] != ids[1] and adapter_of(tmp_path / "one") != adapter_of(tmp_path / "two")


KILLS = [
    ("public", Checkpoints, "save", 1, False, 0),
    ("public", Checkpoints, "save", 1, True, 0),
    ("public", Federation, "fit", 1, True, 0),
    ("public", Ledger, "append", 2, False, 0),
    ("public", Ledger, "append", 2, True, 1),
    ("public", Simulation, "messages", 1, False, 1),
    ("public", federation, "noisy_mean", 2, True, 1),
    ("public", Federation, "record", 2, True, 1),
    ("public", Federation, "fit", 2, True, 0),  # refitted, not yet used
    ("public", Checkpoints, "save", 3, True, 0),
    ("public", Checkpoints, "save", 4, False, 1),
    ("public", TorchEngine, "save", 1, False, 0),
    ("public", TorchEngine, "save", 1, True, 0),
    ("public", run, "write_json", 1, False, 0),
    ("client fit", Federation, "hand_over", 2, True, 0),
    ("client fit", Checkpoints, "save", 3, True, 0),
    ("client fit", federation, "noisy_mean", 2, True, 1),
    ("moments", Ledger, "append", 1, True, 1),
    ("moments", Checkpoints, "save", 2, True, 0),
    ("moments", federation, "noisy_mean", 2, True, 1),
    ("moments", Federation, "fit", 1, False, 0),
    ("moments", Checkpoints, "save", 4, False, 0),
    ("moments", Ledger, "append", 4, True, 1),
    ("mixture", Checkpoints, "save", 3, True, 0),
    ("mixture", federation, "noisy_mean", 3, True, 1),
    ("memory", Checkpoints, "save", 3, True, 0),
    ("memory", federation, "noisy_mean", 3, True, 1),
    ("code space", Checkpoints, "save", 1, False, 0),
    ("code space", Checkpoints, "save", 3, True, 0),
    ("code space", federation, "noisy_mean", 3, True, 1),
    ("feedback", Checkpoints, "save", 3, True, 0),
    ("feedback", federation, "decoded_mean", 2, True, 1),
    ("core", Checkpoints, "save", 2, True, 0),
    ("core", federation, "noisy_mean", 2, True, 1),
    ("stack", Checkpoints, "save", 3, True, 0),
    ("stack", federation, "decoded_mean", 3, True, 1),
    ("residual", ServerOptimizer, "step", 2, True, 1),  # the dense matrices had moved already
    ("residual", TorchEngine, "save", 1, True, 0),
]


@pytest.mark.parametrize(("setting", "owner", "name", "call", "after", "repeated"), KILLS)
def test_a_seeded_run_resumes_to_the_same_bits(setting, owner, name, call, after, repeated, configured, reference, kill_at, tmp_path):
    adapter, whole, spent = reference(setting)
    disarm = kill_at(owner, name, call, after)
    with pytest.raises(Killed):
        run.train(configured("run", *SETTINGS[setting]))
    disarm()
    results = run.resume(tmp_path / "run")
    assert adapter_of(tmp_path / "run") == adapter
    assert told(results) == told(whole)
    _, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert len(entries) == len(spent) + repeated  # every attempt stands in the ledger,
    assert [entry["id"] for entry in counted(entries)] == [entry["id"] for entry in spent]  # and the identical repeat counts once
    assert sum(entry["attempt"] == 2 for entry in entries) == repeated


def test_a_run_killed_again_and_again_still_ends_the_same(configured, reference, kill_at, tmp_path):
    adapter, whole, _ = reference("public")
    disarm = kill_at(Simulation, "messages", 1)
    with pytest.raises(Killed):
        run.train(configured("run", *SETTINGS["public"]))
    disarm()
    for owner, name, call in ((Simulation, "messages", 2), (federation, "noisy_mean", 1), (run, "write_json", 1)):
        disarm = kill_at(owner, name, call)
        with pytest.raises(Killed):
            run.resume(tmp_path / "run")
        disarm()
    assert told(run.resume(tmp_path / "run")) == told(whole)
    assert adapter_of(tmp_path / "run") == adapter
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rounds"] == 3


def test_fixed_factors_come_from_the_checkpoint(configured, reference, kill_at, tmp_path, monkeypatch):
    """Another machine would find them again only up to rounding; the run goes on with those that it began with."""
    adapter, _, _ = reference("core")
    disarm = kill_at(Checkpoints, "save", 2, True)
    with pytest.raises(Killed):
        run.train(configured("run", *SETTINGS["core"]))
    disarm()
    real = settings.public_start

    def elsewhere(*args):
        fixed = real(*args)
        for value in fixed.values():
            value.detach().mul_(1.001)
        return fixed

    monkeypatch.setattr(settings, "public_start", elsewhere)
    run.resume(tmp_path / "run")
    assert adapter_of(tmp_path / "run") == adapter


def test_a_run_whose_config_was_edited_is_not_resumed(configured, tmp_path, no_plot):
    run.train(configured("run", "federation.rounds=1"))
    folder = tmp_path / "run"
    (folder / "results.json").unlink()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("seed: null", "seed: 3"))
    with pytest.raises(UserError, match="changed since the run began"):
        run.resume(folder)


def test_a_client_is_the_same_client_in_every_run(configured):
    from fedllm.setting import build

    one, other = (build(configured(), seed).partition for seed in (1, 2))
    assert all((one.records(client) == other.records(client)).all() for client in range(one.clients))


def test_a_finished_run_is_not_resumed(configured, tmp_path, no_plot):
    run.train(configured())
    before = adapter_of(tmp_path / "run")
    with pytest.raises(UserError, match="finished"):
        run.resume(tmp_path / "run")
    assert adapter_of(tmp_path / "run") == before


def test_real_noise_is_drawn_afresh_counts_twice_and_stays_within_the_target(configured, kill_at, tmp_path, no_plot):
    """Four rounds are paid for; one is lost to a kill after its noise; three rounds come of it."""
    disarm = kill_at(federation, "noisy_mean", 2, True)
    with pytest.raises(Killed):
        run.train(configured("run", "federation.rounds=4"))
    disarm()
    results = run.resume(tmp_path / "run")
    header, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert [(entry["id"], entry["attempt"]) for entry in entries] == [
        ("stage2/round0", 1), ("stage2/round1", 1), ("stage2/round1", 2), ("stage2/round2", 1),
    ]  # fmt: skip
    assert counted(entries) == entries
    assert results["rounds"] == 3 and "budget" in results["stopped"]
    assert results["epsilon"]["release"]["epsilon"] == adversaries.epsilon_release(header, entries).epsilon <= 8


def test_the_guard_ends_a_run_that_is_killed_too_often(configured, kill_at, tmp_path, no_plot):
    disarm = kill_at(federation, "noisy_mean", 1, True)
    with pytest.raises(Killed):
        run.train(configured())
    disarm()
    disarm = kill_at(federation, "noisy_mean", 1, True)
    with pytest.raises(Killed):
        run.resume(tmp_path / "run")
    disarm()
    results = run.resume(tmp_path / "run")
    assert results["rounds"] == 0 and results["stopped"]
    assert len(read_ledger(tmp_path / "run" / "ledger.jsonl")[1]) == 2
    assert results["epsilon"]["release"]["epsilon"] <= 8


def test_stage_1_that_is_killed_too_often_ends_within_the_target_without_a_round(configured, kill_at, tmp_path, no_plot):
    results = None
    for attempt in range(9):
        disarm = kill_at(federation, "noisy_mean", 1, True)
        try:
            if attempt == 0:
                run.train(configured("run", *MOMENTS, "privacy.stage1_share=0.9", "codec.warmup_rounds=1"))
            else:
                results = run.resume(tmp_path / "run")
                break
        except Killed:
            pass
        finally:
            disarm()
    header, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert 2 <= len(entries) == attempt and adversaries.epsilon_release(header, entries).epsilon <= 8
    assert results["rounds"] == 0 and "warm-up" in results["stopped"]


def test_stage_1_cut_short_makes_its_prior_of_the_rounds_it_had(configured, kill_at, tmp_path, no_plot):
    overrides = [*MOMENTS, "privacy.stage1_share=0.9", "codec.warmup_rounds=2"]
    disarm = kill_at(federation, "noisy_mean", 2, True)
    with pytest.raises(Killed):
        run.train(configured("run", *overrides))
    disarm()
    results = run.resume(tmp_path / "run")
    header, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert [entry["attempt"] for entry in entries if entry["id"] == "stage1/round1"] in ([1], [1, 2])
    assert adversaries.epsilon_release(header, entries).epsilon <= 8
    assert results["stopped"] and results["rounds"] < 2


def test_two_runs_started_at_once_into_one_folder(configured, tmp_path, monkeypatch):
    """The second finds the first's folder free and comes second to claim it: it is refused and writes nothing."""
    config, other = configured("run"), configured("run", "federation.rounds=1")
    run.expect_no_run(tmp_path / "run")
    with run.claimed(tmp_path / "run"):
        (tmp_path / "run" / "ledger.jsonl").write_text("first\n")
    monkeypatch.setattr(run, "expect_no_run", lambda path, seen=[], real=run.expect_no_run: real(path) if seen else seen.append(1))
    with pytest.raises(UserError, match="already holds a run"):
        run.train(other)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["ledger.jsonl"]
    assert config.output_dir == other.output_dir


def test_a_non_finite_update_under_error_feedback_stops_the_run(configured, monkeypatch):
    real = TorchEngine.updates

    def broken(self, data, units, *args):
        for where, updates in real(self, data, units, *args):
            yield where, updates * math.nan

    monkeypatch.setattr(TorchEngine, "updates", broken)
    with pytest.raises(RunStopped, match=r"round 1: a client's update is not finite"):
        run.train(configured("run", *SETTINGS["feedback"], "codec.prior=none"))


def test_a_non_finite_aggregate_stops_the_run_and_keeps_the_state(configured, reference, tmp_path, monkeypatch):
    adapter, _, _ = reference("public")
    real, calls = federation.noisy_mean, itertools.count(1)

    def broken(*args):
        return real(*args) * (math.nan if next(calls) == 2 else 1)

    monkeypatch.setattr(federation, "noisy_mean", broken)
    with pytest.raises(RunStopped, match=r"round 2: .*not finite; the state after round 1 is kept"):
        run.train(configured("run", *SETTINGS["public"]))
    monkeypatch.setattr(federation, "noisy_mean", real)
    run.resume(tmp_path / "run")
    assert adapter_of(tmp_path / "run") == adapter


def test_a_non_finite_public_loss_stops_the_run(configured, tmp_path, no_plot, monkeypatch):
    real = federation.evaluation.look_part
    calls = itertools.count(1)

    def broken(setting, config):
        looked = real(setting, config)
        return type(looked)(math.inf, looked.accuracy) if next(calls) == 2 else looked

    monkeypatch.setattr(federation.evaluation, "look_part", broken)
    with pytest.raises(RunStopped, match="public loss is not finite; the state after round"):
        run.train(configured())
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest()[1]["rounds"] in (0, 1)


@pytest.mark.parametrize("override", ["seed=3", "federation.rounds=9", "privacy.enabled=false"])
def test_a_resumed_run_keeps_its_config(override, tmp_path):
    with pytest.raises(UserError, match=f"{override}: a resumed run keeps its config; expected keys of engine. and parallel. alone"):
        run.resume(tmp_path, ["engine.batch_tokens=512", override])
