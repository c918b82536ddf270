"""Clipping of privacy units: the only reason why any noise here is enough."""

import math

import torch

from fedllm.privacy.groups import Group, is_partition

_MARGIN = 1e-10  # relative; covers the rounding of a float64 norm over up to 1e6 values
_STEPS = 16


def clip_units(codes: torch.Tensor, clip: float) -> torch.Tensor:
    """Scale every row down to L2 norm at most `clip`.

    Formal guarantee: for every input each row of the returned float32 tensor has exact L2 norm <= clip, so the sum over
    rows moves by at most clip when a unit is added or removed and by at most 2 clip when one is replaced. Rows within
    the clip are returned bit for bit (zero rows too); a row with a NaN or an infinity becomes zero, silently, since how
    many there were is private.

    codes: [units, k]; rows beyond 1e36 C may come out shorter than C. clip: C > 0, finite.
    Norms in float64; the factor is rounded towards zero, and once more until the rounded result fits.
    """
    return clip_units_(codes.detach().to(torch.float32, copy=True), clip)


def clip_units_(codes: torch.Tensor, clip: float) -> torch.Tensor:
    """`clip_units` in place, of float32 codes that need no gradient; returns them. Rows may be larger than the processor's caches."""
    _check_clip(clip)
    if codes.ndim != 2 or codes.dtype != torch.float32:
        raise ValueError(f"Expected float32 codes of shape [units, k], got {codes.dtype} {list(codes.shape)}")
    limit = clip * (1 - _MARGIN)
    norms = unit_norms(codes)
    finite = torch.isfinite(norms)
    if not finite.all():
        codes[~finite] = 0.0
    long = finite & (norms > limit)
    factors = torch.where(long, limit / norms, 1.0).to(torch.float32)
    for _ in range(_STEPS):
        if not long.any():
            return codes
        factors = torch.where(long, torch.nextafter(factors, torch.zeros_like(factors)), 1.0)
        codes.mul_(factors[:, None])  # by 1: bit for bit the same
        long = unit_norms(codes) > limit
        factors = torch.ones_like(factors)  # of what rounding left too long: by one step of float32 more
    # Only a clip norm near the smallest float32 gets here: rounding then outweighs the scaling.
    codes[long] = 0.0
    return codes


def clip_by_group(codes: torch.Tensor, clip: float, groups: tuple[Group, ...]) -> torch.Tensor:
    """Scale every group of every row down to L2 norm at most `clip`, each by a factor of its own.

    Formal guarantee: for every input each group of each row has exact L2 norm <= clip, as in `clip_units`, so each whole row has L2 norm
    <= clip sqrt(groups): by that much the sum over rows moves when a unit is added or removed, by twice as much when one is replaced. A
    row with a NaN or an infinity anywhere becomes zero everywhere.

    codes: [units, k]. groups: see `groups.clip_groups`; they must hold every coordinate once, or ValueError is raised.
    """
    if codes.ndim != 2 or not is_partition(groups, codes.shape[1]):
        raise ValueError(f"Expected codes of shape [units, k] and groups that hold each of k coordinates once, got {list(codes.shape)}")
    result = codes.detach().to(torch.float32, copy=True)
    result[~torch.isfinite(unit_norms(result))] = 0.0
    for group in groups:
        parts = [result[:, start:stop] for start, stop in group]
        clipped = clip_units_(torch.cat(parts, 1), clip).split([part.shape[1] for part in parts], 1)
        for part, shorter in zip(parts, clipped, strict=True):
            part.copy_(shorter)
    return result


def unit_norms(codes: torch.Tensor) -> torch.Tensor:
    """[units, k] -> [units] float64 L2 norms; NaN or infinite where the row is not finite."""
    return torch.linalg.vector_norm(codes, dim=1, dtype=torch.float64)


def clip_bits(norms: torch.Tensor, clip: float) -> torch.Tensor:
    """[units] norms -> [units] float64: +1/2 where the norm is within the clip, -1/2 elsewhere (NaN included).

    Formal guarantee: the sum moves by at most 1/2 when a unit is added or removed, by at most 1 when one is replaced
    (Andrew et al. 2021).
    """
    _check_clip(clip)
    return (norms <= clip).to(torch.float64) - 0.5


def noisy_fraction(noisy_bit_sum: float, expected_cohort: float) -> float:
    """Estimated fraction in [0, 1] of units within the clip, from the noisy sum of centred bits."""
    return min(1.0, max(0.0, noisy_bit_sum / expected_cohort + 0.5))


def next_clip(clip: float, noisy_fraction: float, quantile: float, learning_rate: float) -> float:
    """Geometric update C exp(-learning_rate (fraction - quantile)) (Andrew et al. 2021, section 2.1).

    noisy_fraction: of units within the clip, noised, in [0, 1]. quantile: in [0, 1]. learning_rate: >= 0, usually 0.2.
    """
    _check_clip(clip)
    if not (0 <= noisy_fraction <= 1 and 0 <= quantile <= 1 and learning_rate >= 0):
        raise ValueError(
            f"Expected fraction={noisy_fraction}, quantile={quantile} in [0, 1] and learning_rate={learning_rate} >= 0"
        )
    return clip * math.exp(-learning_rate * (noisy_fraction - quantile))


def _check_clip(clip: float) -> None:
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"Expected clip={clip} finite and > 0")
