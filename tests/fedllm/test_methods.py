"""One conformance class for every method there is: a run of a tiny model, and what must hold of it."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from fedllm import real, run
from fedllm.cli.privacy.report import report_rows, run_report
from fedllm.config import check_keys, load_config
from fedllm.errors import UserError
from fedllm.methods import METHODS
from fedllm.privacy import adversaries
from fedllm.privacy.ledger import ENTRY_KEYS, HEADER_KEYS, read_ledger
from fedllm.schema import Config
from fedllm.setting import build
from tests.fedllm.runs import EXAMPLES, USERS, adapter_of, told

pytestmark = pytest.mark.usefixtures("one_thread", "no_plot")

# At LoRA's start A's public gradient is zero, and a code shrunk by it keeps A still until the next fit.
SEEDED = ["seed=3", "federation.rounds=3", "codec.refresh=1"]
# What a method needs of its user.
SMALL_STEPS = ["federation.local.lr=0.1"]
NEEDS = {
    "user_level": USERS,
    "example_level": EXAMPLES,
    "ew_tune": EXAMPLES,
    "ew_tune:published": EXAMPLES,
    "cg_fedllm:published": ["codec.refresh=0"],
    "dp_fedlora:published": SMALL_STEPS,
    "flora": SMALL_STEPS,
    "fedex_lora": SMALL_STEPS,
}
# What begins anew after each round, as it was at the start.
RESTARTED = {"flora": {"B"}}
RUNS = {}


@pytest.fixture
def once(configured, monkeypatch, tmp_path_factory):
    """once(method): its seeded run, trained once for all tests: results, folder, the model in memory."""

    def get(method):
        if method not in RUNS:
            built, real = [], run.build
            monkeypatch.setattr(run, "build", lambda *args, **kwargs: built.append(real(*args, **kwargs)) or built[-1])
            config = configured("unused", f"method={method}", *SEEDED, *NEEDS.get(method, []))
            config.output_dir = str(tmp_path_factory.mktemp("method") / "run")
            results = run.train(config)
            RUNS[method] = results, run.Path(config.output_dir), built[0].engine.model
        return RUNS[method]

    return get


def kind_of(factor: str) -> str:
    """A, B, ... of the name of a LoRA factor."""
    return factor.split("lora_")[-1].split(".")[0]


def products(saved):
    """B A of each layer of a saved adapter."""
    layers = [name.removesuffix("lora_A.weight") for name in saved if name.endswith("lora_A.weight")]
    return {layer: saved[f"{layer}lora_B.weight"] @ saved[f"{layer}lora_A.weight"] for layer in layers}


@pytest.mark.parametrize("method", list(METHODS))
class TestConformance:
    def test_every_trained_part_has_changed_and_every_layer_does_something(self, method, once, configured):
        _, folder, trained = once(method)
        config = configured("fresh", f"method={method}", *SEEDED, *NEEDS.get(method, []))
        start, now = build(run.resolve(config), config.seed).engine.parameters, dict(trained.named_parameters())
        changed = {kind_of(name) for name, value in start.items() if not torch.equal(value, now[name])}
        assert changed == {kind_of(name) for name in start} - RESTARTED.get(method, set())
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert len(products(saved)) == 4 and all(product.any() for product in products(saved).values())

    def test_the_adapter_reloads_in_peft(self, method, once, tiny):
        _, folder, trained = once(method)
        ids = torch.tensor([[5, 9, 2, 7], [1, 3, 3, 8]])
        base = AutoModelForCausalLM.from_pretrained(tiny / "model", attn_implementation="eager").eval()
        with torch.no_grad():
            untrained, after = base(ids).logits, trained(input_ids=ids).logits
            assert torch.allclose(PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits, after, atol=1e-5)
        assert (after - untrained).abs().max() > 1e-4
        assert all(torch.isfinite(value).all() for value in load_file(folder / "adapter" / "adapter_model.safetensors").values())

    def test_the_ledger_is_complete(self, method, once):
        results, folder, _ = once(method)
        header, entries = read_ledger(folder / "ledger.jsonl")
        assert header.keys() >= set(HEADER_KEYS) and all(entry.keys() >= set(ENTRY_KEYS) for entry in entries)
        assert [entry["round"] for entry in entries if entry["stage"] == "stage2"] == list(range(results["rounds"]))
        for adversary, epsilon in (("release", adversaries.epsilon_release), ("server", adversaries.epsilon_server)):
            assert epsilon(header, entries).as_json() == results["epsilon"][adversary]
        report = run_report("run", header, entries)
        assert report["claimed"] == results["epsilon"]["claimed"] and report["why_not_private"] == results["epsilon"]["why_not_private"]
        assert report_rows(report)

    def test_a_second_run_with_the_seed_is_the_same(self, method, once, configured, tmp_path):
        results, folder, _ = once(method)
        again = run.train(configured("again", f"method={method}", *SEEDED, *NEEDS.get(method, [])))
        assert adapter_of(folder) == adapter_of(tmp_path / "again") and told(again) == told(results)

    def test_the_true_epsilon_and_the_claimed_one(self, method, once):
        results, _, _ = once(method)
        epsilon, published = results["epsilon"], method.endswith(":published")
        assert published == (epsilon["claimed"] is not None) == (METHODS[method].claim is not None)
        if published:
            against = ["release"] if method == "ew_tune:published" else ["release", "server"]
            assert epsilon["claimed"] == {"epsilon": 8.0, "delta": 1e-3, "against": against, "statement": METHODS[method].claim}
            assert any(reason.startswith("published: claims 8.00, true is ") for reason in epsilon["why_not_private"])
            assert epsilon["private"] is False
        elif "privacy disabled" in epsilon["why_not_private"]:
            assert epsilon["release"]["epsilon"] is None and epsilon["release"]["reason"]
        else:
            assert 7.9 < epsilon["release"]["epsilon"] <= 8.0 and epsilon["release"]["kind"] == "bound"
            assert epsilon["why_not_private"] == ["fixed seed"]
        json.dumps(epsilon, allow_nan=False)

    def test_its_parts_are_keys_of_the_config(self, method):
        for key, value in METHODS[method].parts.items():
            for section in reversed(key.split(".")):
                value = {section: value}
            check_keys(value, Config, method)


@pytest.fixture(scope="module")
def encoder(tiny, tmp_path_factory):
    """Config keys of a random BERT of two layers that classifies the tiny task's text; its head trains too."""
    folder = tmp_path_factory.mktemp("encoder") / "model"
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(folder)
    return [f"model.name={folder}", "task.kind=classify", "lora.targets=[query,value]"]


