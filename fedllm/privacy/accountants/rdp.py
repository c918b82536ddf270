"""Renyi differential privacy: bounds by the best order, with the improved and with the classic conversion.

With alpha = 1 + s and the composition's cumulant K(s) = s D_{1+s} (renyi.py), for every s > 0

    classic    delta = exp(K(s) - s epsilon)                                       Mironov (2017), proposition 3
    improved   delta = exp(K(s) - s epsilon + s log s - (1 + s) log(1 + s))        Canonne, Kamath and Steinke (2020),
                                                                                   proposition 12; Balle et al. (2020)
and the improved conversion also knows that delta(epsilon) <= total variation <= min(sqrt(KL/2), sqrt(1 - exp(-KL))).

Truncated Poisson samples. As in pld.py let t = P[a cut can touch the sum]. Either T t is paid out of delta and the rest is
plain Poisson, or, as exp K is jointly convex, one release has exp K <= (1-t) exp K_poisson + t (1 - q + q exp K_2), where
K_2 belongs to a replacement (2C). The better of the two is the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from fedllm.privacy.accountants import EventCounts, check_delta, check_epsilon
from fedllm.privacy.accountants.renyi import (
    fixed_size_cumulant,
    gaussian_cumulant,
    mixture_cumulant,
    poisson_cumulant,
)
from fedllm.privacy.answers import PrivacyAnswer
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    Event,
    FixedSizeGaussianEvent,
    FreeEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    relation_factor,
    truncation_probability,
    without_cut,
)

Counts = tuple[tuple[Event, int], ...]

# Orders 1 + s are searched on one lattice, s = MIN_S exp(STEP i), so that epsilon(delta) and delta(epsilon) invert each
# other (to STEP^2 in log delta) and neighbouring points of a curve share their work.
MIN_S, MAX_S = 1e-7, 1e9
STEP = 2e-3
COARSE = 512  # first look: every so many points of the lattice
_POINTS = math.ceil(math.log(MAX_S / MIN_S) / STEP / COARSE) * COARSE + 1


def classic_term(s: float) -> float:
    """What the classic conversion adds to K(s): nothing."""
    return 0.0


def improved_term(s: float) -> float:
    """s log s - (1 + s) log(1 + s) <= 0, without cancellation for large s."""
    return -s * math.log1p(1 / s) - math.log1p(s)


def total_variation(s: float, cumulant: float) -> float:
    """Bound on the total variation from K(s), as KL <= D_{1+s}: Pinsker's and that of Bretagnolle and Huber."""
    divergence = cumulant / s
    return min(math.sqrt(divergence / 2), math.sqrt(-math.expm1(-divergence)))


def as_gaussian(event: Event) -> Event:
    """A sampled event in which every unit takes part, as what it is; any other event unchanged."""
    if isinstance(event, PoissonGaussianEvent) and event.sampling_rate == 1:
        return GaussianEvent(event.noise_multiplier, float(event.group))
    if isinstance(event, FixedSizeGaussianEvent) and event.cohort == event.population:
        return GaussianEvent(event.noise_multiplier)
    return event


def event_cumulant(event: Event, s: float, relation: str) -> float:
    """K(s) of one release with noise that an `RdpAccountant` accepts; the convention 'replace-one means 2C' is here."""
    mu = relation_factor(relation) / event.noise_multiplier
    event = as_gaussian(event)
    if isinstance(event, GaussianEvent):
        return gaussian_cumulant(s, mu * event.sensitivity)
    if isinstance(event, FixedSizeGaussianEvent):
        return fixed_size_cumulant(s, mu, event.cohort / event.population)
    plain = poisson_cumulant(s, mu, event.sampling_rate)
    if isinstance(event, PoissonGaussianEvent):
        return plain
    cut = truncation_probability(event.population, event.sampling_rate, event.max_cohort)
    replaced = mixture_cumulant((1 - event.sampling_rate, 0.0), (event.sampling_rate, gaussian_cumulant(s, 2 * mu)))
    return mixture_cumulant((1 - cut, plain), (cut, replaced))


class CumulantLattice:
    """K of one composition on the lattice of orders, computed where it is looked at and kept."""

    def __init__(self, counts: Counts, relation: str, orders: tuple[float, ...] | None) -> None:
        self.counts, self.relation = counts, relation
        self.known: dict[int, float] = {}
        self.s = [order - 1 for order in orders] if orders else None
        self.points = len(orders) if orders else _POINTS

    def order(self, index: int) -> float:
        """s of a lattice point, ascending in `index`."""
        return self.s[index] if self.s else MIN_S * math.exp(STEP * index)

    def cumulant(self, index: int) -> float:
        if index not in self.known:
            s = self.order(index)
            self.known[index] = math.fsum(
                count * event_cumulant(event, s, self.relation) for event, count in self.counts
            )
        return self.known[index]

    def least(self, objective) -> tuple[float, int]:
        """(minimum, its index) of objective(s, K(s)), which has one valley: K is convex, and so are both conversions."""

        def at(index: int) -> float:
            return objective(self.order(index), self.cumulant(index))

        stride = 1 if self.s else COARSE
        best = min(range(0, self.points, stride), key=at)
        if stride > 1:
            low, high = max(best - stride, 0), min(best + stride, self.points - 1)
            while low < high:
                middle = (low + high) // 2
                low, high = (low, middle) if at(middle) <= at(middle + 1) else (middle + 1, high)
            best = min(best, low, key=at)
        return at(best), best


