"""Aggregations: what the model is after a round equals an explicit loop over the clients' adapters."""

import math

import pytest
import torch

from dr_encoder.layout import AdapterLayout
from fedllm import aggregation
from fedllm.adapters import add_adapter
from fedllm.aggregation import AGGREGATIONS
from fedllm.schema import ServerConfig
from fedllm.server import ServerOptimizer
from tests.fedllm.tiny_models import logits, tiny_bert, tiny_llama, trainable

SEED, CLIENTS = 11, 5
SCALING = 4 / 2
PRODUCTS = [name for name, cls in AGGREGATIONS.items() if cls.each]


class Server:
    """The part of the loop between messages and model."""

    def __init__(self, name: str, kind: str = "labels"):
        base, targets = (tiny_llama(), ("q_proj", "v_proj")) if kind == "labels" else (tiny_bert(), ("query", "value"))
        self.model = add_adapter(base, kind, r=2, alpha=4, targets=targets, seed=3)
        self.layout = AdapterLayout.of(trainable(self.model).items())
        self.optimizer = ServerOptimizer(self.layout.flatten(trainable(self.model)), ServerConfig("fedavg", 1.0))
        self.aggregation = AGGREGATIONS[name](self.model, self.layout, SEED)
        self.number = 0

    def adapter(self) -> torch.Tensor:
        return self.layout.flatten(trainable(self.model))

    def round(self, updates, expected: float, weights=None, of_state: bool = False) -> None:
        weights = weights or [1.0] * len(updates)
        self.aggregation.begin(self.adapter(), of_state)
        for update, weight in zip(updates, weights, strict=True):
            self.aggregation.add(update, weight)
        mean = (sum(weight * update.double() for update, weight in zip(updates, weights, strict=True)) / expected).float()
        if of_state:
            mean = self.adapter() + mean
        new = self.optimizer.step(self.aggregation.finish(mean, expected, self.number))
        with torch.no_grad():
            for key, view in self.layout.views(new).items():
                trainable(self.model)[key].copy_(view)
        self.number += 1

    def deltas(self) -> dict[str, torch.Tensor]:
        """What each target's weight has been changed by, float64."""
        views = self.layout.views(self.adapter().double())
        dense = {key.removeprefix("dense."): value for key, value in self.aggregation.state().items()}
        names = {key.partition(".lora_A")[0] for key in views if ".lora_A" in key}
        return {
            name: SCALING * views[f"{name}.lora_B.default.weight"] @ views[f"{name}.lora_A.default.weight"]
            + (dense[name].double() if name in dense else 0.0)
            for name in names
        }


