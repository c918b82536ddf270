"""Whole runs of a tiny model: what they write, how they are taken up again, and what they never tell."""

import itertools
import json
import math
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from fedllm import federation, run
from fedllm.checkpoint import Checkpoints
from fedllm.config import load_config
from fedllm.errors import RunStopped, UserError
from fedllm.federation import Federation
from fedllm.monitor import Monitor
from fedllm.privacy import adversaries
from fedllm.privacy.ledger import ENTRY_KEYS, HEADER_KEYS, Ledger, counted, read_ledger
from fedllm.privacy.noise import Noise
from fedllm.transports.simulation import Simulation

pytestmark = pytest.mark.usefixtures("one_thread")

RESULT_KEYS = {
    "method", "task", "model", "rounds", "accuracy", "loss", "accuracy_before", "loss_before", "epsilon",
    "uplink_bytes_per_client_round", "downlink_bytes_per_client_round", "update_bytes", "compression_ratio", "parameters", "code_size",
    "clients", "expected_cohort", "diagnostics", "seconds", "peak_memory_bytes", "seed", "versions", "history", "codec_bytes",
}  # fmt: skip
PHASES = {"setup", "stage1", "local_training", "codec", "privacy", "messages", "server", "evaluation", "total"}
MOMENTS = ["codec.family=coordinate", "codec.prior=moments"]
AUTOENCODER = ["codec.family=autoencoder", "codec.code_size=null"]
USERS = ["privacy.unit=user", "task.columns.user=user", "federation.unit_sampling_rate=0.5", "federation.clients=4"]


class Killed(BaseException):
    """Stands for a kill: nothing in the project may catch it."""


@pytest.fixture
def configured(tiny, tmp_path):
    """configured(name, overrides...): the tiny config, to be run into tmp_path/name."""

    def make(name="run", *overrides):
        return load_config(tiny / "config.yaml", [f"output_dir={tmp_path / name}", *overrides])

    return make


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(Monitor, "finish", lambda self, results, history: None)


@pytest.fixture
def kill_at(monkeypatch):
    """kill_at(owner, name, call, after): the numbered call (from 1) of owner.name dies, before or after its work."""

    def arm(owner, name, call=1, after=False):
        real, calls = getattr(owner, name), itertools.count(1)

        def wrapped(*args, **kwargs):
            now = next(calls) == call
            if now and not after:
                raise Killed
            result = real(*args, **kwargs)
            if now:
                raise Killed
            return result

        monkeypatch.setattr(owner, name, wrapped)
        return lambda: monkeypatch.setattr(owner, name, real)

    return arm


def adapter_of(run_dir):
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def scalars(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# -- one run ---------------------------------------------------------------------------------------------------------------------------


def test_a_run_writes_all_that_is_promised(tiny, configured, tmp_path, monkeypatch):
    built = []
    real = run.build
    monkeypatch.setattr(run, "build", lambda *args, **kwargs: built.append(real(*args, **kwargs)) or built[-1])
    results = run.train(configured())
    folder = tmp_path / "run"
    assert json.loads((folder / "results.json").read_text()) == results
    assert results.keys() >= RESULT_KEYS and results["seconds"].keys() == PHASES
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "ledger.jsonl", "results.json", "adapter", "tensorboard", "checkpoints", "rounds.png",
    }  # fmt: skip

    epsilon = results["epsilon"]
    assert epsilon["private"] is True and epsilon["why_not_private"] == [] and epsilon["unit"] == "client"
    for adversary in ("release", "server"):
        assert epsilon[adversary].keys() >= {"epsilon", "relation", "accountant", "kind", "reason"}
    assert 7.9 < epsilon["release"]["epsilon"] <= 8 < epsilon["server"]["epsilon"]
    assert results["update_bytes"] == 4 * results["parameters"] == 896
    assert results["compression_ratio"] == results["update_bytes"] / results["uplink_bytes_per_client_round"]
    assert [record["round"] for record in results["history"]] == [0, 1, 2]

    header, entries = read_ledger(folder / "ledger.jsonl")
    assert header.keys() >= set(HEADER_KEYS) and all(entry.keys() >= set(ENTRY_KEYS) for entry in entries)
    assert [(entry["id"], entry["attempt"], entry["rng"]) for entry in entries] == [("stage2/round0", 1, "os"), ("stage2/round1", 1, "os")]
    assert adversaries.epsilon_release(header, entries).epsilon == epsilon["release"]["epsilon"]
    assert scalars(folder).keys() >= {"public/accuracy", "public/loss", "epsilon/release", "epsilon/server", "bytes/up", "bytes/down"}

    trained = built[0].engine.model
    ids = torch.tensor([[5, 9, 2, 7], [1, 3, 3, 8]])
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        untrained, after = base(ids).logits, trained(input_ids=ids).logits
        plain = PeftModel.from_pretrained(base, folder / "adapter").eval()
        assert torch.allclose(plain(ids).logits, after, atol=1e-5)
        assert (after - untrained).abs().max() > 1e-3
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(value.any() for key, value in saved.items() if "lora_B" in key)


