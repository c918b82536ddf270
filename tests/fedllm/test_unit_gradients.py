"""Per-unit gradients in shared batches equal a loop of one unit at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from dr_encoder.layout import AdapterLayout
from fedllm.adapters import TRAINED, add_adapter
from fedllm.data.batches import make_batches
from fedllm.training import engine as engines
from fedllm.training.engine import Encoded, TorchEngine
from fedllm.training.objectives import ClassHead, LabelWords, NextToken
from fedllm.training.unit_gradients import UnitGradients
from tests.fedllm.tiny_models import tiny_bert, tiny_glm, tiny_gpt2, tiny_llama, tiny_roberta

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = [np.array(unit, dtype=np.int64) for unit in ([0], [1, 2, 3], [], [4, 5], [6, 7, 8, 9, 10], [11, 0])]


KINDS = {
    "labels": (tiny_llama, ["q_proj", "v_proj", "down_proj"], LabelWords([7, 9, 4]), "left"),
    "text": (tiny_llama, ["q_proj", "k_proj", "o_proj"], NextToken(), "left"),
    "text, gpt2": (tiny_gpt2, ["c_attn"], NextToken(), "left"),
    "labels, glm": (tiny_glm, ["q_proj", "v_proj"], LabelWords([7, 9, 4]), "left"),
    "classify": (tiny_bert, ["query", "value"], ClassHead(), "right"),
    "classify, roberta": (tiny_roberta, ["query", "value"], ClassHead(), "right"),
}


def make_engine(kind: str, batch_tokens: int = 40, **adapter) -> TorchEngine:
    base, targets, objective, side = KINDS[kind]
    model = add_adapter(base(), kind.split(",")[0], r=2, alpha=4, targets=targets, **adapter)
    engine = TorchEngine(model, objective, pad_id=0, batch_tokens=batch_tokens, side=side)
    start = engine.adapter() + 0.1 * torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(1))  # B is zero no longer
    engine.load(start)
    return engine


@pytest.fixture(scope="module")
def data() -> Encoded:
    draw = np.random.default_rng(2)
    tokens = [draw.integers(1, 50, draw.integers(2, 15)).tolist() for _ in range(12)]
    return Encoded(tokens, draw.integers(0, 3, 12))


def one_by_one(engine: TorchEngine, data: Encoded, unit: np.ndarray) -> torch.Tensor:
    """Gradient of one unit's mean loss by plain autograd, example after example, without padding and without hooks."""
    total = torch.zeros(engine.layout.size, dtype=torch.float64)
    for example in unit:
        for parameter in engine.parameters.values():
            parameter.grad = None
        batch = next(make_batches([data.tokens[example]]))
        losses, _ = engine.objective(engine.model, batch, torch.tensor([data.targets[example]]))
        losses.mean().backward()
        total += engine.layout.flatten({name: value.grad for name, value in engine.parameters.items()}).double() / len(unit)
    return total


def all_updates(engine, data, units, *args) -> torch.Tensor:
    rows = list(engine.updates(data, units, *args))
    assert [i for where, _ in rows for i in range(*where.indices(len(units)))] == list(range(len(units)))
    return torch.cat([updates for _, updates in rows])


