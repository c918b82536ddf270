"""The lower bound beside the privacy loss distribution's upper one: how much of a quoted epsilon is discretisation."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedllm.privacy.accountants.pld import FAILURES, GRID, MAX_NOISE, Counts, PldAccountant, curves_of, epsilon_of, merged
from fedllm.privacy.accountants.pld_fallback import Fallback, closed_form, fallback_deltas, too_large
from fedllm.privacy.answers import LOWER, PrivacyAnswer
from fedllm.privacy.events import GaussianEvent, PoissonGaussianEvent, TruncatedPoissonGaussianEvent, truncation_probability

if TYPE_CHECKING:
    from fedllm.privacy.accountants.pld_compose import Curve

FAILED_SHARE = 1e-4  # share of delta that the concentration inequality may fail with
GAP = 1e-3  # share of epsilon that the bound aims to stay below the upper one
NO_GRID = "no grid holds the distribution: no lower bound"
REFERENCE_DELTA = 1e-5  # the grid is chosen for the epsilon at this delta


def kept_rate(event: TruncatedPoissonGaussianEvent) -> float:
    """P[a unit is sampled and survives the cut] = q P[K < M] + M/N P[cohort > M], K the number of others sampled."""
    spared = 1 - truncation_probability(event.population, event.sampling_rate, event.max_cohort)
    above = truncation_probability(event.population + 1, event.sampling_rate, event.max_cohort + 1)
    return min(event.sampling_rate * spared + event.max_cohort / event.population * above, event.sampling_rate)


class PldOptimistic(PldAccountant):
    """Lower bounds: some pair of neighbouring data sets really has this much privacy loss.

    The pairs of pld_pairs.py are attained (all other contributions zero, the unit's always the same), under a cut as well:
    there a lone contribution is in the sum at the rate with which it is sampled and kept.
    Discretisation moves a loss L to Y in {y, y + g} around it with E[exp(-Y)] = exp(-L), hence 0 <= E[Y - L] <= g^2/8 and, by
    Hoeffding's inequality, T losses move up by more than t = g sqrt(T log(1/eta) / 2) + T g^2/8 with probability eta at
    most: delta(eps) >= delta_grid(eps + t) - eta. The grid is chosen so fine that t is about 0.1 % of epsilon.
    """

    name = "pld_optimistic"
    conversion = "hockey-stick divergence, less Hoeffding's bound on the grid"

    def _answer(self, epsilon: float | None, delta: float | None, reason: str | None = None, **changes) -> PrivacyAnswer:
        return super()._answer(epsilon, delta, reason, **{"direction": LOWER, **changes})

    def _epsilon_of(self, counts: Counts, delta: float) -> PrivacyAnswer:
        curves, how = self._lower_curves(counts)
        if curves is None:
            if how is None:
                return self._answer(None, delta, NO_GRID)
            exact = closed_form(counts, self.relation, delta)
            if math.isinf(exact):
                return self._answer(None, delta, "overflow: no finite epsilon")
            return self._answer(exact * (1 - 1e-9), delta, **how.labels())
        releases = sum(count for _, count in merged(counts))
        eta = FAILED_SHARE * delta
        lowest = max(curve.epsilon(delta + eta, -1.0) - _lift(curve.grid, releases, eta) for curve in curves)
        return self._answer(max(lowest, 0.0), delta)

    def _deltas_of(self, counts: Counts, epsilons: Sequence[float]) -> tuple[list[float], Fallback | None]:
        import numpy as np

        curves, how = self._lower_curves(counts)
        if curves is None:
            if how is None:
                return [0.0] * len(epsilons), Fallback(NO_GRID, "none")
            found, _ = fallback_deltas(counts, self.relation, epsilons, "")
            return [delta * (1 - 1e-9) for delta in found], how
        releases = sum(count for _, count in merged(counts))
        at, best = np.asarray(epsilons, dtype=float), np.zeros(len(epsilons))
        for curve in curves:
            eta = FAILED_SHARE * np.maximum(curve.deltas(at, -1.0), 1e-300)
            lift = np.array([_lift(curve.grid, releases, one) for one in eta])
            best = np.maximum(best, curve.deltas(at + lift, -1.0) - eta)
        return np.maximum(best, 0.0).tolist(), None

    def _lower_curves(self, counts: Counts) -> "tuple[tuple[Curve, ...] | None, Fallback | None]":
        """Curves on a grid fine enough; or None and, where all are unsampled, that the closed form will do."""
        rated = {
            event: PoissonGaussianEvent(event.noise_multiplier, kept_rate(event))
            for event, _ in counts
            if isinstance(event, TruncatedPoissonGaussianEvent)
        }
        counts = tuple((rated.get(event, event), count) for event, count in counts)
        if any(event.noise_multiplier > MAX_NOISE for event, _ in merged(counts)):
            return None, None  # taken for less noise there: no lower bound
        if too_large(counts, self.relation):
            unsampled = all(isinstance(event, GaussianEvent) for event, _ in counts)
            return None, Fallback("exact: nothing is sampled", "closed form") if unsampled else None
        try:
            upper, _ = epsilon_of(counts, self.relation, GRID, REFERENCE_DELTA)
            releases = sum(count for _, count in merged(counts))
            wanted = GAP * upper / _lift(1.0, releases, FAILED_SHARE * REFERENCE_DELTA, drift=False)
            halvings = min(max(math.ceil(math.log2(GRID / wanted)), 2), 10) if 0 < wanted < math.inf else 2
            return curves_of(counts, self.relation, GRID / 2**halvings, False), None
        except FAILURES:
            return None, None


def _lift(grid: float, releases: int, eta: float, drift: bool = True) -> float:
    """t of the class above."""
    return grid * math.sqrt(releases * math.log(1 / eta) / 2) + (releases * grid**2 / 8 if drift else 0.0)
