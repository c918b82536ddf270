"""Privacy loss distributions on one grid, for everything that is calibrated, guarded or quoted: upper bounds.

The pessimistic discretisation is that of Google's dp-accounting (pld_pairs.py); its default grid is this one's half, so that
its answers are never above these by more than rounding. Composition is one FFT, with its rounding paid for
(pld_compose.py).

Truncation. Let K be the number of *other* units sampled in a round; its law is the same for two neighbouring data sets.
If K < M no cut can touch the sum, and given K the pair is the plain Poisson pair. With t = P[K >= M], giving up
entirely on the other case (an infinite privacy loss of mass t) dominates the truth, so T rounds satisfy

    delta_truncated(eps) <= (1 - (1-t)^T) + (1-t)^T delta_poisson(eps) <= T t + delta_poisson(eps).

That bound costs nothing to compute and is used while all such T t together are at most 1 % of delta, which
`noise.default_max_cohort` ensures; otherwise the distribution for truncated sampling (dp-accounting's, after arXiv
2508.15089) is built: in the case K >= M a unit's presence *replaces* another's, hence sensitivity 2.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from fedllm.privacy.accountants import EventCounts, check_delta, check_epsilon
from fedllm.privacy.accountants.pld_fallback import Fallback, fallback_deltas, fallback_epsilon, too_large
from fedllm.privacy.answers import PrivacyAnswer
from fedllm.privacy.events import (
    ADD_REMOVE,
    Event,
    FixedSizeGaussianEvent,
    GaussianEvent,
    TruncatedPoissonGaussianEvent,
    truncation_probability,
    without_cut,
)

if TYPE_CHECKING:
    from fedllm.privacy.accountants.pld_compose import Curve
    from fedllm.privacy.accountants.pld_pairs import Pair, Pmf

# The grid of everything quoted, times a power of two: half where one release's loss is small against it, coarser where
# the composed loss runs into hundreds and would need more than MAX_POINTS.
GRID = 2e-4
MAX_POINTS = 2**19  # twice as many where a finer grid than GRID is asked for
ROUNDED_SHARE = 5e-3  # the grid's square over the variance of one loss, above which half the grid is worth its time
MIN_DELTA = 1e-12  # far below it the mass beyond the window (1e-17) is no longer negligible
CUT_SHARE = 0.01  # share of delta that truncation may take before the exact distribution is worth its time
EXACT_SHARE = 1e-2  # share of delta that rounding may take before the other of two distributions is worth its time
MAX_NOISE = 1e9  # more is taken for this: beyond, the outcomes that part the cells lose their digits
MAX_GROUP = 32  # units; the pair is a mixture of so many components
FAILURES = (MemoryError, OverflowError, FloatingPointError, ZeroDivisionError)

Counts = tuple[tuple[Event, int], ...]


@lru_cache(maxsize=4)
def _single(event: Event, relation: str, grid: float) -> "tuple[Pmf, ...]":
    """The distributions of one release: of removing and adding, or one where both are the same."""
    from fedllm.privacy.accountants import pld_pairs

    (_, plain), *replaced = _pairs(event, relation)
    found = pld_pairs.discretize(plain, grid)
    for weight, pair in replaced:
        (other,) = pld_pairs.discretize(pair, grid)
        found = tuple(pld_pairs.mix(other, one, weight) for one in found)
    return found


def _pairs(event: Event, relation: str) -> "list[tuple[float, Pair]]":
    """The worst pairs of one release, each with the probability that it is that one; replacements are their own mirror."""
    from fedllm.privacy.accountants.pld_pairs import poisson_pair, replace_pair

    sigma, rate = min(event.noise_multiplier, MAX_NOISE), getattr(event, "sampling_rate", 1.0)
    add_remove = relation == ADD_REMOVE
    plain = poisson_pair(sigma, rate, getattr(event, "group", 1)) if add_remove else replace_pair(sigma, rate)
    if not isinstance(event, TruncatedPoissonGaussianEvent):
        return [(1.0, plain)]
    cut = truncation_probability(event.population, rate, event.max_cohort)
    if cut == 0:
        return [(1.0, plain)]
    # The rate given a cut: M/N of P[cohort > M], over P[K >= M]. Replacing is a little worse than either direction.
    above = truncation_probability(event.population + 1, rate, event.max_cohort + 1)
    return [(1 - cut, plain), (cut, replace_pair(sigma / 2, min(above * event.max_cohort / event.population / cut, 1.0)))]


def merged(counts: Counts) -> Counts:
    """Unsampled Gaussians are one Gaussian, exactly; the rest in the order given."""
    rest = tuple((event, count) for event, count in counts if not isinstance(event, GaussianEvent))
    mus = [
        math.sqrt(count) * event.sensitivity / event.noise_multiplier for event, count in counts if isinstance(event, GaussianEvent)
    ]
    mu = max(math.hypot(*mus), 1e-300)  # more than none where it underflows
    return (*rest, (GaussianEvent(1 / mu), 1)) if mus else rest


def _directions(counts: Counts, relation: str, grid: float) -> "list[list[tuple[Pmf, int]]]":
    """What is composed, for each direction: all releases removed, or all added."""
    singles = [(_single(event, relation, grid), count) for event, count in counts]
    number = max(len(pmfs) for pmfs, _ in singles)
    return [[(pmfs[min(i, len(pmfs) - 1)], count) for pmfs, count in singles] for i in range(number)]


@lru_cache(maxsize=64)
def _grid(counts: Counts, relation: str, wanted: float) -> tuple[float, tuple[tuple[int, int], ...]]:
    """The grid that this composition is put on, and each direction's window; `wanted` unless that is too fine or coarse."""
    from fedllm.privacy.accountants import pld_compose, pld_pairs

    grid, most = wanted, MAX_POINTS if wanted >= GRID else 2 * MAX_POINTS
    for event, _ in counts:
        # What one release spans decides before anything is laid out.
        low, high = map(sum, zip(*(pld_pairs.loss_range(pair) for _, pair in _pairs(event, relation)), strict=True))
        grid *= 2.0 ** math.ceil(math.log2(max((high - low) / grid / most, 1.0)))
    for _ in range(8):
        directions = _directions(counts, relation, grid)
        windows = tuple(pld_compose.window(parts, grid) for parts in directions)
        points = max(high - low for low, high in windows)
        if points > most:
            grid *= 2.0 ** math.ceil(math.log2(points / most))
        elif grid == wanted == GRID and min(_fineness(parts, grid) for parts in directions) < 1 / ROUNDED_SHARE:
            grid, wanted = grid / 2, grid / 2
        else:
            return grid, windows
    raise OverflowError("no grid holds the composition")