@pytest.mark.parametrize("method", list(METHODS))
def test_on_an_encoder_with_a_head_and_against_the_server(method, encoder, configured, monkeypatch):
    built, real = [], run.build
    monkeypatch.setattr(run, "build", lambda *args, **kwargs: built.append(real(*args, **kwargs)) or built[-1])
    alone = method.endswith(":published") or method in ("ew_tune", "fedit")  # a claim of their own, a trusted server, no promise
    bound = [] if alone else ["privacy.target.adversary=server"]
    config = configured("run", f"method={method}", *SEEDED, *NEEDS.get(method, []), *encoder, *bound)
    results, folder = run.train(config), run.Path(config.output_dir)
    start = build(run.resolve(config), config.seed).engine.parameters
    now = dict(built[0].engine.model.named_parameters())
    changed = {kind_of(name) for name, value in start.items() if not torch.equal(value, now[name])}
    assert changed == {kind_of(name) for name in start} - RESTARTED.get(method, set())
    assert any("classifier" in name for name in start)
    ids = torch.tensor([[5, 9, 2, 7], [1, 3, 3, 8]])
    fresh = build(run.resolve(config), config.seed, adapter=folder / "adapter").engine.model.eval()
    with torch.no_grad():
        trained = built[0].engine.model.eval()(input_ids=ids).logits
        assert torch.allclose(fresh(input_ids=ids).logits, trained, atol=1e-5)
    if bound:
        assert 7.9 < results["epsilon"]["server"]["epsilon"] <= 8.0
        assert results["epsilon"]["release"]["epsilon"] <= results["epsilon"]["server"]["epsilon"]


def test_every_published_form_stands_beside_a_corrected_one():
    for name in METHODS:
        assert name.partition(":")[0] in METHODS
        assert name.partition(":")[2] in ("", "published")


