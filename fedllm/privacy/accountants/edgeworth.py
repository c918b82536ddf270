"""The Edgeworth accountant: the CDF of the summed privacy loss expanded around the normal one (expansion.py), an estimate.

Wang, Gao, Zhang, Su and Shen (arXiv 2206.04236), as EW-Tune (arXiv 2210.15042) uses it. Orders 1 to 3; order 0 is the normal
approximation with the exact mean and variance. Removing a unit and adding one both count, the worse is the answer; the
published code, and the figures published with it, evaluate removal alone. Three more things are done differently here.
- Probabilities outside [0, 1], which every odd order has in a tail, are moved to the nearest end: that brings them closer to
  the truth, so the error bound still holds. Without it a negative P[X > eps] creates delta out of nothing.
- delta(eps) may wiggle. The truth falls with eps, so what is inverted is the upper envelope, max of delta over eps' >= eps: its
  epsilon is the largest root. A smaller one would ignore larger values of delta that the same expansion gives.
- A correction of half or more is no correction: there is no figure then, but a reason.
"""

import math
from collections.abc import Sequence

from fedllm.privacy.accountants import EventCounts, check_delta, check_epsilon
from fedllm.privacy.accountants.cumulants import Phase
from fedllm.privacy.accountants.expansion import INFINITY, OVERFLOW, Direction, certain_deltas, directions, epsilon_of
from fedllm.privacy.answers import ESTIMATE, UNKNOWN, PrivacyAnswer
from fedllm.privacy.events import (
    REPLACE_ONE,
    Event,
    FixedSizeGaussianEvent,
    FreeEvent,
    GaussianEvent,
    TruncatedPoissonGaussianEvent,
    truncation_probability,
)

LARGEST_CORRECTION = 0.5  # of a probability
_TINY_VARIANCE = 1e-120  # its fifth standardised cumulant is divided by std^5
_HUGE_MU = 1e25  # the fifth moment of the loss is of order mu^10


class EdgeworthAccountant(EventCounts):
    """Estimates for Gaussian sums under both relations, and for Poisson-sampled ones under add-or-remove-one.

    A truncated Poisson cohort costs its plain one plus the mass T t by which the cut can be noticed (see pld.py). Exact, with
    an interval of no width, where nothing is sampled.
    """

    name = "edgeworth_0"
    order = 0
    conversion = "hockey-stick divergence"

    def refusal(self, event: Event) -> str | None:
        if isinstance(event, GaussianEvent | FreeEvent):
            return None
        if isinstance(event, FixedSizeGaussianEvent):
            return "no dominating pair for fixed-size cohorts, hence no loss to expand; the bound for them is RDP's"
        if getattr(event, "group", 1) > 1:
            return "the loss of a group under sampling is a mixture of many Gaussians; its cumulants are not implemented"
        if self.relation == REPLACE_ONE:
            return "with replace-one both outputs are mixtures; the cumulants are those of add-or-remove-one"
        return None

    def epsilon(self, delta: float) -> PrivacyAnswer:
        check_delta(delta)
        phases, lost, trouble = self._phases()
        if trouble or not phases:
            return self._estimate(None if trouble else 0.0, delta, trouble, None if trouble else (0.0, 0.0))
        left = delta - lost
        if left <= 0:
            return self._estimate(None, delta, f"the mass lost to truncation, {lost:.1e}, exceeds delta", (None, None))
        ways = directions(phases, self.order)
        interval, remark = _epsilon_interval(ways, left, lost)
        if too_large := _too_large(ways):
            return self._estimate(None, delta, _join(too_large, remark), interval)
        each = {name: epsilon_of(way, left) for name, way in ways.items()}
        if each["add"] > each["remove"] * (1 + 1e-9):
            remark = _join(f"adding a unit is the worse direction: removing one gives {each['remove']:.4f}", remark)
        best = max(each.values())
        return self._estimate(best, delta, remark, (best, best) if lost == 0 and _exact(ways) else interval)

    def delta(self, epsilon: float) -> PrivacyAnswer:
        import numpy as np

        check_epsilon(epsilon)
        phases, lost, trouble = self._phases()
        if trouble or not phases:
            known = 1.0 if trouble == "no noise" else None if trouble else 0.0
            return self._estimate(epsilon, known, trouble, None if known is None else (known, known))
        ways = directions(phases, self.order)
        interval, remark = _delta_interval(ways, epsilon, lost)
        if too_large := _too_large(ways):
            return self._estimate(epsilon, None, _join(too_large, remark), interval)
        if max(float(way.delta(np.asarray(epsilon))) for way in ways.values()) < 0:
            return self._estimate(epsilon, None, _join("the expansion gives a negative delta here", remark), interval)
        best = self.deltas([epsilon])[0]
        return self._estimate(epsilon, best, remark, (best, best) if lost == 0 and _exact(ways) else interval)

    def deltas(self, epsilons: Sequence[float]) -> list[float]:
        """The envelope, falling from point to point also where `delta` has no figure but a reason."""
        import numpy as np

        for epsilon in epsilons:
            check_epsilon(epsilon)
        phases, lost, trouble = self._phases()
        if trouble or not phases:
            return [1.0 if trouble else 0.0] * len(epsilons)
        at = np.minimum(np.asarray(epsilons, dtype=float), INFINITY)
        best = np.zeros(len(at))
        for way in directions(phases, self.order).values():
            points = np.unique(np.concatenate((way.grid(), at)))
            envelope = np.maximum.accumulate(way.delta(points)[::-1])[::-1]
            best = np.maximum(best, envelope[np.searchsorted(points, at)])
        return [min(1.0, float(value) + lost) for value in best]

    def _phases(self) -> tuple[list[Phase], float, str | None]:
        """What costs something, in one canonical order; the mass lost to truncation; why there can be no figure."""
        phases, lost = [], 0.0
        for event, count in sorted(self.counts.items(), key=repr):
            if isinstance(event, FreeEvent) or getattr(event, "sampling_rate", 1.0) == 0:
                continue
            if event.noise_multiplier == 0:
                return [], 0.0, "no noise"
            if isinstance(event, TruncatedPoissonGaussianEvent):
                lost += count * truncation_probability(event.population, event.sampling_rate, event.max_cohort)
            mu = self.factor * getattr(event, "sensitivity", 1.0) / event.noise_multiplier
            if mu > _HUGE_MU:
                return [], 0.0, "too little noise: the moments of the privacy loss overflow"
            phases.append(Phase(mu, getattr(event, "sampling_rate", 1.0), count))
        smallest = min((getattr(p.pair, side).cumulants[1] for p in phases for side in ("without", "with_unit")), default=1.0)
        if smallest < _TINY_VARIANCE:
            return [], 0.0, "the variance of the privacy loss underflows: no expansion around a normal distribution"
        return phases, lost, None

    def _estimate(self, epsilon, delta, reason=None, interval=None) -> PrivacyAnswer:
        return self._answer(epsilon, delta, reason, kind=ESTIMATE, direction=UNKNOWN, interval=interval)