def updates(server: Server, number: int, size: float = 0.3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [size * torch.randn(server.layout.size, generator=generator) for _ in range(CLIENTS)]


def product(server: Server, adapter: torch.Tensor, name: str) -> torch.Tensor:
    views = server.layout.views(adapter.double())
    return views[f"{name}.lora_B.default.weight"] @ views[f"{name}.lora_A.default.weight"]


@pytest.mark.parametrize("kind", ["labels", "classify"])
@pytest.mark.parametrize("name", list(AGGREGATIONS))
def test_the_product_is_the_mean_of_the_clients_products(name, kind, monkeypatch):
    """Over three rounds, the messages stacked in chunks of two and one; for the plain mean it is not, which is why the others exist."""
    server = Server(name, kind)
    monkeypatch.setattr(aggregation, "CHUNK_BYTES", 2 * 4 * server.layout.size)
    for number in range(3):
        before, adapter, sent = server.deltas(), server.adapter(), updates(server, number)
        server.round(sent, CLIENTS)
        for target, found in server.deltas().items():
            expected = before[target] - SCALING * product(server, adapter, target)  # the frozen weights,
            for update in sent:
                expected = expected + SCALING * product(server, adapter - update, target) / CLIENTS  # and each client's own product
            error = float((found - expected).norm() / expected.norm())
            assert error < 1e-6 if name in PRODUCTS else error > 1e-2
        head = [key for key in trainable(server.model) if "modules_to_save" in key]
        assert bool(head) == (kind == "classify")
        for key in head:
            mean = server.layout.views(adapter - sum(sent) / CLIENTS)[key]
            assert torch.allclose(server.layout.views(server.adapter())[key], mean, atol=1e-6)


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_divisor_is_the_expected_cohort_and_clients_that_change_nothing_add_nothing(name):
    """The product moves by the sum of the clients' changes over 7.5, whoever else takes part without a change."""
    for idle in (0, 3):
        server = Server(name)
        server.round(updates(server, 0), CLIENTS)
        before, adapter, sent = server.deltas(), server.adapter(), updates(server, 1)
        server.round([*sent, *[torch.zeros(server.layout.size)] * idle], 7.5)
        for target, found in server.deltas().items():
            old = product(server, adapter, target)
            change = SCALING * sum(product(server, adapter - update, target) - old for update in sent) / 7.5
            assert (found - before[target] - change).norm() < 1e-6 * found.norm() and change.norm() > 0.1 * found.norm()


@pytest.mark.parametrize("of_state", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_weighted_messages_and_messages_of_whole_states(name, of_state):
    """Messages that count from zero: as published for DP-FedLoRA, the sum of the products of the states themselves."""
    server, weights = Server(name), [0.5, 2.0, 1.0, 1.5, 0.25]
    server.round(updates(server, 0), CLIENTS)
    before, adapter, sent = server.deltas(), server.adapter(), updates(server, 1)
    origin = torch.zeros_like(adapter) if of_state else adapter
    server.round(sent, 6.0, weights, of_state)
    for target, found in server.deltas().items():
        expected = before[target] - SCALING * (product(server, adapter, target) - product(server, origin, target))
        for update, weight in zip(sent, weights, strict=True):
            change = product(server, origin - update, target) - product(server, origin, target)
            expected = expected + weight * SCALING * change / 6.0
        assert (found - expected).norm() < 1e-6 * expected.norm()


def test_residual_leaves_the_mean_adapter_and_stack_a_new_one():
    for name in PRODUCTS:
        server, plain = Server(name), Server("mean")
        for number in range(2):
            start = server.adapter()
            sent = updates(server, number)
            server.round(sent, CLIENTS)
            plain.round(sent, CLIENTS)
            views = server.layout.views(server.adapter())
            if name == "residual":
                assert torch.equal(server.adapter(), plain.adapter())
                continue
            for key, value in views.items():
                if "lora_B" in key:
                    assert not value.any()
                else:  # a draw of its own, as LoRA begins
                    assert (value - server.layout.views(start)[key]).abs().max() > 0.05 and value.abs().max() <= 0.25 + 1e-6


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_model_itself_is_moved_and_restored(name):
    server = Server(name)
    before = logits(server.model)
    server.round(updates(server, 0), CLIENTS)
    after = logits(server.model)
    assert (after - before).abs().max() > 1e-2
    kept = {key: value.clone() for key, value in server.aggregation.state().items()} | server.optimizer.state()
    other = Server(name)
    other.aggregation.restore(kept)
    other.optimizer.restore(kept)
    with torch.no_grad():
        for key, view in other.layout.views(kept["adapter"]).items():
            trainable(other.model)[key].copy_(view)
    assert torch.equal(logits(other.model), after)
    other.number = 1
    for each in (server, other):
        each.round(updates(server, 1), CLIENTS)
    assert torch.equal(logits(other.model), logits(server.model))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_sum_that_is_not_finite_leaves_the_frozen_weights_alone(name):
    server = Server(name)
    with pytest.raises(FloatingPointError, match="product is not finite"):
        server.round([torch.full((server.layout.size,), sign * 1e30) for sign in (1, -1)], 2)
    assert not any(value.any() for value in server.aggregation.state().values())


@pytest.mark.parametrize("name", PRODUCTS)
def test_noise_in_every_message_leaves_the_product_unbiased(name):
    """E[(B + noise)(A + noise)] = B A: noises of B and A are independent (DP-FedLoRA, arXiv 2509.09097, theorem 1)."""
    server, many, std = Server(name), 4000, 0.2
    server.round(updates(server, 0), CLIENTS)
    clean = Server(name)
    clean.round(updates(clean, 0), CLIENTS)
    generator = torch.Generator().manual_seed(1)
    one = updates(server, 1)[0]
    server.round([one + std * torch.randn(server.layout.size, generator=generator) for _ in range(many)], many)
    clean.round([one] * many, many)
    for target, found in server.deltas().items():
        a, b = (server.layout.views(server.adapter())[f"{target}.lora_{side}.default.weight"] for side in "AB")
        # The variance of one product's entry, r = 2: std^2 (|b|^2 + |a|^2 + r std^2); factors here are shorter than 2.
        most = SCALING * math.sqrt(std**2 * (4 + 4 + len(a) * std**2) / many)
        assert float((found - clean.deltas()[target]).abs().max()) < 5 * most and len(a) == b.shape[1]