# -- what the published forms do -----------------------------------------------------------------------------------------------------------


def ledger(once, method):
    _, folder, _ = once(method)
    return read_ledger(folder / "ledger.jsonl")


@pytest.mark.parametrize("method", ["dp_lora:published", "dp_fedlora:published"])
def test_the_classic_formula_for_each_matrix_and_round(method, once):
    """By hand: 8 matrices of norm C, noise sigma in each; three rounds; replaced against the server."""
    header, entries = ledger(once, method)
    sigma = math.sqrt(2 * math.log(1.25 / 1e-3)) / 8.0
    for entry in entries:
        assert (entry["clip_groups"], entry["noise"], entry["mechanism"]) == (8, "local", "gaussian")
        assert entry["noise_multiplier"] * math.sqrt(8) == pytest.approx(sigma, rel=1e-12)
    from fedllm.privacy.accountants.gdp import gdp_epsilon

    server = adversaries.epsilon_server(header, entries).epsilon
    assert server == pytest.approx(gdp_epsilon(2 * math.sqrt(3 * 8) / sigma, 1e-3), rel=1e-9) and server > 8
    assert [entry["largest_weight"] > 1 for entry in entries] == [False] * 3  # 120 records, 40 clients


def test_weights_follow_the_number_of_examples(configured, tmp_path):
    uneven = ["federation.clients=50", "federation.max_cohort=50"]  # two or three of 120 examples each; no cohort is ever cut
    run.train(configured("run", "method=dp_lora:published", "seed=3", *uneven))
    header, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    partition = build(configured("fresh", *uneven), 3).partition
    counts = [len(partition.records(client)) for client in range(partition.clients)]
    heaviest = max(counts) / (sum(counts) / len(counts))
    assert entries[0]["largest_weight"] == pytest.approx(heaviest) and heaviest > 1.2
    uniform = [entry | {"shares": header["clients"]} for entry in entries]
    assert entries[0]["shares"] == pytest.approx(sum(count**2 for count in counts) / max(counts) ** 2)
    assert adversaries.epsilon_release(header, entries).epsilon > adversaries.epsilon_release(header, uniform).epsilon


LOUD = ["privacy.clip.norm=0.1", "privacy.target.epsilon=1", "federation.expected_cohort=40", "seed=3"]
SIGMA = 0.1 * math.sqrt(2 * math.log(1.25 / 1e-3))


def test_the_state_that_is_sent_is_noise(configured, tmp_path):
    """DP-FedLoRA as published: each round replaces the adapter by a noisy mean of clipped ones."""
    run.train(configured("run", "method=dp_fedlora:published", *LOUD))
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in saved.values()))
    size = sum(value.numel() for value in saved.values())
    assert norm == pytest.approx(SIGMA * math.sqrt(size / 40), rel=0.15)  # mean of 40 messages: their noise, and hardly anything else


def test_a_published_round_has_the_noise_of_its_cohort_and_no_more(configured, tmp_path):
    """Of ten in forty: ten shares of noise, not those of the largest cohort that can be expected."""
    few = [*LOUD, "federation.expected_cohort=10"]
    run.train(configured("run", "method=dp_fedlora:published", *few))
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in saved.values()))
    assert norm == pytest.approx(SIGMA * math.sqrt(sum(value.numel() for value in saved.values()) / 10), rel=0.15)
    _, entries = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert {(entry["max_cohort"], entry["shares"]) for entry in entries} == {(10, 10)}
    assert all(run.resolve(configured("x", f"method={name}", *few)).federation.max_cohort > 20 for name in ("dp_fedlora", "dr_encoder"))


