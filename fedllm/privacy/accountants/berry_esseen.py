"""How far the CDF of a sum can be from a normal one, for every number of summands: the Berry-Esseen theorem.

For n identically distributed summands with variance s^2 and beta = E|X - E X|^3 / s^3, and Phi with the sum's own mean and
variance, Shevtsova, "On the absolute constants in the Berry-Esseen-type inequalities" (arXiv 1111.6554), theorem 1:

    sup |F - Phi| <= min(0.4690 beta, 0.3322 (beta + 0.429), 0.3031 (beta + 0.646)) / sqrt(n),

and for summands that differ, Shevtsova (Doklady Mathematics 82, 2010): sup |F - Phi| <= 0.5600 sum E|X_i - E X_i|^3 / B^3 with
B^2 the sum's variance. A Gaussian summand N(0, v) is the sum of m Gaussians of variance v/m, whose third moments add up to
O(m^(-1/2)): in the limit it enters B alone. Convolving F and Phi with one more variable brings them no further apart, so
kinds of summands may also be made normal one after the other, and the sum of their own bounds is a bound.
"""

import math
from collections.abc import Sequence

_IDENTICAL = ((0.4690, 0.0), (0.3322, 0.429), (0.3031, 0.646))  # (factor, what is added to beta)
_DIFFERENT = 0.5600


def identical_error(count: int, variance: float, third: float) -> float:
    """The bound for `count` >= 1 summands of one kind; third: E|X - E X|^3. At most 1."""
    beta = third / variance**1.5
    return min(1.0, *(factor * (beta + plus) / math.sqrt(count) for factor, plus in _IDENTICAL))


def normal_error(kinds: Sequence[tuple[int, float, float]], gaussian_variance: float = 0.0) -> float:
    """sup |F - Phi| at most, for a sum of independent kinds (count, variance, third) and N(0, gaussian_variance).

    0 without kinds: the sum is then normal.
    """
    if not kinds:
        return 0.0
    one_by_one = sum(identical_error(*kind) for kind in kinds)
    variance = gaussian_variance + sum(count * each for count, each, _ in kinds)
    together = _DIFFERENT * sum(count * third for count, _, third in kinds) / variance**1.5
    return min(1.0, one_by_one, together)
