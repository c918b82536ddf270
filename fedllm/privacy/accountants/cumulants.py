"""Cumulants of the privacy loss of one Poisson-sampled Gaussian sum, by quadrature that loses no digits.

With mu = 1/sigma and rate q, the output without the unit is N(0, 1), with it (1-q) N(0, 1) + q N(mu, 1), and the loss is
L(x) = log(1 - q + q exp(mu x - mu^2/2)): EW-Tune (arXiv 2210.15042, section 3), Wang et al. (arXiv 2206.04236, section 5).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

ORDER = 5  # the third-order expansion needs no higher cumulant
NODES = 20  # of Gauss and Legendre on each panel
_COARSE = 0.4  # width of panels, in standard deviations of the noise
_TAIL = 13.0  # exp(-13^2/2) = 2e-37 of what matters lies further out
_FAR = 40.0  # exp(-40^2/2) underflows
_KINK = 40.0  # beyond so many units of loss on either side of its bend, L is straight to double precision
_KINK_PANELS = 48


@dataclass(frozen=True)
class LossMoments:
    """What an expansion and its error bound need to know of one random variable.

    cumulants: the first five. third: E|L - E L|^3.
    """

    cumulants: tuple[float, ...]
    third: float


@dataclass(frozen=True)
class LossPair:
    """The loss log(with/without) under both hypotheses: x drawn `without` the unit (X) and `with_unit` (Y)."""

    without: LossMoments
    with_unit: LossMoments


def gaussian_loss(mu: float) -> LossPair:
    """The loss of an unsampled Gaussian sum of sensitivity/sigma = mu >= 0: N(-+mu^2/2, mu^2)."""
    third = math.sqrt(8 / math.pi) * mu**3
    return LossPair(*(LossMoments((sign * mu * mu / 2, mu * mu, 0.0, 0.0, 0.0), third) for sign in (-1.0, 1.0)))


def privacy_loss(x, mu: float, rate: float):
    """L(x) = log(1 - rate + rate exp(mu x - mu^2/2)) for an array x; rate in (0, 1). Relative precision also where L is tiny."""
    import numpy as np

    exponent = mu * x - mu * mu / 2
    small = rate * np.expm1(np.minimum(exponent, 500.0))
    # Near log(1 - rate), and where exp would overflow, |L| is not small and the sum of two exponentials is exact enough.
    summed = np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)
    return np.where((small > -0.5) & (exponent < 500.0), np.log1p(np.maximum(small, -0.5)), summed)


@lru_cache(maxsize=32)
def loss_nodes(mu: float, rate: float):
    """Points x, the loss there and the weights of E[. without] and E[. with the unit]: four arrays of one length.

    Composite Gauss-Legendre. L bends at x* with (1-rate) = rate exp(mu x* - mu^2/2), over a width of a few 1/mu; the panels
    there are finer. The fifth moment is largest at x = 5 mu or at the bend, whichever comes first.
    """
    import numpy as np

    bend = mu / 2 + (math.log1p(-rate) - math.log(rate)) / mu
    low, high = -_TAIL, max(mu, min(ORDER * mu, bend)) + _TAIL
    # With mu in the hundreds the masses around 0 and mu are far apart, and everything between them underflows.
    ends = (low, min(high, _FAR)), (max(min(high, _FAR), mu - _FAR), high)
    coarse = np.concatenate([np.linspace(a, b, 2 + int((b - a) / _COARSE)) for a, b in ends])
    fine = bend + np.linspace(-_KINK, _KINK, _KINK_PANELS + 1) / mu
    fine = fine[(fine > low) & (fine < high)] if fine[1] - fine[0] < _COARSE else fine[:0]
    edges = np.unique(np.concatenate((coarse, fine)))
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    half = np.diff(edges)[:, None] / 2
    x = (edges[:-1, None] + half * (1 + nodes)).ravel()
    measure = (half * weights).ravel() / math.sqrt(2 * math.pi)
    without = measure * np.exp(-x * x / 2)
    shifted = measure * np.exp(-((x - mu) ** 2) / 2)
    return x, privacy_loss(x, mu, rate), without, (1 - rate) * without + rate * shifted


@lru_cache(maxsize=4096)
def poisson_gaussian(mu: float, rate: float) -> LossPair:
    """Moments of the loss of one release; mu = 1/sigma > 0, rate in (0, 1). About 1e-9 relative or better for sigma 0.1 .. 100."""
    import numpy as np

    _, loss, without, with_unit = loss_nodes(mu, rate)
    # E[exp L] = 1 without the unit and E[exp -L] = 1 with it: adding these zeros leaves integrands of one sign, so that the
    # mean, of order rate^2, is not the difference of terms of order rate.
    negative = -float(without @ _excess(loss))
    positive = float(with_unit @ _excess(-loss))
    return LossPair(
        _central(loss - negative, without, negative, np), _central(loss - positive, with_unit, positive, np)
    )


def _excess(loss):
    """exp(L) - 1 - L >= 0, by its series where the difference would cancel."""
    import numpy as np

    series = loss * loss / 2 * (1 + loss / 3 * (1 + loss / 4 * (1 + loss / 5 * (1 + loss / 6 * (1 + loss / 7)))))
    return np.where(np.abs(loss) < 0.02, series, np.expm1(np.minimum(loss, 700.0)) - loss)


def _central(deviation, weights, mean: float, np) -> LossMoments:
    """Cumulants from central moments, which are sums over deviations from a mean known to full precision."""
    m2, m3, m4, m5 = (float(weights @ deviation**power) for power in range(2, ORDER + 1))
    cumulants = (mean, m2, m3, m4 - 3 * m2 * m2, m5 - 10 * m3 * m2)
    return LossMoments(cumulants, float(weights @ np.abs(deviation) ** 3))


@dataclass(frozen=True)
class Phase:
    """`count` Gaussian sums of sensitivity/sigma = mu, sampled by Poisson at `rate` (1: not sampled, their loss is normal)."""

    mu: float
    rate: float
    count: int

    @property
    def gaussian(self) -> bool:
        return self.rate == 1

    @property
    def pair(self) -> LossPair:
        return gaussian_loss(self.mu) if self.gaussian else poisson_gaussian(self.mu, self.rate)