class Edgeworth1(EdgeworthAccountant):
    """Order 1: the skewness. What EW-Tune calibrates with."""

    name = "edgeworth_1"
    order = 1


class Edgeworth2(EdgeworthAccountant):
    """Order 2: skewness and kurtosis."""

    name = "edgeworth_2"
    order = 2


class Edgeworth3(EdgeworthAccountant):
    """Order 3: up to the fifth cumulant."""

    name = "edgeworth_3"
    order = 3


def _exact(ways: dict[str, Direction]) -> bool:
    """Whether the loss is normal, so that every order of the expansion is its CDF."""
    return all(part.error == 0 for way in ways.values() for part in (way.y, way.x))


def _too_large(ways: dict[str, Direction]) -> str | None:
    largest = max(part.largest_correction() for way in ways.values() for part in (way.y, way.x))
    if largest < LARGEST_CORRECTION:
        return None
    return f"too few effective steps: the expansion corrects a probability by {largest:.2g}"


def _epsilon_interval(ways: dict[str, Direction], delta: float, lost: float):
    """((low, high), remark): ends that hold for certain, None where vacuous. lost: what truncation may take off as well."""
    import numpy as np

    lows, highs = [], []
    for way in ways.values():
        grid = way.y.grid()
        low, high = certain_deltas(way.y, grid)
        # With a cut at hand both probabilities may be smaller by `lost`, which delta + lost has already paid for once.
        low = low - lost * (2 + np.exp(np.minimum(grid, OVERFLOW)))
        lows += grid[low >= delta][-1:].tolist()
        highs.append(next(iter(grid[high <= delta].tolist()), None))
    high = None if None in highs else max(highs)
    # With nothing to say from below, 0 is trivial: it is an answer only where the upper end agrees.
    interval = (max(lows) if lows else 0.0 if high == 0 else None, high)
    return interval, _vacuous(ways, f"delta {delta:.1e}") if None in interval else None


def _delta_interval(ways: dict[str, Direction], epsilon: float, lost: float):
    """The same for delta at `epsilon`."""
    import numpy as np

    epsilon = min(epsilon, INFINITY)
    lows, highs = [], []
    for way in ways.values():
        grid = way.y.grid()
        low, high = certain_deltas(way.y, np.concatenate(([epsilon], grid[grid > epsilon])))
        lows.append(float(low[0]) - lost * (1 + math.exp(min(epsilon, OVERFLOW))))
        highs.append(float(high[0]) + lost)
    low, high = max(lows), max(highs)
    interval = (low if low > 0 or high <= 0 else None, high if high < 1 else None)
    return interval, _vacuous(ways, "delta") if None in interval else None


def _vacuous(ways: dict[str, Direction], against: str) -> str:
    error = max(way.y.error for way in ways.values())
    return f"finite-sample bound vacuous: the loss's CDF is known to {error:.1e}, against {against}"


def _join(*remarks: str | None) -> str:
    return "; ".join(remark for remark in remarks if remark)