def test_what_a_method_sets_by_default_may_be_asked_for_otherwise(configured, tmp_path):
    """DP-FedLoRA's table has other server optimisers than its average; a config file's own is not meant."""
    assert configured("plain", "method=dp_fedlora:published").federation.server.optimizer == "fedavg"
    asked = ["federation.server.optimizer=fedyogi", "federation.server.lr=1e-2", "seed=3", *SMALL_STEPS]
    config = configured("run", "method=dp_fedlora:published", *asked)
    server = config.federation.server
    assert (server.optimizer, server.lr, server.schedule) == ("fedyogi", 1e-2, "constant")
    run.train(config)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(value).all() for value in saved.values())
    own = tmp_path / "run" / "config.yaml"  # what the run goes on with when it is taken up again
    assert load_config(own) == run.resolve(config)
    assert load_config(own, ["method=dp_fedlora:published", "seed=3"]) == run.resolve(config)
    with pytest.raises(UserError, match=r"^federation\.server\.optimizer=adam: method=flora fixes federation\.server\.optimizer=fedavg;"):
        configured("other", "method=flora", "federation.server.optimizer=adam")


def test_a_corrected_form_clips_the_update_at_once(configured):
    for method in ("dp_lora", "dp_fedlora"):
        for asked in ("privacy.clip.groups=matrix", "privacy.clip.of=state"):
            with pytest.raises(UserError, match=f"^{asked}: method={method} fixes privacy.clip"):
                configured("other", f"method={method}", asked)


def test_stacked_it_is_the_mean_of_products_of_noise(configured, tmp_path):
    run.train(configured("run", "method=dp_fedlora:published", "federation.aggregation=stack", "federation.rounds=1", *LOUD))
    found = products(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    rank, scaling = 2, 2.0
    energy = sum(scaling**2 * SIGMA**4 * rank * product.numel() / 40 for product in found.values())
    norm = math.sqrt(sum(float(product.double().square().sum()) for product in found.values()))
    assert norm == pytest.approx(math.sqrt(energy), rel=0.2) and norm > 10 * 0.1**2  # of the clip of A times that of B


EVERYONE = ["federation.expected_cohort=40", "federation.local.lr=0.1", "seed=3"]
QUIET = ["privacy.clip.norm=100", "privacy.target.epsilon=1e9"]  # a clip that nothing reaches, hardly any noise


def test_the_state_that_is_sent_stands_for_the_new_adapter(configured, tmp_path):
    """An odd number of rounds: a wrong sign of A and of B shows."""
    run.train(configured("state", "method=dp_fedlora:published", "federation.rounds=3", *QUIET, *EVERYONE))
    average = ["federation.server.optimizer=fedavg", "federation.server.lr=1"]
    run.train(configured("plain", "method=fedit", "federation.rounds=3", *average, *EVERYONE))
    state, plain = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("state", "plain"))
    for key, value in plain.items():
        assert torch.allclose(state[key], value, atol=1e-4), key
    assert any(value.abs().max() > 1e-2 for key, value in plain.items() if "lora_B" in key)