@lru_cache(maxsize=32)
def _lattice(counts: Counts, relation: str, orders: tuple[float, ...] | None) -> CumulantLattice:
    return CumulantLattice(counts, relation, orders)


class RdpAccountant(EventCounts):
    """Upper bounds for Gaussian (both relations), Poisson and truncated Poisson (add/remove) and fixed-size events
    (replace-one), with the improved conversion. Deltas as small as 1e-300, any epsilon.
    """

    name = "rdp"
    conversion_name = "improved (CKS 2020)"
    term = staticmethod(improved_term)
    knows_total_variation = True

    def __init__(self, relation: str = ADD_REMOVE, orders: Sequence[float] | None = None) -> None:
        """orders: look at these orders > 1 only (to repeat figures of other libraries); else the best real order."""
        super().__init__(relation)
        if orders is not None and (not len(orders) or not all(1 < order < math.inf for order in orders)):
            raise ValueError(f"Expected orders={list(orders)} to be finite and > 1, at least one")
        self.orders = tuple(sorted(orders)) if orders is not None else None

    @property
    def conversion(self) -> str:
        return self.conversion_name

    def refusal(self, event: Event) -> str | None:
        event = as_gaussian(event)
        if isinstance(event, FixedSizeGaussianEvent):
            return None if self.relation == REPLACE_ONE else "adding a unit would change the cohort: only replace-one here"
        if isinstance(event, GaussianEvent | FreeEvent):
            return None
        if self.relation == REPLACE_ONE:
            return "no valid theorem here for Poisson sampling with replace-one; PLD has one"
        return "no valid theorem here for groups under sampling" if getattr(event, "group", 1) > 1 else None

    def epsilon(self, delta: float) -> PrivacyAnswer:
        check_delta(delta)
        counts = self._costly()
        if any(event.noise_multiplier == 0 for event, _ in counts):
            return self._answer(None, delta, "no noise")
        if not counts:
            return self._answer(0.0, delta)
        found = [self._epsilon(kept, delta - lost) for kept, lost in self._readings(counts) if lost < delta]
        epsilon, how = min(found, key=lambda pair: pair[0])
        if math.isinf(epsilon):
            return self._answer(None, delta, "overflow: no finite epsilon")
        return self._answer(epsilon, delta, conversion=how)

    def delta(self, epsilon: float) -> PrivacyAnswer:
        check_epsilon(epsilon)
        counts = self._costly()
        if any(event.noise_multiplier == 0 for event, _ in counts):
            return self._answer(epsilon, 1.0, "no noise")
        if not counts or math.isinf(epsilon):
            return self._answer(epsilon, 0.0)
        readings = [(self._delta(kept, epsilon), lost) for kept, lost in self._readings(counts)]
        delta, how = min((min(1.0, delta + lost), how) for (delta, how), lost in readings)
        return self._answer(epsilon, delta, conversion=how)

    def _epsilon(self, counts: Counts, delta: float) -> tuple[float, str]:
        lattice = _lattice(counts, self.relation, self.orders)
        if self.knows_total_variation and total_variation(lattice.order(0), lattice.cumulant(0)) <= delta:
            return 0.0, f"{self.conversion_name}, total variation"
        log_delta = math.log(delta)
        epsilon, index = lattice.least(lambda s, cumulant: (cumulant - log_delta + self.term(s)) / s)
        return max(0.0, epsilon), self._named(lattice.order(index))

    def _delta(self, counts: Counts, epsilon: float) -> tuple[float, str]:
        lattice = _lattice(counts, self.relation, self.orders)
        log_delta, index = lattice.least(lambda s, cumulant: cumulant - s * epsilon + self.term(s))
        delta = math.exp(min(log_delta, 0.0))
        if self.knows_total_variation:
            variation = total_variation(lattice.order(0), lattice.cumulant(0))
            if variation < delta:
                return variation, f"{self.conversion_name}, total variation"
        return delta, self._named(lattice.order(index))

    def _named(self, s: float) -> str:
        return f"{self.conversion_name}, order {f'{1 + s:.4g}' if s >= 0.01 else f'1 + {s:.2g}'}"

    def _readings(self, counts: Counts) -> list[tuple[Counts, float]]:
        """(composition, delta that it costs beside): cuts paid out of delta, and if there are any, bounded in K."""
        plain, lost = without_cut(counts)
        return [(plain, lost), (counts, 0.0)] if lost else [(plain, 0.0)]


class ClassicRdpAccountant(RdpAccountant):
    """The same with Mironov's conversion, epsilon = D_alpha + log(1/delta)/(alpha - 1): what older tools print."""

    name = "rdp_classic"
    conversion_name = "classic (Mironov 2017)"
    term = staticmethod(classic_term)
    knows_total_variation = False
