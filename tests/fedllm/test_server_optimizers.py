"""The server's optimisers: each against a plain loop of what its paper writes, and torch's where torch has it."""

import pytest
import torch

from fedllm.schema import ServerConfig
from fedllm.server import ServerOptimizer
from fedllm.server_optimizers import OPTIMIZERS

LR, MOMENTUM, FIRST, SECOND, TAU = 0.1, 0.8, 0.7, 0.95, 1e-2
SIZE, ROUNDS = 7, 6


def config(name: str) -> ServerConfig:
    return ServerConfig(name, LR, momentum=MOMENTUM, betas=[FIRST, SECOND], tau=TAU)


def updates() -> list[torch.Tensor]:
    """Old minus new: some coordinates grow, some shrink, so that Yogi's sign turns both ways."""
    generator = torch.Generator().manual_seed(2)
    scale = torch.logspace(-3, 1, ROUNDS)
    return [torch.randn(SIZE, generator=generator) * scale[i if k % 2 else -1 - i] for i in range(ROUNDS) for k in (0, 1)]


def sgd(x, updates):
    for u in updates:
        x = x - LR * u
    return x


def momentum(x, updates):
    """FedAvgM (arXiv 1909.06335)."""
    velocity = torch.zeros_like(x)
    for u in updates:
        velocity = MOMENTUM * velocity + u
        x = x - LR * velocity
    return x


def adagrad(x, updates):
    v = torch.full_like(x, TAU**2)
    for u in updates:
        v = v + u**2
        x = x - LR * u / (v.sqrt() + TAU)
    return x


def yogi(x, updates):
    m, v = torch.zeros_like(x), torch.full_like(x, TAU**2)
    for u in updates:
        m = FIRST * m + (1 - FIRST) * u
        v = v - (1 - SECOND) * u**2 * torch.sign(v - u**2)
        x = x - LR * m / (v.sqrt() + TAU)
    return x


def fedadam(x, updates):
    m, v = torch.zeros_like(x), torch.full_like(x, TAU**2)
    for u in updates:
        m = FIRST * m + (1 - FIRST) * u
        v = SECOND * v + (1 - SECOND) * u**2
        x = x - LR * m / (v.sqrt() + TAU)
    return x


def adam(x, updates):
    """With corrected bias (arXiv 1412.6980)."""
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, u in enumerate(updates, 1):
        m, v = FIRST * m + (1 - FIRST) * u, SECOND * v + (1 - SECOND) * u**2
        x = x - LR * (m / (1 - FIRST**t)) / ((v / (1 - SECOND**t)).sqrt() + TAU)
    return x


LOOPS = {
    "sgd": sgd, "fedavg": sgd, "momentum": momentum, "fedavgm": momentum, "adam": adam, "fedadam": fedadam,
    "adagrad": adagrad, "fedadagrad": adagrad, "yogi": yogi, "fedyogi": yogi,
}  # fmt: skip


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_every_optimiser_is_what_its_paper_writes(name):
    start = torch.linspace(-1, 1, SIZE)
    optimizer = ServerOptimizer(start, config(name))
    for update in updates():
        found = optimizer.step(update)
    expected = LOOPS[name](start.double(), [update.double() for update in updates()])
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    others = {loop for other, loop in LOOPS.items() if loop is not LOOPS[name]}
    for loop in others:  # the settings tell them apart
        assert (loop(start.double(), [update.double() for update in updates()]) - expected).abs().max() > 1e-3


def test_adagrad_is_torchs():
    x = torch.linspace(-1, 1, SIZE).requires_grad_()
    torchs = torch.optim.Adagrad([x], LR, initial_accumulator_value=TAU**2, eps=TAU)
    ours = ServerOptimizer(x.detach(), config("fedadagrad"))
    for update in updates():
        x.grad = update
        torchs.step()
        assert torch.equal(ours.step(update), x.detach())


def test_fedavg_with_rate_1_is_the_plain_average():
    adapters = torch.randn(5, SIZE, generator=torch.Generator().manual_seed(4))
    start = torch.ones(SIZE)
    new = ServerOptimizer(start, ServerConfig("fedavg", 1.0)).step((start - adapters).mean(0))
    assert torch.allclose(new, adapters.mean(0), atol=1e-6)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_an_optimiser_restored_goes_on_as_if_never_stopped(name):
    whole, first = (ServerOptimizer(torch.ones(SIZE), config(name)) for _ in range(2))
    for update in updates():
        expected = whole.step(update)
    for update in updates()[:5]:
        first.step(update)
    kept = {key: value.clone() for key, value in first.state().items()}
    second = ServerOptimizer(torch.zeros(SIZE), config(name))
    second.restore(kept)
    for update in updates()[5:]:
        got = second.step(update)
    assert torch.equal(got, expected)