def _fineness(parts: "list[tuple[Pmf, int]]", grid: float) -> float:
    """Variance of the composed loss in units of the grid's square, per release."""
    from fedllm.privacy.accountants.pld_compose import mean_and_variance

    return mean_and_variance(parts, grid)[1] / grid**2 / sum(count for _, count in parts)


@lru_cache(maxsize=4)
def curves_of(counts: Counts, relation: str, grid: float, tilted: bool) -> "tuple[Curve, ...]":
    """The hockey-stick divergence of a whole composition, one curve for each direction."""
    from fedllm.privacy.accountants import pld_compose

    counts = merged(counts)
    grid, windows = _grid(counts, relation, grid)
    directions = _directions(counts, relation, grid)
    return tuple(pld_compose.compose(parts, grid, at, tilted) for parts, at in zip(directions, windows, strict=True))


@lru_cache(maxsize=1024)
def epsilon_of(counts: Counts, relation: str, grid: float, delta: float) -> tuple[float, Fallback | None]:
    """(epsilon, how it was come by where that was not the distribution)."""
    plain, lost = without_cut(counts)
    if lost <= CUT_SHARE * delta:
        counts, delta = plain, delta - lost
    if too_large(counts, relation):
        return fallback_epsilon(counts, relation, delta, "too little noise for a grid")
    try:
        curves = curves_of(counts, relation, grid, False)
        epsilon = max(curve.epsilon(delta) for curve in curves)
        if max(curve.slack for curve in curves) > EXACT_SHARE * delta:
            epsilon = min(epsilon, max(curve.epsilon(delta) for curve in curves_of(counts, relation, grid, True)))
        if not math.isnan(epsilon):
            return epsilon, None
        failure = "not a number"
    except FAILURES as error:
        failure = str(error) or type(error).__name__
    return fallback_epsilon(counts, relation, delta, f"the distribution could not be computed ({failure})")