def test_a_run_does_not_touch_a_folder_that_holds_another(configured, tmp_path, no_plot):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already holds a run"):
        run.train(configured())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


MODES = {
    "distributed": ["privacy.noise=distributed", "codec.bits=8"],
    "local": ["privacy.noise=local"],
    "central": ["privacy.noise=central"],
    "server target": ["privacy.target.adversary=server", "privacy.target.epsilon=60"],
    "noise in update": ["privacy.noise_in=update"],
    "noise in update, central": ["privacy.noise_in=update", "privacy.noise=central", "codec.bits=32"],
    "adaptive": ["privacy.clip.mode=adaptive"],
    "adaptive, local": ["privacy.clip.mode=adaptive", "privacy.noise=local"],
    "adaptive, central": ["privacy.clip.mode=adaptive", "privacy.noise=central", "privacy.clip.norm=0.3"],
    "users": USERS,
    "users, in update": [*USERS, "privacy.noise_in=update"],
    "users, central": [*USERS, "privacy.noise=central", "codec.bits=32", "federation.partition.kind=iid"],
    "users by column": [*USERS, "federation.partition.kind=column", "federation.clients=9"],
    "moments": MOMENTS,
    "moments, linear": ["codec.prior=moments"],
    "moments, users, local": [*MOMENTS, *USERS, "privacy.noise=local"],
    "moments, autoencoder": [*AUTOENCODER, "codec.prior=moments"],
    "public, autoencoder": [*AUTOENCODER, "codec.refresh=1"],
    "full noise": ["method=full_noise"],
    "several steps": ["federation.local.steps=3", "federation.local.lr=0.1"],
    "frozen A": ["lora.train=b", "federation.server.optimizer=momentum"],
    "text": ["task.kind=text", "federation.server.optimizer=sgd"],
    "dirichlet": ["federation.partition.kind=dirichlet", "federation.partition.alpha=0.3"],
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_within_its_target(mode, configured, tmp_path, no_plot):
    config = configured("run", *MODES[mode])
    results = run.train(config)
    header, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert results["rounds"] == 2 and math.isfinite(results["loss"]) and results["epsilon"]["private"]
    warmup = 2 if config.codec.prior == "moments" else 0
    assert [entry["id"] for entry in entries] == [*(f"stage1/round{i}" for i in range(warmup)), "stage2/round0", "stage2/round1"]
    release, server = (results["epsilon"][adversary] for adversary in ("release", "server"))
    if config.privacy.noise == "central":
        assert server["epsilon"] is None and server["reason"] == adversaries.TRUSTED
    else:
        assert server["epsilon"] > release["epsilon"]
    bound = results["epsilon"][config.privacy.target.adversary]["epsilon"]
    assert 0.97 * config.privacy.target.epsilon < bound <= config.privacy.target.epsilon
    assert {entry["noise"] for entry in entries} == {config.privacy.noise}
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(value.any() for key, value in saved.items() if "lora_B" in key)
    if config.privacy.unit == "user":
        assert results["expected_cohort"] == 4.5 and header["units"] == 9  # three of the twelve users are held out
    if config.privacy.clip.mode == "adaptive":
        clips = [entry["clip"] for entry in entries]
        assert clips[0] != clips[1] and 0.5 < clips[1] / clips[0] < 2


def test_without_privacy_everything_says_so(configured, tmp_path, no_plot):
    results = run.train(configured("run", "method=fedit"))
    header, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    epsilon = results["epsilon"]
    assert epsilon["private"] is False and epsilon["why_not_private"] == ["privacy disabled"]
    assert header["private"] is False and header["why_not_private"] == ["privacy disabled"]
    for adversary in ("release", "server"):
        assert epsilon[adversary]["epsilon"] is None and epsilon[adversary]["reason"] == adversaries.NO_NOISE
    assert all(record.get("epsilon_release") is None and record.get("clip") is None for record in results["history"])
    assert not any(tag.startswith("epsilon") for tag in scalars(tmp_path / "run"))
    assert len(entries) == 2 and {entry["noise_multiplier"] for entry in entries} == {0}


@pytest.mark.parametrize(
    ("overrides", "why"),
    [(["federation.clients=400"], ["records shared"]), (["seed=3", "federation.clients=400"], ["fixed seed", "records shared"])],
)
def test_what_breaks_the_promise_is_marked(overrides, why, configured, tmp_path, no_plot):
    results = run.train(configured("run", *overrides))
    header, _ = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert results["epsilon"]["private"] is header["private"] is False
    assert results["epsilon"]["why_not_private"] == header["why_not_private"] == why
    assert results["epsilon"]["release"]["epsilon"] <= 8


# -- interruptions ---------------------------------------------------------------------------------------------------------------------

REFERENCE = {}
SETTINGS = {
    "public": ["seed=5", "codec.refresh=2", "federation.rounds=3"],
    "moments": ["seed=5", *MOMENTS, "privacy.clip.mode=adaptive", "federation.server.optimizer=momentum"],
}


@pytest.fixture
def reference(configured, tmp_path, no_plot):
    """reference(setting): adapter, results and counted ledger entries of an uninterrupted seeded run."""

    def get(setting):
        if setting not in REFERENCE:
            results = run.train(configured(f"whole-{setting}", *SETTINGS[setting]))
            folder = tmp_path / f"whole-{setting}"
            REFERENCE[setting] = adapter_of(folder), results, read_ledger(folder / "ledger.jsonl")[1]
        return REFERENCE[setting]

    return get


def told(results):
    """What a run says apart from times, memory."""
    kept = {key: value for key, value in results.items() if key not in ("seconds", "peak_memory_bytes", "history")}
    return kept, [{key: value for key, value in record.items() if key != "seconds"} for record in results["history"]]


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
    ("public", run, "save_adapter", 1, False, 0),
    ("public", run, "save_adapter", 1, True, 0),
    ("public", run, "write_json", 1, False, 0),
    ("moments", Ledger, "append", 1, True, 1),
    ("moments", Checkpoints, "save", 2, True, 0),
    ("moments", federation, "noisy_mean", 2, True, 1),
    ("moments", Federation, "fit", 1, False, 0),
    ("moments", Checkpoints, "save", 4, False, 0),
    ("moments", Ledger, "append", 4, True, 1),
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


def test_stage_1_that_is_killed_too_often_does_not_exceed_the_target(configured, kill_at, tmp_path, no_plot):
    attempts = 0
    with pytest.raises(RunStopped, match="would exceed the target"):
        for attempts in range(1, 9):
            disarm = kill_at(federation, "noisy_mean", 1, True)
            with pytest.raises(Killed):
                if attempts == 1:
                    run.train(configured("run", *MOMENTS, "privacy.stage1_share=0.9", "codec.warmup_rounds=1"))
                else:
                    run.resume(tmp_path / "run")
            disarm()
    header, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert 2 <= len(entries) == attempts - 1 and adversaries.epsilon_release(header, entries).epsilon <= 8


@pytest.mark.parametrize("overrides", [[], MOMENTS, USERS, ["privacy.noise=central"]])
def test_no_randomness_is_drawn_before_its_entry_is_on_disk(overrides, configured, tmp_path, no_plot, monkeypatch):
    ledger, drawn = tmp_path / "run" / "ledger.jsonl", []

    def watched(name):
        real = getattr(Noise, name)

        def draw(self, *args, **key):
            last = json.loads(ledger.read_text().splitlines()[-1])
            assert last["id"] == f"stage{key['stage']}/round{key['round']}"
            drawn.append((name, last["id"]))
            return real(self, *args, **key)

        monkeypatch.setattr(Noise, name, draw)

    for name in ("gaussian", "uniform", "binomial", "choice"):
        watched(name)
    run.train(configured("run", *overrides))
    _, entries = read_ledger(ledger)
    assert {where for kind, where in drawn if kind == "gaussian"} == {entry["id"] for entry in entries}


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


# -- secrets ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [[], ["privacy.clip.mode=adaptive"], MOMENTS])
def test_no_output_depends_on_the_cohort_but_through_the_noisy_mean(overrides, configured, tmp_path, monkeypatch, capfd):
    """Two runs whose cohorts differ as much as can be, given one and the same noisy mean: everything they tell is equal."""
    seen = {}

    def fixed_mean(messages, spec, noise):
        seen.setdefault(spec.run, []).append(len(list(messages)))
        return torch.linspace(-0.1, 0.2, spec.size)

    monkeypatch.setattr(federation, "noisy_mean", fixed_mean)
    everything = []
    for members in (1, 25):
        monkeypatch.setattr(run, "new_run_id", lambda config, members=members: f"00000000{members:08d}")
        monkeypatch.setattr(Noise, "sample_cohort", lambda self, population, q, most, members=members, **key: torch.arange(members).numpy())
        results = run.train(configured("run", *overrides))
        folder = tmp_path / "run"
        _, facts = Checkpoints(folder / "checkpoints").latest()
        facts["seconds"], facts["history"] = None, told(facts | {"history": facts["history"]})[1]
        shown = re.sub(r"[\d.]+ (s|min)\b", "TIME", re.sub(r"about .* left", "", capfd.readouterr().err))
        board = {tag: values for tag, values in scalars(folder).items() if tag != "seconds/round"}
        everything.append((told(results), read_ledger(folder / "ledger.jsonl")[1], facts, shown, board, adapter_of(folder)))
        folder.rename(tmp_path / f"run{members}")
    assert [set(counts) for counts in seen.values()] == [{1}, {25}]
    assert everything[0] == everything[1]
