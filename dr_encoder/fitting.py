"""Stage 1: fit a neural codec to samples of a prior, the noise of stage 2 in the loop. It never sees a real update."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Progress = Callable[[int, int, float], None]


class NeuralCodec(Protocol):
    """An `nn.Module` with these two maps, differentiable, batched over the first axis."""

    def encoder(self, inputs: Tensor) -> Tensor: ...

    def decoder(self, codes: Tensor) -> Tensor: ...

    def parameters(self) -> list[nn.Parameter]: ...


def fit_to_samples(
    codec: NeuralCodec,
    sample: Callable[[int, torch.Generator], Tensor],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    noise_std: float,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> list[float]:
    """Adam on the mean squared reconstruction error, with Gaussian noise on the codes.

    Args:
        codec: its parameters are changed in place.
        sample: (count, generator) -> inputs [count, ...], synthetic.
        steps: optimiser steps >= 0.
        learning_rate: peak; it falls along a half cosine to a tenth.
        noise_std: DP noise of a code's coordinate in clip norms >= 0; the clip norm stands at the root mean square
            norm of the batch's codes. This is training noise on synthetic codes and protects nothing.
        generator: the only source of randomness, so that equal seeds give equal codecs.
        progress: called as progress(step, steps, loss) after each step.
    Returns:
        The loss of each step: mean squared error over mean square of the inputs, so 1 means nothing is kept.
    Raises:
        ValueError: for arguments out of range.
        FloatingPointError: if the loss stops being finite.
    """
    if steps < 0 or batch_size < 1:
        raise ValueError(f"Expected steps={steps} >= 0 and batch_size={batch_size} >= 1")
    if not (learning_rate > 0 and noise_std >= 0):
        raise ValueError(f"Expected learning_rate={learning_rate} > 0 and noise_std={noise_std} >= 0")
    optimizer = torch.optim.Adam(codec.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.55 + 0.45 * math.cos(math.pi * step / max(steps, 1)))
    losses: list[float] = []
    for step in range(1, steps + 1):
        inputs = sample(batch_size, generator)
        codes = codec.encoder(inputs)
        loss = relative_error(codec.decoder(with_noise(codes, noise_std, generator)), inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"Fitting diverged at step {step} of {steps}: lower learning_rate={learning_rate}")
        if progress is not None:
            progress(step, steps, losses[-1])
    return losses


def with_noise(codes: Tensor, noise_std: float, generator: torch.Generator) -> Tensor:
    """Codes [count, ...] with Gaussian noise of noise_std times their root mean square norm in every coordinate."""
    if noise_std == 0:
        return codes
    norm = codes.detach().flatten(1).square().sum(1).mean().sqrt()
    return codes + noise_std * norm * torch.randn(codes.shape, generator=generator)


def relative_error(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Squared error over the inputs' squared norm: 0 is perfect, 1 is what an output of zeros gets."""
    return (outputs - inputs).square().sum() / inputs.square().sum().clamp_min(torch.finfo(inputs.dtype).tiny)
