"""Per-factor moments of an update: what a unit reveals of itself in stage 1, and what the noisy mean of them tells.

DR-Encoder's prior needs one mean and one standard deviation a factor. Both are functions of private gradients, so they
are a release: the caller clips each unit's vector jointly, adds noise, and enters the event in the ledger. (The paper
does not say that they are noised.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dr_encoder.layout import AdapterLayout


def unit_moments(updates: Tensor, layout: AdapterLayout, scale: Tensor) -> Tensor:
    """Mean / scale and mean square / scale^2 of each factor, for each unit.

    Formal guarantees: unbounded as returned. Once each row is clipped to L2 norm C, the sum over units has
    sensitivity C when a unit is added or removed and 2 C when one is replaced.

    Args:
        updates: one row a unit [units, n].
        scale: public root mean square of each factor [L] > 0, so that the factors weigh alike under the joint clip. It
            must not come from the private updates.
    Returns:
        [units, 2 L] in float32: the L means, then the L mean squares. A unit like the public ones has norm sqrt(L).
    Raises:
        ValueError: for a scale that is not finite and positive, or shapes that do not fit.
    """
    scale = _checked(scale, len(layout.factors))
    if updates.ndim != 2 or updates.shape[1] != layout.size:
        raise ValueError(f"Expected updates of shape [units, {layout.size}], got {list(updates.shape)}")
    parts = [updates[:, factor.offset : factor.stop] for factor in layout.factors]
    means = torch.stack([part.mean(1, dtype=torch.float64) for part in parts], 1)
    squares = torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square() for part in parts], 1)
    sizes = torch.tensor([factor.size for factor in layout.factors])
    return torch.cat([means / scale, squares / sizes / scale.square()], 1).float()


def moments_to_std(noisy_mean: Tensor, scale: Tensor, floor: float = 0.05, noise_std: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each factor from the noisy mean of `unit_moments`: free post-processing.

    Noise of the size of a moment is common (2 L numbers share one clip), so with `noise_std` given the means are shrunk
    towards zero and the mean squares towards their average over the factors, each as far as the noise explains their
    spread (positive-part James-Stein).

    Args:
        noisy_mean: [2 L], divided by the expected cohort.
        scale: the same public scale as in `unit_moments` [L].
        floor: least standard deviation, in units of `scale`, > 0: noise can make a mean square negative.
        noise_std: standard deviation >= 0 of the noise in each of the 2 L numbers.
    Returns:
        mean [L] and standard deviation [L], float32, in the updates' own units.
    Raises:
        ValueError: for arguments out of range, or moments that are not finite.
    """
    if noisy_mean.ndim != 1 or len(noisy_mean) % 2 or not torch.isfinite(noisy_mean).all():
        raise ValueError(f"Expected finite moments [2 L], got shape {list(noisy_mean.shape)}")
    if not (floor > 0 and noise_std >= 0):
        raise ValueError(f"Expected floor={floor} > 0 and noise_std={noise_std} >= 0")
    scale = _checked(scale, len(noisy_mean) // 2)
    mean, mean_square = noisy_mean.double().chunk(2)
    if noise_std > 0:
        mean = _shrunk(mean, noise_std)
        average = mean_square.mean()
        mean_square = average + _shrunk(mean_square - average, noise_std)
    std = (mean_square - mean.square()).clamp_min(floor**2).sqrt()
    return (mean * scale).float(), (std * scale).float()


def _shrunk(values: Tensor, noise_std: float) -> Tensor:
    energy = values.square().mean()
    return values * (1 - noise_std**2 / energy).clamp_min(0) if energy > 0 else values


def _checked(scale: Tensor, factors: int) -> Tensor:
    if scale.shape != (factors,) or not (torch.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"Expected scale to be {factors} finite numbers > 0, one a factor")
    return scale.double()
