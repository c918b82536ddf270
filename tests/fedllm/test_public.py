"""Gradients of public text: which examples, with which labels."""

import numpy as np
import pytest
import torch

from dr_encoder.codecs import CODECS
from dr_encoder.layout import AdapterLayout
from fedllm import federation, priors, public, run
from fedllm.data import generated
from fedllm.setting import build, load_task, make_objective
from fedllm.training.engine import Encoded

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def trained(configured):
    """A setting whose adapter is off LoRA's start, where the model's prediction is not even."""
    setting = build(configured(), 3)
    noise = torch.randn(setting.engine.layout.size, generator=torch.Generator().manual_seed(1))
    setting.engine.load(setting.engine.adapter() + 0.5 * noise)
    return setting


def by_hand(setting, example, target):
    """Gradient of one example's loss by the engine's own loop of one."""
    data = Encoded([setting.public.tokens[example]], np.array([target]))
    return next(setting.engine.updates(data, [np.array([0])]))[1][0]


def test_probabilities_are_the_losses_of_every_label(trained):
    engine, data = trained.engine, trained.public[:7]
    found = engine.probabilities(data)
    for label in (0, 1):
        losses = [engine.evaluate(Encoded([tokens], np.array([label]))).loss for tokens in data.tokens]
        assert torch.allclose(found[:, label], torch.tensor(losses, dtype=torch.float64).neg().exp(), atol=1e-6)
    assert (found - 0.5).abs().max() > 0.05  # or nothing is drawn from


def test_labels_are_drawn_from_the_prediction(trained, monkeypatch):
    even, rng = torch.tensor([[0.1, 0.6, 0.3]]).double(), np.random.default_rng(0)
    monkeypatch.setattr(trained.engine, "probabilities", lambda data: even.expand(len(data), 3))
    data = Encoded([[1]] * 20_000, np.zeros(20_000, np.int64))
    shares = np.bincount(public.drawn_labels(trained.engine, data, rng), minlength=3) / len(data)
    assert np.allclose(shares, even, atol=0.015)
    certain = torch.tensor([[0.0, 0.0, 1.0]]).double()
    monkeypatch.setattr(trained.engine, "probabilities", lambda data: certain.expand(len(data), 3))
    assert (public.drawn_labels(trained.engine, data, rng) == 2).all()