def test_stacked_states_are_what_stacking_without_privacy_makes_of_new_adapters(configured, tmp_path):
    more = ["federation.local.steps=2", "federation.rounds=3", *EVERYONE]
    run.train(configured("state", "method=dp_fedlora:published", "federation.aggregation=stack", *QUIET, *more))
    run.train(configured("plain", "method=flora", "privacy.enabled=false", *more))
    state, plain = (products(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")) for name in ("state", "plain"))
    for layer, product in plain.items():
        assert torch.allclose(state[layer], product, atol=1e-4), layer
    assert max(float(product.abs().max()) for product in plain.values()) > 1e-2


def test_raw_gradients_are_a_share_of_the_private_examples_along_a_few_steps(configured):
    config = configured("run", "method=cg_fedllm:published", "codec.real_share=0.1", "seed=3")
    setting = build(config, 3)
    before = setting.engine.adapter()
    rows = real.gradients(setting, config, 3)
    assert rows.shape == (len(setting.train) // 10, setting.engine.layout.size) and torch.equal(setting.engine.adapter(), before)
    of_a = torch.cat([rows[:, f.offset : f.stop] for f in setting.engine.layout.factors if "lora_A" in f.name], 1)
    assert not of_a[: len(rows) // 2].any() and of_a[len(rows) // 2 :].any(1).all()  # at LoRA's start A has none
    config.codec.real_share = 1.0
    assert len(real.gradients(setting, config, 3)) == config.codec.public_examples


def test_raw_gradients_leave_no_epsilon(once):
    header, entries = ledger(once, "cg_fedllm:published")
    assert [entry["prior"].partition(":")[0] for entry in entries] == ["real"] * 4
    assert [entry["mechanism"] for entry in entries] == ["raw_gradients", *["gaussian_each"] * 3]
    for answer in (adversaries.epsilon_release(header, entries), adversaries.epsilon_server(header, entries)):
        assert answer.epsilon is None and "raw gradients" in answer.reason
    assert 7.9 < adversaries.epsilon_release(header, entries[1:], "gdp").epsilon <= 8  # the claim: the rest alone, by the limit theorem
    results, _, _ = once("cg_fedllm:published")
    assert "published: claims 8.00, true is none (release), none (server)" in results["epsilon"]["why_not_private"]


def test_ew_tune_spends_more_than_it_claims(once, configured, tmp_path):
    """At a rate and a noise like those of its tasks; the corrected one keeps to the target."""
    long = ["federation.rounds=30", "federation.unit_sampling_rate=0.02", "federation.clients=1", "privacy.target.delta=1e-5", "seed=3"]
    spent = {}
    for method in ("ew_tune", "ew_tune:published"):
        results = run.train(configured(method.replace(":", "-"), f"method={method}", *long))
        spent[method] = results["epsilon"]["release"]["epsilon"]
        assert results["epsilon"]["server"]["reason"] == "none: trusted" and results["epsilon"]["unit"] == "example"
    assert spent["ew_tune"] <= 8 < 8.3 < spent["ew_tune:published"]


def test_raw_moments_leave_no_epsilon(once):
    header, entries = ledger(once, "dr_encoder:published")
    assert [(entry["mechanism"], entry["noise_multiplier"] > 0) for entry in entries] == [
        *[("raw_moments", False)] * 2,
        *[("gaussian_each", True)] * 3,
    ]
    assert [entry["clip"] is None for entry in entries] == [True, True, False, False, False]  # what is not clipped is not said to be
    for answer in (adversaries.epsilon_release(header, entries), adversaries.epsilon_server(header, entries)):
        assert answer.epsilon is None and "raw moments" in answer.reason


def test_raw_gradients_without_privacy_are_a_diagnostic(configured, tmp_path):
    results = run.train(configured("run", "codec.prior=real", "privacy.enabled=false", "seed=3"))
    assert results["epsilon"]["why_not_private"] == ["privacy disabled", "fixed seed"]
    assert [entry["mechanism"] for entry in read_ledger(tmp_path / "run" / "ledger.jsonl")[1]] == ["raw_gradients", "gaussian", "gaussian"]


# -- refusals ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=dp_fedlora:publishd"], "method=dp_fedlora:publishd: expected one of dp_fedlora, dp_fedlora:published; did you mean"),
        (["method=fedit:published"], "method=fedit:published: expected fedit, which has one form alone"),
        (["method=dp_fedlorra"], "did you mean dp_fedlora"),
        (["codec.prior=real"], "its training set is a release"),
        (["codec.prior=real", "privacy.enabled=false", "codec.fit_at=client"], "do not hold one another's gradients"),
        (["privacy.stage1_share=0", "codec.prior=moments"], "expected a share above 0"),
        (["federation.weights=examples"], "expected uniform with privacy.enabled=true"),
        (["privacy.calibration=gdp"], "expected one of exact, pld, rdp, rdp_classic, or a :published method"),
        (["privacy.calibration=classic"], "or a :published method"),
        (["privacy.calibration=exactly"], "privacy.calibration=exactly: expected one of exact, classic, pld"),
        (["privacy.calibration=rdp", "privacy.target.adversary=server"], "privacy.calibration=rdp: expected exact"),
        (["privacy.clip.groups=matrix"], "expected privacy.clip.mode=fixed, and codec.family=identity or privacy.noise_in=update"),
        (["privacy.clip.groups=head"], "expected one of joint, matrix, layer, kind"),
        (["method=full_noise", "privacy.clip.groups=kind", "privacy.clip.mode=adaptive"], "expected privacy.clip.mode=fixed"),
        (["privacy.clip.of=state"], "expected codec.family=identity"),
        (["method=dp_lora:published", "privacy.unit=user", *USERS[1:]], "expected uniform with privacy.unit=user"),
        (["method=cg_fedllm:published", "codec.real_share=0"], "codec.real_share=0"),
        (["method=fed_sb", "lora.init=random"], "lora.init=random: method=fed_sb fixes lora.init=public"),
        (["privacy.noise=local", "method=ew_tune"], "privacy.noise=local: method=ew_tune fixes privacy.noise=central"),
        (["method=full_noise", "codec.code_size=64"], "codec.code_size=64: method=full_noise fixes codec.code_size=null"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(overrides, message, configured):
    with pytest.raises(UserError) as error:
        configured("run", *overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_published_run_is_not_stopped_and_a_corrected_one_is(configured, tmp_path, monkeypatch):
    """Twice the rounds that the noise was calibrated for."""
    real = run.calibrate
    for method, rounds in (("cg_fedllm:published", 4), ("cg_fedllm", 2)):
        config = configured(method.replace(":", "-"), f"method={method}", "federation.rounds=4", "seed=3")

        def of_half(config, *sizes):
            config.federation.rounds = 2
            found = real(config, *sizes)
            config.federation.rounds = 4
            return found

        monkeypatch.setattr(run, "calibrate", of_half)
        assert run.train(config)["rounds"] == rounds


def test_a_claim_does_not_ask_which_adversary_the_target_binds(configured, tmp_path):
    made = {}
    for adversary in ("release", "server"):
        run.train(configured(adversary, "method=dp_lora:published", f"privacy.target.adversary={adversary}", "federation.rounds=1"))
        made[adversary] = read_ledger(tmp_path / adversary / "ledger.jsonl")[1][0]["noise_multiplier"]
    assert made["release"] == made["server"]


def test_sound_calibrations_spend_no_more_than_the_target(configured, tmp_path):
    spent = {}
    for name in ("exact", "pld", "rdp"):
        results = run.train(configured(name, "method=full_noise", f"privacy.calibration={name}", "seed=3", "federation.rounds=1"))
        spent[name] = results["epsilon"]["release"]["epsilon"]
    assert spent["rdp"] < spent["exact"] == spent["pld"] <= 8


def test_groups_under_the_noise_of_one_joint_clip(configured, tmp_path):
    """clip.norm=auto shares the joint clip out over the groups: the noise is that of the joint clip."""
    spread = {}
    for by in ("joint", "kind", "layer", "matrix"):
        run.train(configured(by, "method=full_noise", f"privacy.clip.groups={by}", "seed=3", "federation.rounds=1"))
        entry = read_ledger(tmp_path / by / "ledger.jsonl")[1][0]
        spread[by] = (entry["clip_groups"], entry["clip"] * math.sqrt(entry["clip_groups"]), entry["noise_multiplier"])
    assert [count for count, _, _ in spread.values()] == [1, 2, 2, 8]
    assert len({round(norm, 9) for _, norm, _ in spread.values()}) == len({z for _, _, z in spread.values()}) == 1


GROUPED = [["privacy.noise_in=update"], ["method=full_noise", *USERS], ["method=full_noise", "privacy.noise=central"]]


@pytest.mark.parametrize("more", GROUPED)
def test_groups_go_with_every_place_of_the_noise(more, configured, tmp_path):
    results = run.train(configured("run", "privacy.clip.groups=kind", "privacy.clip.norm=0.05", "seed=3", *more))
    entry = read_ledger(tmp_path / "run" / "ledger.jsonl")[1][0]
    assert (entry["clip_groups"], entry["clip"]) == (2, 0.05) and 7.9 < results["epsilon"]["release"]["epsilon"] <= 8


def test_old_ledgers_read_as_they_did(once):
    header, entries = ledger(once, "full_noise")
    old_header = {key: value for key, value in header.items() if key != "claimed"}
    old_entries = [{key: value for key, value in entry.items() if key not in ("clip_groups", "largest_weight")} for entry in entries]
    for epsilon in (adversaries.epsilon_release, adversaries.epsilon_server):
        assert epsilon(old_header, old_entries) == epsilon(header, entries)
    assert run_report("old", old_header, old_entries)["claimed"] is None


def test_a_variant_survives_the_saved_config(once):
    _, folder, _ = once("dp_fedlora:published")
    config = load_config(folder / "config.yaml")
    assert (config.method, config.privacy.clip.of, config.privacy.calibration) == ("dp_fedlora:published", "state", "classic")
