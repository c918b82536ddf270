"""Whole runs of a tiny model: what they write, and what they never tell."""

import json
import math
import re
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedllm import codec_fit, federation, run
from fedllm.checkpoint import Checkpoints
from fedllm.errors import UserError
from fedllm.evaluation import evaluate_run
from fedllm.privacy import adversaries
from fedllm.privacy.ledger import ENTRY_KEYS, HEADER_KEYS, read_ledger
from fedllm.privacy.noise import Noise
from tests.fedllm.runs import AUTOENCODER, EXAMPLES, MOMENTS, ONE_CLIENT, PRODUCTS, USERS, adapter_of, scalars, told

pytestmark = pytest.mark.usefixtures("one_thread")

RESULT_KEYS = {
    "method", "task", "model", "rounds", "accuracy", "loss", "accuracy_before", "loss_before", "epsilon",
    "uplink_bytes_per_client_round", "downlink_bytes_per_client_round", "update_bytes", "compression_ratio", "parameters", "code_size",
    "clients", "expected_cohort", "diagnostics", "seconds", "peak_memory_bytes", "seed", "versions", "history", "codec_bytes",
}  # fmt: skip
PHASES = {"setup", "stage1", "local_training", "codec", "privacy", "messages", "server", "evaluation", "total"}


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
    assert "epsilon/release_by_rdp" in scalars(folder)

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
    "each": ["privacy.noise=local", "codec.decode=each"],
    "each, autoencoder": [*AUTOENCODER, "privacy.noise=local", "codec.decode=each"],
    "kronecker": ["codec.family=kronecker"],
    "kronecker, moments": ["codec.family=kronecker", "codec.prior=moments"],
    "chain": ["codec.family=chain"],
    "sketch": ["codec.family=sketch"],
    "mixture": ["codec.prior=public+released+random", "codec.refresh=1", "codec.weights=[1,1,0.1]"],
    "adaptive": ["privacy.clip.mode=adaptive"],
    "adaptive, local": ["privacy.clip.mode=adaptive", "privacy.noise=local"],
    "adaptive, central": ["privacy.clip.mode=adaptive", "privacy.noise=central", "privacy.clip.norm=0.3"],
    "users": USERS,
    "users, in update": [*USERS, "privacy.noise_in=update"],
    "users, central": [*USERS, "privacy.noise=central", "codec.bits=32", "federation.partition.kind=iid"],
    "users by column": [*USERS, "federation.partition.kind=column", "federation.clients=9"],
    "examples": EXAMPLES,
    "examples, one client": [*EXAMPLES, *ONE_CLIENT],
    "examples, in update": [*EXAMPLES, "privacy.noise_in=update", "privacy.noise=local"],
    "examples, adaptive": [*EXAMPLES, "privacy.clip.mode=adaptive"],
    "examples, moments": [*EXAMPLES, *MOMENTS],
    "examples by column": [*EXAMPLES, "federation.partition.kind=column", "federation.clients=9", "task.columns.user=user"],
    "examples, dirichlet": [*EXAMPLES, "federation.partition.kind=dirichlet"],
    "moments": MOMENTS,
    "moments, linear": ["codec.prior=moments"],
    "moments, users, local": [*MOMENTS, *USERS, "privacy.noise=local"],
    "moments, autoencoder": [*AUTOENCODER, "codec.prior=moments"],
    "public, autoencoder": [*AUTOENCODER, "codec.refresh=1"],
    "full noise": ["method=full_noise"],
    "several steps": ["federation.local.steps=3", "federation.local.lr=0.1"],
    "batches": ["federation.local.steps=2", "federation.local.lr=0.1", "federation.local.batch=2", "federation.clients=20"],
    "frozen A": ["lora.train=b", "federation.server.optimizer=momentum"],
    "core": ["lora.train=core", "lora.init=public"],
    "core, moments": ["lora.train=core", *MOMENTS],
    "stack": [*PRODUCTS, "federation.aggregation=stack"],
    "residual": [*PRODUCTS, "federation.aggregation=residual", "codec.bits=32"],
    "proximal, yogi": ["federation.local.steps=2", "federation.local.prox=0.1", "federation.server.optimizer=fedyogi"],
    "text": ["task.kind=text", "federation.server.optimizer=sgd"],
    "code space": ["federation.server.space=code", "codec.refresh=1"],
    "code space, chain": ["federation.server.space=code", "codec.family=chain", "codec.refresh=1"],
    "code space, examples": ["federation.server.space=code", *EXAMPLES],
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
    if config.privacy.unit == "example":
        assert header["units"] == 120 and results["expected_cohort"] == 24
    if config.privacy.clip.mode == "adaptive":
        clips = [entry["clip"] for entry in entries]
        assert clips[0] != clips[1] and 0.5 < clips[1] / clips[0] < 2


