"""Adam in the code's coordinates: against torch's Adam where the code leaves nothing out, and what a refit does to its moments."""

import pytest
import torch

from dr_encoder.codecs import CODECS
from dr_encoder.codecs.linear import LinearCodec
from fedllm.code_adam import MOST_CARRIED, CodeAdam, change_of_basis
from fedllm.errors import UserError
from fedllm.schema import ServerConfig
from fedllm.server import ServerOptimizer

N, K = 44, 6
CONFIG = ServerConfig("adam", lr=0.03, betas=[0.8, 0.95], tau=1e-8, space="code")


def basis(k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(N, k, generator=torch.Generator().manual_seed(seed)))[0].T.contiguous()


def linear(k: int = K, seed: int = 1, rows: torch.Tensor | None = None) -> LinearCodec:
    rows = basis(k, seed) if rows is None else rows
    return LinearCodec(rows, torch.ones(len(rows)))


def codes(count: int, k: int = K, seed: int = 3) -> torch.Tensor:
    return torch.randn(count, k, generator=torch.Generator().manual_seed(seed))


def walked(optimizer: CodeAdam, steps: torch.Tensor) -> torch.Tensor:
    for code in steps:
        adapter = optimizer.step(code)
    return adapter


def test_with_a_code_that_leaves_nothing_out_it_is_adam():
    start, codec = torch.linspace(-1, 1, N), CODECS["identity"](torch.ones(N))
    ours, plain = CodeAdam(start, CONFIG), ServerOptimizer(start, CONFIG)
    ours.use(codec)
    for number, code in enumerate(codes(5, N)):
        rate = 1 - number / 5
        torch.testing.assert_close(ours.step(code, rate), plain.step(code, rate))


def test_steps_stay_in_the_span_of_the_code_at_the_length_that_the_rate_says():
    start, codec = torch.zeros(N), linear()
    optimizer = CodeAdam(start, CONFIG)
    optimizer.use(codec)
    step = optimizer.step(codes(1)[0])
    torch.testing.assert_close(codec.decode(codec.encode(step[None])[0]), step)
    # Adam's first step has every coordinate at its rate: a root mean square of lr over all n, whatever k.
    assert float(step.square().mean().sqrt()) == pytest.approx(CONFIG.lr, rel=1e-4)


def test_adam_on_decoded_updates_leaves_the_span():
    """What this optimiser is for: the plain one moves along every coordinate that a code leaves a little of."""
    start, codec = torch.zeros(N), linear()
    step = ServerOptimizer(start, CONFIG).step(codec.decode(codes(1)[0]))
    outside = step - codec.decode(codec.encode(step[None])[0])
    assert float(outside.norm()) > 0.5 * float(step.norm())


def test_a_refit_that_only_permutes_the_code_changes_nothing():
    start, first = torch.zeros(N), linear()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(5))
    second = linear(rows=first.basis[order])
    kept, moved = CodeAdam(start, CONFIG), CodeAdam(start, CONFIG)
    kept.use(first), moved.use(first)
    walked(kept, codes(3)), walked(moved, codes(3))
    moved.use(second)
    new = codes(1, seed=9)[0]
    torch.testing.assert_close(kept.step(new), moved.step(new[order]))


def test_a_refit_turns_the_first_moment_with_the_code_and_keeps_the_second_positive():
    first, second = linear(), linear(seed=2)
    optimizer = CodeAdam(torch.zeros(N), CONFIG)
    optimizer.use(first)
    walked(optimizer, codes(3))
    before = first.decode(optimizer.first)
    optimizer.use(second)
    torch.testing.assert_close(optimizer.first, second.encode(before[None])[0])
    assert (optimizer.second > 0).all() and optimizer.second.shape == (K,)


def test_a_code_of_another_size_takes_the_moments_over():
    optimizer = CodeAdam(torch.zeros(N), CONFIG)
    optimizer.use(linear(6))
    walked(optimizer, codes(2))
    optimizer.use(linear(9))
    assert optimizer.step(codes(1, 9)[0]).isfinite().all()


def test_a_state_comes_back_as_it_was():
    codec = linear()
    one = CodeAdam(torch.zeros(N), CONFIG)
    one.use(codec)
    walked(one, codes(3))
    other = CodeAdam(torch.ones(N), CONFIG)
    other.restore({key: value.clone() for key, value in one.state().items()}, codec)
    other.use(codec)
    assert torch.equal(one.step(codes(1, seed=8)[0]), other.step(codes(1, seed=8)[0]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_and_changes_nothing(bad):
    optimizer = CodeAdam(torch.zeros(N), CONFIG)
    optimizer.use(linear())
    walked(optimizer, codes(2))
    before = {key: value.clone() for key, value in optimizer.state().items()}
    with pytest.raises(FloatingPointError, match="not finite"):
        optimizer.step(torch.full((K,), bad))
    assert all(torch.equal(before[key], value) for key, value in optimizer.state().items())


def test_a_change_of_basis_that_is_too_large_is_one_line():
    class Huge:
        code_size = MOST_CARRIED + 1

    with pytest.raises(UserError, match=r"space=code: expected codec.refresh=0"):
        change_of_basis(Huge(), Huge())
