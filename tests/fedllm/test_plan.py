"""`fedllm plan` against real runs of the tiny model, closed forms, and the papers' configs."""

import contextlib
import math
import re
from pathlib import Path

import pytest
import torch

from dr_encoder.layout import AdapterLayout
from fedllm import plan as planning
from fedllm import plan_privacy, run
from fedllm.config import load_config
from fedllm.errors import UserError
from fedllm.plan import Question, plan
from fedllm.plan_memory import Ranks
from fedllm.plan_privacy import bisect, least, needs, noise_to_signal
from fedllm.privacy.calibration import Calibration
from tests.fedllm.runs import AUTOENCODER, SETTINGS, USERS

LAYOUT = AdapterLayout.of([("layers.0.q.lora_A", torch.zeros(2, 16)), ("layers.0.q.lora_B", torch.zeros(16, 2))])
N = 224  # numbers that scripts/tiny_model.py trains
PAPER = Path(__file__).parents[2] / "configs" / "paper"


@contextlib.contextmanager
def phase(text, total=None):
    yield lambda count: None


@pytest.fixture
def quick(monkeypatch):
    """No search for a needed cohort."""
    monkeypatch.setattr(planning, "needs", lambda *_: None)


CASES = {
    "public": SETTINGS["public"],
    "moments": SETTINGS["moments"],
    "mixture": [*SETTINGS["mixture"], "codec.refresh=2"],
    "users": [*USERS, "privacy.noise=local"],
    "autoencoder": [*AUTOENCODER, "codec.prior=moments", "privacy.noise=central"],
    "full_noise": ["method=full_noise"],
    "fedit": ["method=fedit", "codec.fit_at=client"],
    "chain": ["codec.family=chain", "codec.parts=[allocation,linear]", "privacy.noise=local"],
    "dp_lora": ["method=dp_lora:published"],
    "dr_encoder": ["method=dr_encoder:published", "codec.fit_steps=1"],
    "cg_fedllm": ["method=cg_fedllm", "codec.fit_steps=1"],
    "server": ["privacy.target.adversary=server", "privacy.target.epsilon=50", "codec.family=sketch"],
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_the_run_then_does(name, configured, quick, no_plot, one_thread):
    config = configured(name, *CASES[name])
    results = run.train(config)
    rate = config.federation.unit_sampling_rate
    found = plan(config, Question(units=round(results["expected_cohort"] / rate) if rate else None), phase)
    assert found["trainable_parameters"] == results["parameters"] and found["code_size"] == results["code_size"]
    assert found["bytes"]["update"] == results["update_bytes"]
    assert found["bytes"]["message"] == pytest.approx(results["uplink_bytes_per_client_round"], abs=16)  # the digits of the clip norm
    assert found["bytes"]["down"] == pytest.approx(results["downlink_bytes_per_client_round"], rel=0.1, abs=500)
    assert found["bytes"]["codec"] == pytest.approx(results["codec_bytes"], rel=0.1, abs=6000)  # the header of a small file
    assert found["expected_cohort"] == pytest.approx(results["expected_cohort"])
    for adversary in ("release", "server"):
        expected = results["epsilon"][adversary]["epsilon"]
        answer = found["privacy"][adversary]
        assert answer["epsilon"] == (None if expected is None else pytest.approx(expected, rel=1e-6))
        assert all(answer[key] == results["epsilon"][adversary][key] for key in ("relation", "reason", "kind", "accountant"))
        stage2 = {row["round"]: row[adversary] for row in found["privacy"]["by_round"] if row["stage"] == "stage2"}
        for row in results["history"][1:]:
            assert stage2.get(row["round"]) == (row[f"epsilon_{adversary}"] and pytest.approx(row[f"epsilon_{adversary}"], rel=1e-6))


def test_memory_adds_up(configured, quick):
    held = plan(configured("run", "codec.public_examples=59"), Question(), phase)["memory"]
    rows = 4 * 59 * N
    batch = held["activations"] + held["working"]
    assert held["public_gradients"] == rows
    assert held["total"] == held["weights"] + held["optimizer"] + batch + held["updates"] + held["codec"]
    assert held["activations_checkpointed"] < held["activations"] and held["peak_in"] in ("public gradients", "local training")
    checkpointed = plan(configured("run"), Question(ranks=Ranks(checkpointing=True)), phase)["memory"]
    assert checkpointed["activations"] == held["activations_checkpointed"]


def spec(config, units=40, z=0.5, size=8):
    return plan_privacy.planned_sums(run.resolve(config), Calibration(None, z, 8.0), units, size, LAYOUT)[-1]


def test_noise_to_signal_is_its_formula(configured):
    """z C sqrt(k) / m over C sqrt(a + (1 - a) / m), whatever C."""
    for norm in ("auto", "7.5"):
        planned = spec(configured("run", f"privacy.clip.norm={norm}"), z=0.5, size=16)
        assert noise_to_signal(planned, 1.0) == pytest.approx(0.5 * 4 / 10)
        assert noise_to_signal(planned, 0.1) == pytest.approx(0.5 * 4 / 10 / math.sqrt(0.1 + 0.9 / 10))
    assert noise_to_signal(spec(configured("run", "privacy.noise=local"), size=16), 1.0) == pytest.approx(
        0.5 * math.sqrt(spec(configured("run")).shares) * 4 / 10
    )
    assert noise_to_signal(spec(configured("run", "method=fedit"), z=0.0), 1.0) is None


def test_the_least_number_that_holds():
    assert [bisect(lambda count, at=at: count >= at, 1, 1000) for at in (1, 2, 617, 1000)] == [1, 2, 617, 1000]
    for off in (0.3, 1.0, 4.0):  # how far the rough ratio is off
        found = least(lambda m: 100 / m, lambda m, off=off: off * 90 / m**0.9, 1, 10**6, 0.5)
        assert 200 <= found <= 200 * plan_privacy.STEP + 1
    assert least(lambda m: 0.1, lambda m: 0.1, 3, 50, 0.5) == 3
    assert least(lambda m: 10 / m, lambda m: 10 / m, 1, 15, 0.5) is None
    assert least(lambda m: math.inf, lambda m: 1 / m, 1, 15, 0.5) is None


@pytest.mark.parametrize("power", [0.05, 0.3, 1, 4])
@pytest.mark.parametrize("rough", [lambda m: 100 / m**2, lambda m: 0.01 / m**0.1, lambda m: 1.0 if m < 60 else 0.6, lambda m: 1e-9])
@pytest.mark.parametrize(("low", "high"), [(1, 40), (10, 10**9), (5000, 15_000)])
def test_a_rough_ratio_that_misleads_costs_no_more_than_a_dozen_calibrations(power, rough, low, high):
    for first in (1, 7, 38, 600, 5001, 14_999, 3 * 10**6, 10**9, 10**12):
        asked = []

        def exact(count, first=first, asked=asked):
            asked.append(count)
            return 0.5 * (first / count) ** power if power < 4 else (0.1 if count >= first else math.inf)

        found, answer = least(exact, rough, low, high, 0.5), max(first, low)
        assert found is None if answer > high else answer <= found <= answer * plan_privacy.STEP
        assert len(set(asked)) == len(asked) <= plan_privacy.TRIALS + 12 and all(low <= count <= high for count in asked)


def test_needed_cohort_and_population_reach_the_threshold(configured):
    """With the server's epsilon as target, whose noise is a closed form; by adding one client at a time."""
    target = ["privacy.target.adversary=server", "privacy.target.epsilon=200", "federation.rounds=1", "privacy.target.delta=1e-3"]
    config = run.resolve(configured("run", *target, "federation.clients=100"))
    found = needs(config, 16, LAYOUT, 0.01, 0.5)

    def ratio(clients, cohort):
        sizes = [f"federation.clients={clients}", f"federation.expected_cohort={cohort}"]
        other = run.resolve(configured("run", *target, *sizes))
        return noise_to_signal(spec(other, clients, run.calibrate(other, clients, 1).stage2_multiplier, 16), 0.01)

    first = next(cohort for cohort in range(1, 101) if ratio(100, cohort) <= 0.5)
    assert 1 < first <= found["cohort"] <= first * plan_privacy.STEP + 1
    assert found["population"] == 10  # the server sees who sends: more clients that do not take part change nothing
    assert needs(config, 16_000, LAYOUT, 0.01, 0.5)["population"] is None
    assert needs(run.resolve(configured("run", *USERS)), 16, LAYOUT, 0.01, 0.5)["reason"]


def test_warnings_say_what_will_not_work(configured, quick):
    target = ["privacy.target.adversary=server", "privacy.target.delta=0.1", "privacy.target.epsilon=0.5"]
    config = configured("run", *target, "codec.code_size=auto")
    asked = Question(limit=10**5, ranks=Ranks(20, "clients", 2), threshold=0.1)
    lines = "\n".join(plan(config, asked, phase)["warnings"])
    for text in ("do not fit into 100 kB", "20 ranks for 10 clients", "ZeRO 2 divides nothing", "not below 1/40", "times the signal"):
        assert text in lines
    assert f"longest, {N}" in lines
    calm = plan(configured("run", "privacy.target.adversary=server"), Question(limit=2**30, threshold=100), phase)
    assert calm["warnings"] == [] and calm["memory"]["fits"]


def test_what_cannot_be_planned(configured, tmp_path, quick):
    for overrides, asked, says in (
        (USERS, Question(), "--units"),
        (["codec.code_size=24", "lora.targets=[v_proj]", "lora.r=1", "lora.train=b"], Question(), "expected at most 16"),
        (["codec.family=powersgd", "privacy.enabled=false"], Question(), "what rank 1 takes"),
        ([], Question(model_config=tmp_path), "expected a folder with config.json"),
        (["lora.targets=[z_proj]"], Question(), "no linear module z_proj"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            plan(configured("run", *overrides), asked, phase)


def test_a_model_that_cannot_be_reached_is_planned_from_its_config(configured, quick, tiny, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", _offline(transformers.AutoConfig.from_pretrained))
    config = configured("run", "model.name=nobody/model", "privacy.target.adversary=server")
    with pytest.raises(UserError, match="--model-config FOLDER"):
        plan(config, Question(), phase)
    assert planning.model_folder(config, tiny / "models.yaml") is None
    (tiny / "models").mkdir(exist_ok=True)
    (tiny / "models" / "model").mkdir(exist_ok=True)
    (tiny / "models" / "model" / "config.json").write_bytes((tiny / "model" / "config.json").read_bytes())
    folder = planning.model_folder(config, tiny / "config.yaml")
    assert plan(config, Question(model_config=folder), phase)["trainable_parameters"] == N


def _offline(real):
    def read(source, **more):
        if not Path(source).is_dir():
            raise OSError("no network")
        return real(source, **more)

    return read


CONFIGS = sorted(PAPER.glob("*.yaml"))
SHAPES = {
    "llama-7b": (6_738_415_616, "LlamaForCausalLM"),
    "qwen-7b": (7_721_324_544, "Qwen2ForCausalLM"),
    "roberta-base": (124_647_170, "RobertaForSequenceClassification"),  # with a head
    "gpt2": (124_439_808, "GPT2LMHeadModel"),
    "bert-base": (109_483_778, "BertForSequenceClassification"),
    "glm-4-9b": (9_399_951_360, "GlmForCausalLM"),
}
TRAINED = {"dr-encoder": 8_388_608, "cg-fedllm": 8_388_608, "dp-lora": 4_194_304, "dp-fedlora": 16_777_216, "ew-tune": 887_042}
SMALL = {
    "gpt2": 12 * 8 * (768 + 3 * 768),
    "bert-base": 12 * 2 * 8 * (768 + 768) + 2 * 768 + 2,
    "glm-4-9b": 40 * 8 * (4096 + 4096 + 4096 + 256),
}
UNITS = {"ew-tune": 67_349}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_papers_configs_plan_offline(path, monkeypatch, quick):
    """Sizes of the models and methods; the calibration, which takes seconds, is not looked at here."""
    config = load_config(path)
    monkeypatch.setattr(planning, "calibrate", lambda config, *_: Calibration(1.0, 1.0, 1.0) if config.privacy.enabled else None)
    monkeypatch.setattr(plan_privacy, "POINTS", 1)
    model = next(name for name in SHAPES if path.stem.startswith(name))
    method = path.stem.removeprefix(f"{model}-")
    asked = Question(model_config=planning.model_folder(config, path), units=UNITS.get(method))
    found = plan(config, asked, phase)
    assert (found["parameters"], found["model"]["class"]) == SHAPES[model]
    trained = SMALL.get(model, TRAINED[method])
    assert found["trainable_parameters"] == trained
    assert found["code_size"] == (131_072 if method in ("dr-encoder", "cg-fedllm") else trained)


def test_there_is_a_config_for_each_model_and_method():
    of_clients = {f"{model}-{method}" for model in ("llama-7b", "qwen-7b") for method in TRAINED if method != "ew-tune"}
    assert {path.stem for path in CONFIGS} == of_clients | {"roberta-base-ew-tune"} | {f"{model}-dp-lora" for model in SMALL}


def test_ew_tune_has_the_rate_and_the_rounds_of_its_batches():
    fed = load_config(PAPER / "roberta-base-ew-tune.yaml").federation
    assert fed.unit_sampling_rate == pytest.approx(2000 / UNITS["ew-tune"], rel=1e-5) and fed.rounds == 20 * (UNITS["ew-tune"] // 2000)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_value_says_where_it_is_from(path):
    for line in path.read_text().splitlines():
        if re.match(r"\s*\w+:\s*\S", line) and not line.startswith("#"):
            assert re.search(r"  # (.*our choice|paper|CG-FedLLM)", line), line
