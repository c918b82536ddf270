"""One noisy release as a privacy loss distribution on a grid, vectorised: the worst pair of neighbours, cell by cell.

The pairs (P against Q, one coordinate, noise sigma):
- Poisson, add/remove: (1-q) N(0) + q N(1) against N(0) ("remove"), and the reverse ("add");
- a group of k units, each sampled on its own: the Binomial(k, q) mixture of N(j) against N(0) (Ganesh 2024, "Tight
  group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians mechanisms", theorem 3.1);
- replace-one: (1-q) N(0) + q N(1) against (1-q) N(0) + q N(-1), its own mirror image.

Connect the dots (Doroshenko et al. 2022, algorithm 1), pessimistic: between two neighbouring grid points the divergence
as a function of exp(epsilon) is replaced by its chord. Equivalently, and this is what is computed, the mass A under P and
B under Q of the outcomes whose loss lies in a cell [y, y + g] is moved to the cell's two ends so that both masses are kept:
(A - exp(y) B) / (1 - exp(-g)) goes to the upper end, the rest of A to the lower. Sums of cells are exact, so unlike second
differences of the divergence this neither makes nor loses mass by cancellation. A coarser grid whose points are among
those of a finer one gives divergences that are nowhere smaller.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, ndtr, xlog1py, xlogy

TAIL_SIGMAS = 10.2  # a normal variable exceeds it with probability 1e-24
NEGLIGIBLE = 1e-25  # weights of a mixture below this are left out of the range, never out of the masses
MAX_EXPONENT = 700.0  # exp of more overflows


@dataclass(frozen=True)
class Pmf:
    """Masses `probs` [n] at the losses (first + i) * grid, and `infinite` at infinity; their sum is 1 up to rounding."""

    first: int
    probs: np.ndarray
    infinite: float


@dataclass(frozen=True)
class Pair:
    """P and Q as mixtures of N(shift, sigma^2): tuples of (weight, shift)."""

    upper: tuple[tuple[float, float], ...]
    lower: tuple[tuple[float, float], ...]
    sigma: float


def poisson_pair(sigma: float, rate: float, group: int = 1) -> Pair:
    """Removing `group` units, each sampled with probability `rate` in (0, 1]; sigma > 0."""
    j = np.arange(group + 1)
    log_weights = gammaln(group + 1) - gammaln(j + 1) - gammaln(group - j + 1) + xlogy(j, rate) + xlog1py(group - j, -rate)
    weights = np.exp(log_weights)
    return Pair(tuple((float(w), float(k)) for w, k in zip(weights, j, strict=True) if w > 0), ((1.0, 0.0),), sigma)


def replace_pair(sigma: float, rate: float) -> Pair:
    """Replacing a unit that is sampled with probability `rate` in (0, 1] by its opposite; sigma > 0."""
    absent = ((1 - rate, 0.0),) if rate < 1 else ()
    return Pair((*absent, (rate, 1.0)), (*absent, (rate, -1.0)), sigma)


def loss_range(pair: Pair) -> tuple[float, float]:
    """(lowest, highest) loss worth a place on the grid, in the direction P against Q."""
    shifts = [shift for weight, shift in pair.upper + pair.lower if weight > NEGLIGIBLE]
    at = np.array([min(*shifts, 0.0) - TAIL_SIGMAS * pair.sigma, max(*shifts, 0.0) + TAIL_SIGMAS * pair.sigma])
    low, high = _log_density(pair.upper, at, pair.sigma) - _log_density(pair.lower, at, pair.sigma)
    return float(low), float(high)


def discretize(pair: Pair, grid: float) -> tuple[Pmf, ...]:
    """The pessimistic distributions of P against Q and, unless it is the same, of Q against P. grid: > 0."""
    low, high = loss_range(pair)
    first = math.floor(low / grid)
    last = max(math.ceil(high / grid), first + 1)  # a range that rounds to one point still is a cell
    losses = np.arange(first, last + 1) * grid
    edges = _inverse_loss(pair, losses)
    p_cells, p_below, p_above = _masses(pair.upper, edges, pair.sigma)
    q_cells, q_below, q_above = _masses(pair.lower, edges, pair.sigma)
    remove = _connect(first, losses[:-1], p_cells, q_cells, p_below, p_above, grid)
    if len(pair.lower) > 1 or pair.lower[0][1] != 0 or len(pair.upper) == 1:
        return (remove,)
    # The same cells seen from the other side: losses change sign, hence order.
    add = _connect(-last, -losses[:0:-1], q_cells[::-1], p_cells[::-1], q_above, q_below, grid)
    return remove, add


def mix(one: Pmf, other: Pmf, weight: float) -> Pmf:
    """The distribution that is `one` with probability `weight` and else `other`; which of them is known."""
    first = min(one.first, other.first)
    probs = np.zeros(max(one.first + len(one.probs), other.first + len(other.probs)) - first)
    for pmf, share in ((one, weight), (other, 1 - weight)):
        probs[pmf.first - first : pmf.first - first + len(pmf.probs)] += share * pmf.probs
    return Pmf(first, probs, weight * one.infinite + (1 - weight) * other.infinite)


def _connect(first: int, starts: np.ndarray, mass: np.ndarray, other: np.ndarray, below: float, above: float, grid: float) -> Pmf:
    """starts: lower end of each cell [n]. mass, other: of the cells under the upper and the lower distribution [n].
    below, above: mass under the upper distribution beyond the range; it goes up, to the first point and to infinity."""
    # Where exp(start) would overflow it is taken too small, which moves more of the mass up.
    up = (mass - np.exp(np.minimum(starts, MAX_EXPONENT)) * other) / -math.expm1(-grid)
    up = np.clip(up, 0.0, mass)
    probs = np.zeros(len(mass) + 1)
    probs[:-1] = mass - up
    probs[1:] += up
    probs[0] += below
    kept = np.flatnonzero(probs)
    low, high = (kept[0], kept[-1] + 1) if len(kept) else (0, 1)
    return Pmf(first + int(low), probs[low:high], above)


def _masses(side: tuple[tuple[float, float], ...], edges: np.ndarray, sigma: float) -> tuple[np.ndarray, float, float]:
    """Mass of a mixture between consecutive edges [n], below the first and above the last."""
    cells, below, above = np.zeros(len(edges) - 1), 0.0, 0.0
    for weight, shift in side:
        z = (edges - shift) / sigma
        left, right = ndtr(z), ndtr(-z)
        # Differences in the tail that the cell lies in, where they lose least.
        cells += weight * np.where(z[:-1] > 0, right[:-1] - right[1:], left[1:] - left[:-1])
        below += weight * float(left[0])
        above += weight * float(right[-1])
    return np.maximum(cells, 0.0), below, above


def _log_density(side: tuple[tuple[float, float], ...], at: np.ndarray, sigma: float) -> np.ndarray:
    """log of a mixture's density over that of N(0, sigma^2)."""
    total = np.full(at.shape, -np.inf)
    for weight, shift in side:
        if weight > 0:
            total = np.logaddexp(total, math.log(weight) + (shift * at - shift * shift / 2) / sigma**2)
    return total


