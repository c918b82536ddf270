"""Privacy loss distributions by Google's dp-accounting: pessimistic, on one grid, for everything that is calibrated,
guarded or quoted.

Truncation. Let K be the number of *other* units sampled in a round; its law is the same for two neighbouring data sets.
If K < M no cut can touch the sum, and given K the pair is the plain Poisson pair. With t = P[K >= M], giving up
entirely on the other case (an infinite privacy loss of mass t) dominates the truth, so T rounds satisfy

    delta_truncated(eps) <= (1 - (1-t)^T) + (1-t)^T delta_poisson(eps) <= T t + delta_poisson(eps).

That bound costs nothing to compute and is used while all such T t together are at most 1 % of delta, which
`noise.default_max_cohort` ensures; otherwise the distribution for truncated sampling (dp-accounting, after arXiv
2508.15089) is built: in the case K >= M a unit's presence *replaces* another's, hence sensitivity 2. It takes four
times as long.
"""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from fedllm.privacy.accountants import EventCounts, check_delta, check_epsilon
from fedllm.privacy.accountants.gdp import gdp_delta, gdp_epsilon
from fedllm.privacy.answers import PrivacyAnswer
from fedllm.privacy.events import (
    ADD_REMOVE,
    Event,
    FixedSizeGaussianEvent,
    FreeEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    relation_factor,
    truncation_probability,
)

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# One grid for everything quoted. Rounding is pessimistic; on half of it, figures above 0.2 move by less than 1e-4.
GRID = 2e-4
MIN_DELTA = 1e-12  # below this the rounding errors of the FFT (about 1e-15) are no longer negligible
MAX_LOSS = 2000.0  # larger privacy losses are not put on the grid: see `_too_large`
CUT_SHARE = 0.01  # share of delta that truncation may take before the exact distribution is worth its time

Counts = tuple[tuple[Event, int], ...]


def _neighbours(relation: str):
    from dp_accounting.privacy_accountant import NeighboringRelation

    # dp-accounting's PLD doubles the sensitivity for REPLACE_ONE by itself: events carry 1 in both cases.
    return NeighboringRelation.ADD_OR_REMOVE_ONE if relation == ADD_REMOVE else NeighboringRelation.REPLACE_ONE


@lru_cache(maxsize=4)
def _single(event: Event, relation: str, grid: float) -> "PrivacyLossDistribution":
    """The distribution of one release."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    common = {"value_discretization_interval": grid, "neighboring_relation": _neighbours(relation)}
    if isinstance(event, TruncatedPoissonGaussianEvent):
        return pld.from_truncated_subsampled_gaussian_mechanism(
            event.population, event.sampling_rate, event.max_cohort, event.noise_multiplier, **common
        )
    rate = event.sampling_rate if isinstance(event, PoissonGaussianEvent) else 1.0
    return pld.from_gaussian_mechanism(event.noise_multiplier, sampling_prob=rate, **common)


@lru_cache(maxsize=8)
def _self_composed(event: Event, count: int, relation: str, grid: float) -> "PrivacyLossDistribution":
    return _single(event, relation, grid).self_compose(count)


def _composed(counts: Counts, relation: str, grid: float) -> "PrivacyLossDistribution":
    """The distribution of a whole composition, in the order given; unsampled Gaussians are merged exactly first."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    result = pld.identity(grid)
    mu_squared = 0.0
    for event, count in counts:
        if isinstance(event, GaussianEvent):
            mu_squared += count * (event.sensitivity / event.noise_multiplier) ** 2
        else:
            result = result.compose(_self_composed(event, count, relation, grid))
    if mu_squared:
        result = result.compose(_single(GaussianEvent(1 / math.sqrt(mu_squared)), relation, grid))
    return result


def _without_cut(counts: Counts) -> tuple[Counts, float]:
    """Truncated events as plain Poisson ones, with the delta that pays for it."""
    plain: dict[Event, int] = {}
    lost = 0.0
    for event, count in counts:
        if isinstance(event, TruncatedPoissonGaussianEvent):
            lost += count * truncation_probability(event.population, event.sampling_rate, event.max_cohort)
            event = PoissonGaussianEvent(event.noise_multiplier, event.sampling_rate)
        plain[event] = plain.get(event, 0) + count
    return tuple(plain.items()), lost