def assert_rows_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    for row, wanted in zip(found.double(), expected.double(), strict=True):
        assert (row - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("train", list(TRAINED))
@pytest.mark.parametrize("kind", list(KINDS))
def test_shared_batches_equal_one_unit_at_a_time(kind, train, data):
    engine = make_engine(kind, train=train)
    found = all_updates(engine, data, UNITS)
    expected = torch.stack([one_by_one(engine, data, unit) for unit in UNITS])
    assert (expected.norm(dim=1) > 0).tolist() == [len(unit) > 0 for unit in UNITS]
    assert_rows_equal(found, expected)
    for factor in engine.layout.factors:  # no factor hides in another's shadow
        part = slice(factor.offset, factor.stop)
        assert_rows_equal(found[:, part], expected[:, part], 1e-4)


@pytest.mark.parametrize("kind", ["classify", "classify, roberta"])
def test_a_heads_logits_are_the_models_own(kind, data):
    """Of each text alone, with the positions that the model gives it: RoBERTa's are not counted from zero."""
    engine = make_engine(kind)
    batch = next(make_batches(data.tokens, side="right"))
    assert len(batch.index) == len(data.tokens)
    with torch.no_grad():
        found = engine.objective.logits(engine.model, batch)
        own = [engine.model(input_ids=torch.tensor([data.tokens[i]])).logits[0] for i in batch.index]
    torch.testing.assert_close(found, torch.stack(own), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_batch_budget_and_the_chunks_change_nothing(kind, data, monkeypatch):
    expected = all_updates(make_engine(kind), data, UNITS)
    assert_rows_equal(all_updates(make_engine(kind, batch_tokens=2048), data, UNITS), expected)
    engine = make_engine(kind)
    monkeypatch.setattr(engines, "CHUNK_BYTES", 4 * engine.layout.size * 2)
    assert [len(updates) for _, updates in engine.updates(data, UNITS)] == [2, 2, 2]
    assert_rows_equal(all_updates(engine, data, UNITS), expected)
    monkeypatch.setattr(engines, "CHUNK_BYTES", 1)
    assert_rows_equal(all_updates(engine, data, UNITS), expected)


@pytest.mark.parametrize("kind", list(KINDS))
def test_several_local_steps_equal_plain_sgd(kind, data):
    engine, plain = make_engine(kind), make_engine(kind)
    before = engine.adapter()
    found = all_updates(engine, data, UNITS, 3, 0.3)
    assert torch.equal(engine.adapter(), before)  # put back
    for row, unit in zip(found, UNITS, strict=True):
        plain.load(before)
        for _ in range(3 if len(unit) else 0):
            plain.load(plain.adapter() - 0.3 * one_by_one(plain, data, unit).float())
        path = before - plain.adapter()
        assert (row - path).norm() <= 1e-4 * path.norm()
    drawn = [unit if len(unit) < 2 else np.stack([unit[:2], unit[-2:], unit[:2]]) for unit in UNITS]  # other examples in each step
    for row, unit in zip(all_updates(engine, data, drawn, 3, 0.3), drawn, strict=True):
        plain.load(before)
        for step in range(3 if len(unit) else 0):
            examples = unit[step] if unit.ndim == 2 else unit
            plain.load(plain.adapter() - 0.3 * one_by_one(plain, data, examples).float())
        path = before - plain.adapter()
        assert (row - path).norm() <= 1e-4 * path.norm()
    one = all_updates(engine, data, UNITS, 1, 0.3)
    assert torch.allclose(one, 0.3 * all_updates(engine, data, UNITS), atol=1e-7)
    assert (found - 3 * one).norm() > 1e-3 * found.norm()  # the path does bend


def test_fedprox_draws_each_step_back_to_the_start(data):
    """Against autograd on the loss with the proximal term itself."""
    engine, plain, mu = make_engine("labels"), make_engine("labels"), 0.8
    start = engine.adapter()
    found = all_updates(engine, data, UNITS, 3, 0.3, mu)
    for row, unit in zip(found, UNITS, strict=True):
        here = start.clone().requires_grad_()
        for _ in range(3 if len(unit) else 0):
            plain.load(here.detach())
            (distance,) = torch.autograd.grad(mu / 2 * (here - start).square().sum(), here)
            here = (here - 0.3 * (one_by_one(plain, data, unit).float() + distance)).detach().requires_grad_()
        assert (row - (start - here.detach())).norm() <= 1e-4 * row.norm()
    free = all_updates(engine, data, UNITS, 3, 0.3)
    assert torch.equal(all_updates(engine, data, UNITS, 3, 0.3, 0.0), free)
    assert 0 < found[1].norm() < 0.9 * free[1].norm()
    assert torch.equal(all_updates(engine, data, UNITS, 1, 0.3, mu), all_updates(engine, data, UNITS, 1, 0.3))


def test_a_unit_does_not_depend_on_the_others(data):
    """The ground of per-unit sensitivity: whoever is in the batch, a unit's update is its own."""
    engine = make_engine("labels")
    alone = all_updates(engine, data, [UNITS[1]])
    assert_rows_equal(all_updates(engine, data, UNITS)[1:2], alone)
    spoiled = Encoded(data.tokens[:4] + [[1] * 30] * 8, data.targets)
    assert_rows_equal(all_updates(engine, spoiled, UNITS)[1:2], alone)


def test_no_units_and_only_empty_units(data):
    engine = make_engine("labels")
    assert list(engine.updates(data, [])) == []
    assert not all_updates(engine, data, [UNITS[2], UNITS[2]]).any()


def test_nothing_is_left_behind(data):
    engine = make_engine("labels")
    all_updates(engine, data, UNITS)
    assert all(value.grad is None for value in engine.parameters.values())
    before = engine.evaluate(data)
    assert engine.evaluate(data) == before
    losses, _ = engine.objective(engine.model, next(make_batches(data.tokens[:1])), torch.tensor([0]))
    losses.sum().backward()  # outside `updates` the hooks collect nothing and break nothing


def test_evaluation_is_the_mean_over_examples_whatever_the_batches(data):
    engine, wide = make_engine("labels"), make_engine("labels", batch_tokens=4096)
    losses, right = [], []
    with torch.no_grad():
        for example in range(12):
            loss, correct = engine.objective(
                engine.model, next(make_batches([data.tokens[example]])), torch.tensor([data.targets[example]])
            )
            losses.append(float(loss))
            right.append(bool(correct))
    for found in (engine.evaluate(data), wide.evaluate(data)):
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-5) and found.accuracy == np.mean(right)
    assert make_engine("text").evaluate(data).accuracy is None


def test_label_words_are_the_models_own_logits(data):
    engine = make_engine("labels")
    batch = next(make_batches(data.tokens))
    with torch.no_grad():
        logits = engine.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits
        targets = torch.from_numpy(data.targets[batch.index])
        expected = nn.functional.cross_entropy(logits[:, -1, [7, 9, 4]].float(), targets, reduction="none")
        assert torch.allclose(engine.objective(engine.model, batch, targets)[0], expected, atol=1e-5)


def test_next_token_loss_is_transformers_own(data):
    engine = make_engine("text")
    ids = torch.tensor([data.tokens[3]])
    with torch.no_grad():
        expected = engine.model(input_ids=ids, labels=ids).loss
        found, _ = engine.objective(engine.model, next(make_batches([data.tokens[3]])), torch.zeros(1))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_a_bias_is_collected_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    layout = AdapterLayout.of(model.named_parameters())
    gradients = UnitGradients(model, layout)
    inputs = torch.randn(5, 3)
    gradients.begin(2)
    gradients.batch(torch.tensor([1, 0, 1, 1, 0]))
    model(inputs).square().sum().backward()
    found = gradients.end()
    for unit, rows in enumerate(([1, 4], [0, 2, 3])):
        model.zero_grad()
        model(inputs[rows]).square().sum().backward()
        expected = layout.flatten({name: value.grad for name, value in model.named_parameters()})
        assert torch.allclose(found[unit], expected, atol=1e-5)


def test_a_trainable_parameter_elsewhere_is_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"in linear layers only, found 1\.bias in a LayerNorm"):
        UnitGradients(model, AdapterLayout.of(model.named_parameters()))