def _deltas_plain(counts: Counts, relation: str, grid: float, epsilons: Sequence[float]) -> tuple[list[float], Fallback | None]:
    """delta of events taken as they are, at each epsilon; and how, where that was not the distribution."""
    import numpy as np

    if too_large(counts, relation):
        return fallback_deltas(counts, relation, epsilons, "too little noise for a grid")
    try:
        at = np.asarray(epsilons, dtype=float)
        curves = curves_of(counts, relation, grid, False)
        found = np.max([curve.deltas(at) for curve in curves], axis=0)
        drowned = max(curve.slack for curve in curves) > EXACT_SHARE * found
        if np.any(drowned):
            tilted = np.max([curve.deltas(at) for curve in curves_of(counts, relation, grid, True)], axis=0)
            found = np.where(drowned, np.minimum(found, tilted), found)
        if not np.any(np.isnan(found)):
            return found.tolist(), None
        failure = "not a number"
    except FAILURES as error:
        failure = str(error) or type(error).__name__
    return fallback_deltas(counts, relation, epsilons, f"the distribution could not be computed ({failure})")


def _deltas(counts: Counts, relation: str, grid: float, epsilons: Sequence[float]) -> tuple[list[float], Fallback | None]:
    plain, lost = without_cut(counts)
    found, how = _deltas_plain(plain, relation, grid, epsilons)
    found = [min(1.0, delta + lost) for delta in found]
    if any(lost > CUT_SHARE * delta for delta in found):
        exact, how = _deltas_plain(counts, relation, grid, epsilons)
        found = [min(one, other) for one, other in zip(found, exact, strict=True)]
    return found, how


class PldAccountant(EventCounts):
    """Upper bounds for Gaussian, Poisson and truncated Poisson events, add/remove (the worse direction) or replace-one,
    and for Poisson events of a group of at most MAX_GROUP units (add/remove).

    Accuracy: delta >= 1e-12; epsilon within 1e-4 relative of the limit of fine grids while one release's loss is large
    against the grid, looser (never lower) where it is not (noise multipliers of hundreds).
    Where the privacy loss runs into tens of thousands, or the arithmetic fails, the answer is the smaller of RDP's and of
    exact GDP without amplification, and says so.
    """

    name = "pld"
    conversion = "hockey-stick divergence"

    def __init__(self, relation: str = ADD_REMOVE, grid: float = GRID) -> None:
        """grid: another than GRID only to search coarsely; what is quoted or guarded uses GRID."""
        super().__init__(relation)
        self.grid = grid

    def refusal(self, event: Event) -> str | None:
        if isinstance(event, FixedSizeGaussianEvent):
            return "no dominating pair for fixed-size cohorts is implemented; the bound for them is RDP's"
        group = getattr(event, "group", 1)
        if group > 1 and self.relation != ADD_REMOVE:
            return "the pair for a sampled group is known for adding or removing it only"
        if group > MAX_GROUP:
            return f"groups of more than {MAX_GROUP} units"
        return None

    def epsilon(self, delta: float) -> PrivacyAnswer:
        check_delta(delta)
        if delta < MIN_DELTA:
            raise ValueError(f"Expected delta={delta} >= {MIN_DELTA} for the accountant {self.name}")
        counts = self._costly()
        if any(event.noise_multiplier == 0 for event, _ in counts):
            return self._answer(None, delta, "no noise")
        if not counts:
            return self._answer(0.0, delta)
        return self._epsilon_of(counts, delta)

    def delta(self, epsilon: float) -> PrivacyAnswer:
        check_epsilon(epsilon)
        counts = self._costly()
        if any(event.noise_multiplier == 0 for event, _ in counts):
            return self._answer(epsilon, 1.0, "no noise")
        if not counts:
            return self._answer(epsilon, 0.0)
        (delta,), how = self._deltas_of(counts, [epsilon])
        return self._answer(epsilon, delta, **(how.labels() if how else {}))

    def deltas(self, epsilons: Sequence[float]) -> list[float]:
        """delta at each epsilon >= 0, all from one composition."""
        for epsilon in epsilons:
            check_epsilon(epsilon)
        counts = self._costly()
        if any(event.noise_multiplier == 0 for event, _ in counts):
            return [1.0] * len(epsilons)
        return self._deltas_of(counts, epsilons)[0] if counts and len(epsilons) else [0.0] * len(epsilons)

    def _epsilon_of(self, counts: Counts, delta: float) -> PrivacyAnswer:
        epsilon, how = epsilon_of(counts, self.relation, self.grid, delta)
        if math.isinf(epsilon):
            return self._answer(None, delta, "no finite epsilon at this delta")
        return self._answer(float(epsilon), delta, **(how.labels() if how else {}))

    def _deltas_of(self, counts: Counts, epsilons: Sequence[float]) -> tuple[list[float], Fallback | None]:
        return _deltas(counts, self.relation, self.grid, epsilons)