PARTS = {
    "core": ["lora.train=core"],
    "core, public": ["lora.train=core", "lora.init=public"],
    "frozen A, public": ["lora.train=b", "lora.init=public"],
    "stack": [*PRODUCTS, "federation.aggregation=stack", "federation.local.lr=2"],
    "stack, private": [*PRODUCTS, "federation.aggregation=stack", "privacy.enabled=true"],
    "residual": [*PRODUCTS, "federation.aggregation=residual", "federation.local.lr=2"],
    "residual, text": [*PRODUCTS, "federation.aggregation=residual", "federation.local.lr=2", "task.kind=text"],
}

FACTORS = {"a": 2 * 4 * 16, "b": 2 * (16 + 8 + 16 + 8)}  # numbers in A and in B
NUMBERS = {  # that a client downloads, where they are not adapter and dense matrices
    "core": 4 * 2 * 2,
    "core, public": 4 * 2 * 2 + FACTORS["a"] + FACTORS["b"],
    "frozen A, public": FACTORS["b"] + FACTORS["a"],
}


@pytest.mark.parametrize("name", list(PARTS))
def test_what_is_saved_is_what_ran(name, tiny, configured, tmp_path, no_plot, monkeypatch):
    """The adapter in plain PEFT gives the run's own logits, `evaluate` the run's own loss, and the broadcast counts all that changed."""
    built = []
    real = run.build
    monkeypatch.setattr(run, "build", lambda *args, **kwargs: built.append(real(*args, **kwargs)) or built[-1])
    results = run.train(configured("run", "seed=5", "privacy.enabled=false", *PARTS[name]))
    trained, ids = built[0].engine.model, torch.tensor([[5, 9, 2, 7], [1, 3, 3, 8]])
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", attn_implementation="eager").eval()
    with torch.no_grad():
        untrained, after = base(ids).logits, trained(input_ids=ids).logits
        plain = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
        changed = (after - untrained).abs().max()
        assert changed > 1e-3 and (plain(ids).logits - after).abs().max() < 1e-5 * max(1, changed)
    again = evaluate_run(tmp_path / "run", lambda text, total=None: nullcontext(lambda count: None))
    assert again["loss"] == pytest.approx(results["loss"], abs=1e-5) and again["accuracy"] == results["accuracy"]
    least = 4 * NUMBERS.get(name, 16 * (16 + 8 + 16 + 8) + 224)
    codec = results["codec_bytes"]
    assert least < results["downlink_bytes_per_client_round"] - codec < least + 1500


def test_public_text_that_repeats_itself_stops_no_run(configured, tmp_path, no_plot):
    """Its gradients span fewer directions than the code has numbers: the rest of the code is filled up."""
    (tmp_path / "same.csv").write_text("text\n" + "the film\n" * 40)
    results = run.train(configured("run", f"task.public={tmp_path / 'same.csv'}"))
    assert results["rounds"] == 2 and results["code_size"] == 8


