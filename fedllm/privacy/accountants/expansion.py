"""Edgeworth expansions of a summed privacy loss, and what they say of delta and epsilon: the arithmetic of edgeworth.py.

With K1..K5 the cumulants of the sum, s = K2^(-1/2), g_j = s^j K_j, z = s (x - K1) and He_j the Hermite polynomials, the
expansion of order 1, 2, 3 is (Wang et al., arXiv 2206.04236; Petrov, Sums of Independent Random Variables, chapter VI)

    F(x) = Phi(z) - phi(z) [ g3 He2/6 | + g4 He3/24 + g3^2 He5/72 | + g5 He4/120 + g3 g4 He6/144 + g3^3 He8/1296 ].

delta(eps) = P[Y > eps] - e^eps P[X > eps], Y and X the loss with and without the unit.

Error bound. e >= sup |F - F_k| is the smaller of sup |F - Phi| + sup |correction|, the first by Berry and Esseen
(berry_esseen.py) and the second from the zeros of its derivative, and of Prawitz' inequality with the characteristic function
of the sum itself (smoothing.py); both hold for every number of steps. The published bound puts e_Y and e^eps e_X into
delta. But delta(eps) = E[(1 - e^(eps - Y))+] is the integral over u > 0 of e^-u P[Y > eps + u]: an average of survival probabilities of Y
alone, so it is known to within e_Y, at any eps. Where e_Y exceeds delta even that is vacuous, which in practice it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.privacy.accountants.berry_esseen import normal_error
from fedllm.privacy.accountants.cumulants import ORDER, LossMoments, Phase
from fedllm.privacy.accountants.smoothing import smoothing_error

REACH = 40.0  # standard deviations that are searched for roots: exp(-40^2/2) underflows
STEP = 0.02  # of that search, in standard deviations; a wiggle of degree 9 is wider
REFINEMENTS, REFINED = 6, 200  # each bracket of a root is divided again: 200^5 times in all
OVERFLOW = 600.0
INFINITY = 1e100  # an epsilon whose square is still finite


@dataclass(frozen=True)
class Expansion:
    """One expanded distribution. correction: of F, over phi(z), coefficients in z from degree 0. error: sup |F - F_k| at most."""

    mean: float
    std: float
    correction: tuple[float, ...]
    error: float

    def survival(self, x, log_scale=0.0):
        """P[loss > x] times exp(log_scale), moved into [0, 1] before the scaling; arrays of one shape."""
        import numpy as np
        from scipy.special import log_ndtr

        x = np.minimum(x, INFINITY)
        log_scale = np.minimum(log_scale, INFINITY)
        z = (x - self.mean) / self.std
        normal = np.exp(np.minimum(log_ndtr(-z) + log_scale, OVERFLOW))
        change = np.exp(np.minimum(log_scale - z * z / 2, OVERFLOW)) * self._polynomial(z)
        return np.clip(normal - change, 0.0, np.exp(np.minimum(log_scale, OVERFLOW)))

    def largest_correction(self) -> float:
        """sup |phi(z) P(z)| over all z."""
        return largest_value(self.correction)

    def grid(self):
        """Ascending points >= 0 across the whole distribution, 0 among them."""
        import numpy as np

        points = self.mean + self.std * np.arange(-REACH, REACH, STEP)
        return np.concatenate(([0.0], points[points > 0]))

    def _polynomial(self, z):
        import numpy as np

        return np.polynomial.polynomial.polyval(np.clip(z, -1e6, 1e6), self.correction) / math.sqrt(2 * math.pi)


def correction_polynomial(cumulants: Sequence[float], order: int) -> tuple[float, ...]:
    """P(z) with F = Phi + phi P, coefficients from degree 0; cumulants: K1..K5 of the sum; order: 0 .. 3."""
    from numpy.polynomial import hermite_e

    scale = 1 / math.sqrt(cumulants[1])
    g3, g4, g5 = (cumulants[j - 1] * scale**j for j in (3, 4, 5))
    by_degree = [0.0] * 9
    if order >= 1:
        by_degree[2] -= g3 / 6
    if order >= 2:
        by_degree[3] -= g4 / 24
        by_degree[5] -= g3**2 / 72
    if order >= 3:
        by_degree[4] -= g5 / 120
        by_degree[6] -= g3 * g4 / 144
        by_degree[8] -= g3**3 / 1296
    return tuple(float(c) for c in hermite_e.herme2poly(by_degree)) if order else (0.0,)


def largest_value(polynomial: Sequence[float]) -> float:
    """sup over z of |phi(z) P(z)|: at the zeros of P' - z P."""
    import numpy as np
    from numpy.polynomial import polynomial as poly

    if not any(polynomial):
        return 0.0
    # Cutting the exact zeros at the top keeps the companion matrix finite.
    derivative = np.trim_zeros(poly.polysub(poly.polyder(polynomial), poly.polymulx(polynomial)), "b")
    z = np.real(poly.polyroots(derivative))
    return float(np.max(np.abs(poly.polyval(z, polynomial)) * np.exp(-z * z / 2))) / math.sqrt(2 * math.pi)


