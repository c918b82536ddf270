"""Fixed factors from public gradients: they span what the full gradients span, and the model begins unchanged."""

import numpy as np
import pytest
import torch

from fedllm.adapters import TRAINED, add_adapter
from fedllm.data.batches import make_batches
from fedllm.errors import UserError
from fedllm.lora_layers import lora_layers
from fedllm.training import public_start as starts
from fedllm.training.engine import Encoded, TorchEngine
from fedllm.training.objectives import ClassHead, LabelWords
from fedllm.training.public_start import public_start
from tests.fedllm.tiny_models import tiny_bert, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES, R = 24, 3
KINDS = {
    "labels": (tiny_llama, ["q_proj", "v_proj", "down_proj"], LabelWords([7, 9, 4]), "left"),
    "classify": (tiny_bert, ["query", "value"], ClassHead(), "right"),
}


def make_engine(kind: str, train: str = "core", r: int = R) -> TorchEngine:
    base, targets, objective, side = KINDS[kind]
    model = add_adapter(base(), kind, r=r, alpha=4, targets=targets, train=train)
    return TorchEngine(model, objective, pad_id=0, batch_tokens=60, side=side)


@pytest.fixture(scope="module")
def public() -> Encoded:
    draw = np.random.default_rng(2)
    tokens = [draw.integers(1, 50, draw.integers(3, 15)).tolist() for _ in range(EXAMPLES)]
    return Encoded(tokens, draw.integers(0, 3, EXAMPLES))


def full_gradients(kind: str, public: Encoded) -> dict[str, torch.Tensor]:
    """Gradient of each example with respect to each target's own weight [examples, out, in], one at a time by autograd."""
    engine = make_engine(kind)
    weights = {name: layer.base_layer.weight.requires_grad_() for name, layer in lora_layers(engine.model).items()}
    rows = {name: [] for name in weights}
    for i in range(EXAMPLES):
        losses, _ = engine.objective(engine.model, next(make_batches(public.tokens[i : i + 1])), torch.tensor(public.targets[i : i + 1]))
        for name, gradient in zip(weights, torch.autograd.grad(losses.sum(), list(weights.values())), strict=True):
            rows[name].append(gradient)
    return {name: torch.stack(found).double() for name, found in rows.items()}


def kept(stacked: torch.Tensor, basis: torch.Tensor) -> float:
    """Energy of the rows of `stacked` in the span of `basis` (orthonormal rows), over the most that as many directions can keep."""
    most = torch.linalg.svdvals(stacked)[: len(basis)].square().sum()
    return float((stacked @ basis.double().T).square().sum() / most)


@pytest.mark.parametrize(("oversampling", "least"), [(4, 0.999), (0, 0.9)])  # all of 16 or 20 of 32 directions; 8
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_factors_span_what_public_gradients_span(kind, oversampling, least, public, monkeypatch):
    monkeypatch.setattr(starts, "OVERSAMPLING", oversampling)
    engine = make_engine(kind)
    random = {name: layer.lora_A["default"].weight.clone() for name, layer in lora_layers(engine.model).items()}
    before = engine.evaluate(public)
    fixed = public_start(engine, public, EXAMPLES, seed=5)
    assert engine.evaluate(public) == before  # the cores are zero
    assert len(fixed) == 2 * len(random)
    for name, gradients in full_gradients(kind, public).items():
        a, b = (fixed[f"{name}.lora_{side}.default.weight"].detach() for side in "AB")
        for factor, stacked in ((a, gradients.flatten(0, 1)), (b.T, gradients.transpose(1, 2).flatten(0, 1))):
            assert torch.allclose(factor @ factor.T, torch.eye(R), atol=1e-5)
            assert kept(stacked, factor) > least
        assert kept(gradients.flatten(0, 1), random[name]) < 0.8


@pytest.mark.parametrize("train", list(TRAINED))
def test_what_is_fixed_is_told_and_follows_from_the_seed(train, public):
    found = []
    for seed in (5, 5, 6):
        engine = make_engine("labels", train)
        fixed = public_start(engine, public, 10, seed)
        assert {key.rpartition(".lora_")[2][0] for key in fixed} == {"both": set(), "b": {"A"}, "core": {"A", "B"}}[train]
        found.append([layer.lora_A["default"].weight.clone() for layer in lora_layers(engine.model).values()])
        if train != "core":
            assert not any(layer.lora_B["default"].weight.any() for layer in lora_layers(engine.model).values())
    assert all(torch.equal(one, same) for one, same in zip(*found[:2], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(found[0], found[2], strict=True))


def test_no_hook_stays_behind(public):
    engine = make_engine("labels")
    plain = make_engine("labels")
    units = [np.array([0, 1]), np.array([2])]
    public_start(engine, public, 10, 5)
    for name, layer in lora_layers(plain.model).items():
        with torch.no_grad():
            for ours, theirs in zip(layer.parameters(), engine.model.get_submodule(name).parameters(), strict=True):
                ours.copy_(theirs)
    found, expected = (torch.cat([rows for _, rows in each.updates(public, units)]) for each in (engine, plain))
    assert torch.equal(found, expected)
    assert not any(layer._forward_hooks for name, layer in lora_layers(engine.model).items())


def test_a_rank_above_a_side_is_refused(public):
    with pytest.raises(UserError, match=r"lora\.r=9: expected at most 8, .*v_proj, with lora\.init=public"):
        public_start(make_engine("labels", "both", r=9), public, 10, 5)