def _inverse_loss(pair: Pair, losses: np.ndarray) -> np.ndarray:
    """The outcome at which the (increasing) loss takes each value [n]; -infinity below its infimum."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if pair.lower != ((1.0, 0.0),):
            return _inverse_replace(pair, losses)
        return _inverse_mixture(pair, losses)


def _inverse_replace(pair: Pair, losses: np.ndarray) -> np.ndarray:
    """x/sigma^2 = y/2 + asinh((1-q)/q exp(1/(2 sigma^2)) sinh(y/2)): solve exp(y) Q(x) = P(x) for x."""
    rate = pair.upper[-1][0]
    half = losses / 2
    if rate == 1:
        return pair.sigma**2 * half
    size = np.abs(half)
    log_sinh = size + np.log(-np.expm1(-2 * size)) - math.log(2)
    log_v = math.log1p(-rate) - math.log(rate) + 0.5 / pair.sigma**2 + log_sinh
    # asinh(v) = log(v + sqrt(v^2 + 1)), from log v; for small v directly, or all digits are lost.
    large = np.logaddexp(log_v, 0.5 * np.logaddexp(0.0, 2 * log_v))
    asinh = np.where(log_v < 0, np.arcsinh(np.exp(np.minimum(log_v, 0.0))), large)
    return pair.sigma**2 * (half + np.sign(half) * asinh)


def _inverse_mixture(pair: Pair, losses: np.ndarray) -> np.ndarray:
    """With one shift in closed form; with several by Newton's method, from the right, on a convex function."""
    variance = pair.sigma**2
    weight_0 = sum(weight for weight, shift in pair.upper if shift == 0)
    log_0 = math.log(weight_0) if weight_0 > 0 else -math.inf
    # log(exp(y) - weight_0): where each component alone would carry the whole loss, hence right of the solution.
    log_rest = losses + np.log(-np.expm1(np.minimum(log_0 - losses, 0.0)))
    shifted = [(weight, shift) for weight, shift in pair.upper if shift > 0]
    x = np.min([variance * (log_rest - math.log(weight)) / shift + shift / 2 for weight, shift in shifted], axis=0)
    if len(shifted) == 1:
        return x
    finite = np.isfinite(x)
    at, want = x[finite], log_rest[finite]
    for _ in range(60):
        total, slope = np.full(at.shape, -np.inf), np.zeros(at.shape)
        terms = [math.log(weight) + (shift * at - shift * shift / 2) / variance for weight, shift in shifted]
        peak = np.max(terms, axis=0)
        total = sum(np.exp(term - peak) for term in terms)
        slope = sum(shift * np.exp(term - peak) for term, (_, shift) in zip(terms, shifted, strict=True))
        step = (peak + np.log(total) - want) * total * variance / slope
        at = at - step
        if np.max(np.abs(step), initial=0.0) < 1e-13 * max(1.0, pair.sigma):
            break
    x[finite] = at
    return x