def expand(phases: Sequence[Phase], order: int, with_unit: bool, negated: bool) -> Expansion:
    """The expansion of the summed loss under one hypothesis, or of its negative; at least one phase."""
    kinds: list[tuple[int, float, float]] = []
    totals, gaussian_variance = [0.0] * ORDER, 0.0
    for phase in phases:
        moments: LossMoments = phase.pair.with_unit if with_unit else phase.pair.without
        totals = [total + phase.count * k for total, k in zip(totals, moments.cumulants, strict=True)]
        if phase.gaussian:
            gaussian_variance += phase.count * moments.cumulants[1]
        else:
            kinds.append((phase.count, moments.cumulants[1], moments.third))
    polynomial = correction_polynomial(totals, order)
    error = 0.0
    if kinds:
        error = min(1.0, normal_error(kinds, gaussian_variance) + largest_value(polynomial))
        error = min(error, smoothing_error(tuple(phases), with_unit, tuple(totals), order))
    if negated:  # F(x) becomes 1 - F(-x): neither the size of a correction nor that of an error changes
        totals[0] = -totals[0]
        polynomial = tuple(c * (-1) ** (degree + 1) for degree, c in enumerate(polynomial))
    return Expansion(totals[0], math.sqrt(totals[1]), polynomial, error)


@dataclass(frozen=True)
class Direction:
    """One neighbour against the other: y is the loss where the outputs come from, x where delta compares them with."""

    y: Expansion
    x: Expansion

    def delta(self, epsilon):
        """P[Y > eps] - e^eps P[X > eps] by the expansions; may be negative. Array of any shape."""
        return self.y.survival(epsilon) - self.x.survival(epsilon, epsilon)

    def delta_upper(self, epsilon):
        """The published upper bound on delta, 1 - F_Y + e_Y - e^eps (1 - F_X - e_X); array of any shape."""
        import numpy as np

        scale = np.exp(np.minimum(epsilon, OVERFLOW))
        return self.delta(epsilon) + self.y.error + scale * self.x.error

    def grid(self):
        """Ascending epsilons >= 0 that reach beyond every root and miss no wiggle."""
        import numpy as np

        steps = np.arange(-REACH, REACH, STEP)
        # e^eps P[X > eps] is the tail of X tilted by e^eps, whose mean is about K1 + K2.
        centres = (self.y.mean, self.y.std), (self.x.mean, self.x.std), (self.x.mean + self.x.std**2, self.x.std)
        points = np.concatenate([[0.0], *(mean + std * steps for mean, std in centres)])
        return np.unique(points[points >= 0])


def directions(phases: Sequence[Phase], order: int) -> dict[str, Direction]:
    """Removing and adding a unit, by name."""
    return {
        "remove": Direction(expand(phases, order, True, False), expand(phases, order, False, False)),
        "add": Direction(expand(phases, order, False, True), expand(phases, order, True, True)),
    }


def last_crossing(curve, grid, target: float) -> float | None:
    """The largest epsilon at which `curve` is still `target` or more; None where it never is on the ascending grid."""
    import numpy as np

    for _ in range(REFINEMENTS):
        reached = np.nonzero(curve(grid) >= target)[0]
        if not len(reached):
            return None
        last = reached[-1]
        if last + 1 == len(grid):
            break
        grid = np.linspace(grid[last], grid[last + 1], REFINED)
    return float(grid[last])


def certain_deltas(y: Expansion, grid):
    """(low, high): bounds on delta(eps) at each point of an ascending grid, from P[Y > .] known to within y.error.

    The integral of e^-u P[Y > eps + u] by its lower and upper Riemann sums, since P falls: no quadrature error to be trusted.
    """
    import numpy as np

    survival = y.survival(grid)
    below = np.maximum.accumulate(np.maximum(survival - y.error, 0.0)[::-1])[::-1].tolist()
    above = np.minimum.accumulate(np.minimum(survival + y.error, 1.0)).tolist()
    keep = np.exp(-np.diff(grid)).tolist()
    low, high = [0.0] * len(grid), above.copy()
    for i in range(len(keep) - 1, -1, -1):
        low[i] = keep[i] * low[i + 1] + (1 - keep[i]) * below[i + 1]
        high[i] = keep[i] * high[i + 1] + (1 - keep[i]) * above[i]
    return np.array(low), np.array(high)


def epsilon_of(direction: Direction, delta: float) -> float:
    """The direction's own epsilon >= 0: the largest root, 0 where the expansion stays below `delta`."""
    return last_crossing(direction.delta, direction.grid(), delta) or 0.0