def _unamplified_mu(counts: Counts, relation: str) -> float:
    """mu if every cohort were public: sampling never costs, by joint convexity, and a cut at most a replacement, 2."""
    factor = relation_factor(relation)
    total = 0.0
    for event, count in counts:
        sensitivity = getattr(event, "sensitivity", 1.0) * factor
        if isinstance(event, TruncatedPoissonGaussianEvent):
            sensitivity = 2.0
        total += count * (sensitivity / event.noise_multiplier) ** 2
    return math.sqrt(total)


def _too_large(counts: Counts, relation: str) -> bool:
    """Whether the composed loss, roughly, runs beyond MAX_LOSS, where a grid costs gigabytes."""
    factor = relation_factor(relation)
    total = 0.0
    for event, count in counts:
        mu = factor * getattr(event, "sensitivity", 1.0) / event.noise_multiplier
        if isinstance(event, GaussianEvent):
            total += count * mu * mu / 2 + 9 * math.sqrt(count) * mu
        else:
            expected = count * event.sampling_rate
            hits = min(count, expected + 8 * math.sqrt(expected) + 4)
            total += hits * mu * mu / 2 + 9 * math.sqrt(hits) * mu
    return total > MAX_LOSS


@lru_cache(maxsize=1024)
def _epsilon(counts: Counts, relation: str, grid: float, delta: float) -> tuple[float, bool]:
    """(epsilon, whether sampling was accounted for)."""
    plain, lost = _without_cut(counts)
    if lost <= CUT_SHARE * delta:
        counts, delta = plain, delta - lost
    if _too_large(counts, relation):
        return gdp_epsilon(_unamplified_mu(counts, relation), delta), False
    return _composed(counts, relation, grid).get_epsilon_for_delta(delta), True


def _delta(counts: Counts, relation: str, grid: float, epsilon: float) -> float:
    plain, lost = _without_cut(counts)
    candidates = []
    if lost:
        candidates.append(_delta_plain(plain, relation, grid, epsilon) + lost)
    if not lost or lost > CUT_SHARE * candidates[0]:
        candidates.append(_delta_plain(counts, relation, grid, epsilon))
    return min(1.0, *candidates)


def _delta_plain(counts: Counts, relation: str, grid: float, epsilon: float) -> float:
    if _too_large(counts, relation):
        return gdp_delta(_unamplified_mu(counts, relation), epsilon)
    return float(_composed(counts, relation, grid).get_delta_for_epsilon(epsilon))


class PldAccountant(EventCounts):
    """Upper bounds for Gaussian, Poisson and truncated Poisson events, add/remove (the worse direction) or replace-one.

    Accuracy: delta >= 1e-12; epsilon within 1e-4 relative of the limit of fine grids for epsilon > 0.2, looser (never
    lower) below.
    Where the privacy loss runs into thousands the amplification by sampling is given up: the answer is then exact GDP,
    and says so.
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
        if getattr(event, "group", 1) > 1:
            return "group privacy under sampling"
        return None

    def epsilon(self, delta: float) -> PrivacyAnswer:
        check_delta(delta)
        if delta < MIN_DELTA:
            raise ValueError(f"Expected delta={delta} >= {MIN_DELTA} for the accountant pld")
        counts = self._costly()
        if any(event.noise_multiplier == 0 for event, _ in counts):
            return self._answer(None, delta, "no noise")
        if not counts:
            return self._answer(0.0, delta)
        epsilon, sampled = _epsilon(counts, self.relation, self.grid, delta)
        if math.isinf(epsilon):
            return self._answer(None, delta, "no finite epsilon at this delta")
        if not sampled:
            return self._answer(
                epsilon, delta, "without amplification by sampling: too little noise", conversion="closed form"
            )
        return self._answer(float(epsilon), delta)

    def delta(self, epsilon: float) -> PrivacyAnswer:
        check_epsilon(epsilon)
        counts = self._costly()
        if any(event.noise_multiplier == 0 for event, _ in counts):
            return self._answer(epsilon, 1.0, "no noise")
        return self._answer(epsilon, _delta(counts, self.relation, self.grid, epsilon) if counts else 0.0)

    def _costly(self) -> Counts:
        """Events that cost something, in one canonical order: calibration, guard and report agree to the last bit."""
        kept = [
            (event, count)
            for event, count in self.counts.items()
            if not isinstance(event, FreeEvent) and getattr(event, "sampling_rate", 1.0) > 0
        ]
        return tuple(sorted(kept, key=repr))