def off(found, wanted):
    """The largest difference beside the largest number: sums of another batch differ in the last bits, those of large numbers by more."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def test_each_gradient_is_of_its_drawn_label(trained, configured, monkeypatch):
    """Every row is its example's gradient with the label that was drawn for it, and without drawing with the text's random one."""
    given = []
    real = public.drawn_labels
    monkeypatch.setitem(public.LABELS, "model", lambda *args: given.append(real(*args)) or given[-1])
    drawn, plain = (public.gradients(trained, configured("run", f"codec.public_labels={labels}"), 3, 0) for labels in ("model", "random"))
    chosen = np.random.default_rng([3, 2, 0]).permutation(len(trained.public))[:30]
    assert (given[0] != trained.public.targets[chosen]).any()
    for rows, labels in ((drawn, given[0]), (plain, trained.public.targets[chosen])):
        for row, example, label in zip(torch.cat([rows.held_out, rows.fit]), chosen, labels, strict=True):
            assert off(row, by_hand(trained, example, label)) < 1e-3
            assert off(row, by_hand(trained, example, 1 - label)) > 0.5


def test_the_same_seed_and_model_give_the_same_gradients(trained, configured):
    config = configured("run", "codec.public_labels=model")
    first, again, other = (public.gradients(trained, config, 3, number).fit for number in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("overrides", [[], ["codec.fit_at=client"], ["codec.prior=moments"]])
def test_runs_with_the_models_own_labels(overrides, configured, no_plot):
    results = run.train(configured("run", "codec.public_labels=model", *overrides))
    assert results["rounds"] == 2 and results["epsilon"]["private"]


LABELLED = [
    "task.public=generated",
    "task.generate.prompt=a {label} film of {words}",
    "task.generate.count=40",
    "task.generate.max_new_tokens=6",
    "codec.public_labels=given",
]


def test_given_labels_are_those_the_text_was_written_for(configured, own_cache, monkeypatch):
    written = ["film " * (1 + i // 2) + ("bad", "good")[i % 2] for i in range(40)]
    monkeypatch.setattr(generated, "write", lambda *args: iter([written]))
    setting = build(configured("run", *LABELLED, "task.max_length=32"), 3)
    config = configured("other", *LABELLED, "task.max_length=32")
    _, encode = make_objective(config, setting.tokenizer, load_task(config).train.label_names)
    order = np.random.default_rng([3, 1]).permutation(40)
    assert setting.public.targets.tolist() == [i % 2 for i in order]
    assert setting.public.tokens == encode([written[i] for i in order])


def test_a_warm_start_is_adam_on_the_public_text(configured, own_cache):
    config = configured("run", *LABELLED, "federation.warm_start={steps: 4, lr: 0.01, examples: 20}")
    setting, twin = build(config, 3), build(config, 3)
    before = setting.engine.evaluate(setting.public).loss
    found = public.warm_start(setting, config, 3, lambda count: None)
    assert torch.equal(found, setting.engine.adapter()) and setting.engine.evaluate(setting.public).loss < before - 0.005
    weights = twin.engine.adapter().requires_grad_()
    adam = torch.optim.Adam([weights], lr=0.01, eps=config.federation.server.tau)
    for step in range(4):
        chosen = np.random.default_rng([3, 6, step]).permutation(len(twin.public))[:20]
        data = Encoded([twin.public.tokens[i] for i in chosen], twin.public.targets[chosen])
        weights.grad = next(twin.engine.updates(data, [np.arange(20)]))[1][0] / 20
        adam.param_groups[0]["lr"] = 0.01 * (1 - step / 4)
        adam.step()
        twin.engine.load(weights.detach().clone())
    assert off(found, weights.detach()) < 1e-3


STILL = ["federation.server.lr=1e-9"]  # rounds that move nothing


@pytest.mark.parametrize(
    "overrides",
    [
        STILL,
        ["method=full_noise", "codec.code_size=null", *STILL],
        ["method=flora", "codec.code_size=null", "privacy.enabled=false", "federation.local.lr=1e-9"],
    ],
)
def test_rounds_begin_where_the_warm_start_ends(overrides, configured, own_cache, no_plot):
    first = ["seed=5", "federation.rounds=1", *LABELLED, *overrides]
    start = "federation.warm_start={steps: %d, lr: 0.01, examples: 20}"
    plain, warm = (run.train(configured(f"run{steps}", *first, start % steps)) for steps in (0, 3))
    assert plain["loss_start"] is None and plain["accuracy_start"] is None
    assert warm["loss_before"] == plain["loss_before"] == pytest.approx(plain["loss"], rel=1e-5)
    assert warm["loss_start"] != pytest.approx(warm["loss_before"], rel=1e-4)
    assert warm["loss"] == pytest.approx(warm["loss_start"], rel=1e-5)
    assert warm["history"][0]["loss"] != plain["history"][0]["loss"]
    assert warm["epsilon"]["release"]["epsilon"] == plain["epsilon"]["release"]["epsilon"]  # it costs nothing


def test_a_resumed_run_keeps_its_warm_start(configured, own_cache, no_plot, monkeypatch, tmp_path):
    settings = ["seed=5", *LABELLED, "federation.warm_start={steps: 3, lr: 0.01, examples: 20}"]
    whole = run.train(configured("whole", *settings))
    with monkeypatch.context() as patch:
        patch.setattr(federation.Federation, "stage2_round", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.train(configured("cut", *settings))
    monkeypatch.setattr(public, "warm_start", lambda *args: pytest.fail("started again"))
    again = run.resume(tmp_path / "cut")
    assert again["loss_start"] == whole["loss_start"] and again["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_earlier_gradients_weigh_half_with_every_refit():
    layout = AdapterLayout.of([("A", torch.zeros(4, 5)), ("B", torch.zeros(5, 4))])
    batches = [torch.randn(count, 40, generator=torch.Generator().manual_seed(count)) * scale for count, scale in ((3, 1), (5, 9), (4, 2))]
    past = priors.Past()
    for rows in [torch.ones(2, 40), *batches[:2]]:
        past.keep(rows, 2)
    past = priors.Past.from_state(past.state())
    found = priors.build("public", None, priors.Given(layout, batches[2], past, 0))
    shapes = [rows.T @ rows / rows.square().sum() for rows in batches]
    expected = (shapes[0] + 2 * shapes[1] + 4 * shapes[2]) / 7
    moment = found.rows.T @ found.rows
    assert torch.allclose(moment / moment.trace(), expected, atol=1e-6) and found.name == "public"
    past.keep(batches[2], 0)
    assert past.gradients == [] and past.state() == {}


def test_past_gradients_and_codes_survive_a_checkpoint():
    past = priors.Past()
    layout = AdapterLayout.of([("A", torch.zeros(1, 3))])
    past.add(CODECS["identity"].fit(None, layout, None, 0.0, 0), torch.ones(3), 0.5)
    assert past.noise == [0.75]
    for number in range(12):  # two digits: in their order, not that of their names
        past.keep(torch.full((1, 3), float(number)), 11)
    again = priors.Past.from_state(past.state())
    assert [float(rows[0, 0]) for rows in again.gradients] == list(range(1, 12))
    assert torch.equal(again.updates[0], past.updates[0]) and again.noise == past.noise


def test_a_run_remembers_public_gradients(configured, no_plot):
    plain, remembered = (
        run.train(configured(f"run{memory}", "seed=5", "codec.refresh=1", "federation.rounds=3", f"codec.public_memory={memory}"))
        for memory in (0, 2)
    )
    losses = [[record["loss"] for record in results["history"]] for results in (plain, remembered)]
    assert losses[0][:2] == losses[1][:2] and losses[0][2:] != losses[1][2:]