@pytest.mark.parametrize("family", ["topk", "powersgd"])
@pytest.mark.parametrize("feedback", ["false", "true"])
def test_a_lossy_codec_trains_without_privacy(family, feedback, configured, tmp_path, no_plot):
    settings = [f"codec.family={family}", "codec.code_size=160", "privacy.enabled=false", f"codec.error_feedback={feedback}"]
    results = run.train(configured("run", *settings))
    assert results["rounds"] == 2 and 0 < results["code_size"] <= 160 and not results["epsilon"]["private"]
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(value.any() for key, value in saved.items() if "lora_B" in key)


@pytest.mark.parametrize("family", ["linear", "kronecker"])
def test_the_size_is_chosen_once_and_told(family, configured, tmp_path, no_plot, capfd):
    settings = ["seed=3", f"codec.family={family}", "codec.code_size=auto", "codec.refresh=1", "codec.public_examples=59"]
    results = run.train(configured("run", *settings))
    _, facts = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert results["code_size"] == facts["code_size"] >= 1
    assert capfd.readouterr().err.count("chosen from public gradients") == 1


def test_too_little_public_text_to_choose_a_size_is_told(configured, no_plot):
    with pytest.raises(UserError, match=r"^codec.code_size=auto: expected an update of 16 numbers or more and public gradients that span"):
        run.train(configured("run", "codec.code_size=auto", "codec.public_examples=12"))


def test_a_run_of_huge_finite_updates_ends_with_its_results(configured, no_plot):
    settings = ["method=fedit", "codec.code_size=null", "federation.local.steps=2", "federation.local.lr=1e30"]
    assert run.train(configured("run", *settings))["rounds"] == 2


@pytest.mark.parametrize("noise_in", ["code", "update"])
def test_the_size_is_chosen_for_the_noise_that_comes(noise_in, configured, tmp_path, no_plot, monkeypatch):
    """With noise in the update its norm decides, whatever the code; each of several clip groups is clipped to its part of that."""
    seen = {}

    def choose(fit_rows, held_out, noise, rounds, candidates, signal, fit):
        seen.update({size: noise(size) for size in candidates})
        return candidates[0]

    groups = ["privacy.clip.groups=matrix"] if noise_in == "update" else []
    monkeypatch.setattr(codec_fit, "code_size_auto", choose)
    run.train(configured("run", "seed=3", "codec.code_size=auto", f"privacy.noise_in={noise_in}", *groups, "codec.bits=32"))
    _, facts = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    _, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    std = entries[-1]["noise_multiplier"] * entries[-1]["clip_groups"] ** 0.5 / 10 * facts["clip"]  # of a mean over a cohort of 10
    assert seen[min(seen)] == pytest.approx(std**2, rel=1e-6)


def test_a_small_clip_norm_shortens_signal_and_noise_alike(configured, tmp_path, no_plot, monkeypatch):
    """Where every unit is clipped, what is chosen does not depend on the norm to which it is."""
    seen = {}

    def choose(fit_rows, held_out, noise, rounds, candidates, signal, fit):
        seen.setdefault("ratio", []).append([noise(size) / signal(size) for size in candidates])
        return candidates[0]

    monkeypatch.setattr(codec_fit, "code_size_auto", choose)
    for norm in ("1e-5", "1e-3", "1e3"):
        run.train(configured("run" + norm, "seed=3", "codec.code_size=auto", f"privacy.clip.norm={norm}", "federation.rounds=1"))
    small, smaller, none = seen["ratio"]
    assert small == pytest.approx(smaller, rel=1e-6) and none[0] > 1000 * small[0]


def test_a_code_too_long_to_carry_is_refused_before_any_round(configured, tmp_path, no_plot, monkeypatch):
    monkeypatch.setattr(codec_fit, "MOST_CARRIED", 7)
    space = ["federation.server.space=code", "codec.code_size=8"]
    with pytest.raises(UserError, match=r"space=code: expected codec\.refresh=0"):
        run.train(configured("run", *space, "codec.refresh=1"))
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    assert run.train(configured("run", *space, "codec.refresh=0"))["rounds"] == 2


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


@pytest.mark.parametrize("overrides", [[], MOMENTS, USERS, EXAMPLES, ["privacy.noise=central"]])
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
