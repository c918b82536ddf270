"""Renyi divergences of noisy sums as cumulants K(s) = s D_{1+s}, for every real order alpha = 1 + s > 1.

K composes by addition, and 1 + s keeps its digits where alpha is close to 1. Everything here is an integral or a sum of
positive terms, taken in logarithms: nothing cancels, overflows or fails to converge, which the alternating series for
fractional orders (and the alternating differences of the theorem for fixed-size cohorts) do.
"""

from __future__ import annotations

import math
from functools import lru_cache

_TAIL = 12.0  # nodes reach so many standard deviations beyond the outermost peak: a mass of 1e-32 is left out
_MAX_NODES = 20_000
_MAX_WHOLE = 4096  # fixed-size cohorts: largest whole order that the theorem's sum is taken at
_MAX_MOMENT = 256  # ... and largest moment that is integrated; above, the theorem's own cap 2 E[L^j] stands alone
_SMALL = 1e-3
_LEAST = 1e-300  # of K where there is any loss at all: squares underflow, and a bound of 0 would not be one
_LARGE = 30.0  # logarithms and exponentials change places here


def gaussian_cumulant(s: float, mu: float) -> float:
    """K(s) of the Gaussian mechanism, mu = sensitivity / sigma >= 0 (Mironov 2017, proposition 7)."""
    return max(s * (1 + s) * mu * mu / 2, _LEAST if mu else 0.0)


def mixture_cumulant(*parts: tuple[float, float]) -> float:
    """log sum w exp(k) over (w, k) with weights that sum to 1: the joint convexity of exp(K) in pairs of laws."""
    top = max((k for w, k in parts if w > 0), default=0.0)
    if math.isinf(top):
        return top
    if top < 500:
        return math.log1p(sum(w * math.expm1(k) for w, k in parts if w > 0))
    return top + math.log(sum(w * math.exp(k - top) for w, k in parts if w > 0))


@lru_cache(maxsize=1 << 16)
def poisson_cumulant(s: float, mu: float, q: float) -> float:
    """K(s) of the Poisson-sampled Gaussian, the worse of add and remove.

    Mironov, Talwar and Zhang (2019), theorem 4: exp K(s) = E[(1 + w)^(1+s)], w = q (exp(mu x - mu^2/2) - 1),
    x ~ N(0, 1), and by their theorem 5 the other direction is no worse. As E[w] = 0, exp K(s) - 1 is the mean of
    (1+w)^(1+s) - 1 - (1+s) w >= 0. That is analytic in a strip of half width pi/mu, so the trapezoidal rule is
    right to about 1e-14. Where it would take too many nodes, convexity in q gives the upper bound 1 - q + q exp K_1(s).

    s: > 0. mu: 1/sigma > 0. q: in [0, 1].
    """
    whole = gaussian_cumulant(s, mu)
    if q == 0 or q == 1:
        return q * whole
    step = min(0.25, 1 / (3 * mu))
    right = max(2.0, 1 + s) * mu + _TAIL
    if (right + _TAIL) / step > _MAX_NODES:
        return mixture_cumulant((1 - q, 0.0), (q, whole))
    return max(_sampled_cumulant(s, mu, q, step, right), _LEAST)


def _sampled_cumulant(s: float, mu: float, q: float, step: float, right: float) -> float:
    """With v = log(1 + w) the integrand is exp(v) [(exp(s v) - 1) + s (exp(-v) - 1)], in three ranges of v."""
    import numpy as np

    x = np.arange(-_TAIL, right + step, step)
    log_l = mu * x - mu * mu / 2
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        v = np.where(
            log_l < _LARGE, np.log1p(q * np.expm1(log_l)), np.logaddexp(math.log1p(-q), math.log(q) + log_l)
        )
        coefficients = ((s + 1) / 2, (s * s - 1) / 6, (s**3 + 1) / 24, (s**4 - 1) / 120)
        series = s * v * v * sum(c * v**k for k, c in enumerate(coefficients))
        small = np.log(np.where((1 + s) * np.abs(v) < _SMALL, series, np.expm1(s * v) + s * np.expm1(-v)))
        large = s * v + np.log1p(-(1 - s * np.expm1(-v)) * np.exp(-s * v))
        exponents = v + np.where(s * v < _LARGE, small, large) - x * x / 2
    exponents = exponents[np.isfinite(exponents)]
    if not len(exponents):
        return 0.0
    top = float(exponents.max())
    excess = top + math.log(step / math.sqrt(2 * math.pi) * float(np.exp(exponents - top).sum()))
    return math.log1p(math.exp(excess)) if excess < _LARGE else excess + math.log1p(math.exp(-excess))


@lru_cache(maxsize=1 << 16)
def fixed_size_cumulant(s: float, mu: float, q: float) -> float:
    """Upper bound on K(s) for a cohort drawn without replacement, one unit replaced.

    The better of Wang, Balle and Kasiviswanathan (2019), theorem 27, at whole orders, interpolated by the convexity of K
    (their corollary 10), and of joint convexity, 1 - q + q exp K_1(s), as the unit is drawn with probability q.

    s: > 0. mu: how far a replacement moves the sum, over sigma: 2C/(sigma C). q: cohort / population in (0, 1].
    """
    whole = gaussian_cumulant(s, mu)
    if q == 1:
        return whole
    bound = mixture_cumulant((1 - q, 0.0), (q, whole))
    if s > _MAX_WHOLE - 1:
        return bound
    low = math.floor(s)
    share = s - low
    at_low = _fixed_size_whole(low + 1, mu, q)
    return min(bound, (1 - share) * at_low + (share * _fixed_size_whole(low + 2, mu, q) if share else 0.0))


@lru_cache(maxsize=1 << 12)
def _fixed_size_whole(alpha: int, mu: float, q: float) -> float:
    """log(1 + sum_{j=2}^alpha C(alpha, j) q^j min(4 sqrt(B_lo B_hi), 2 E[L^j])), B_j = E[(L - 1)^j], lo, hi even."""
    import numpy as np
    from scipy.special import gammaln

    if alpha == 1:
        return 0.0
    j = np.arange(2, alpha + 1)
    with np.errstate(over="ignore"):
        cap = math.log(2) + j * (j - 1) * mu * mu / 2
    moments = []
    for order in range(2, min(alpha, _MAX_MOMENT) + 2, 2):
        moments.append(_log_even_moment(order, mu))
        if moments[-1] > order * (order - 1) * mu * mu / 2 - 0.5:  # so near to E[L^j] that the cap is the smaller
            break
    even = np.array(moments)
    known = j[: 2 * len(moments) - 1]
    tight = math.log(4) + (even[known // 2 - 1] + even[(known + 1) // 2 - 1]) / 2
    cap[: len(known)] = np.minimum(cap[: len(known)], tight)
    terms = gammaln(alpha + 1) - gammaln(j + 1) - gammaln(alpha - j + 1) + j * math.log(q) + cap
    return float(np.logaddexp(0.0, np.logaddexp.reduce(terms)))


@lru_cache(maxsize=1 << 12)
def _log_even_moment(order: int, mu: float) -> float:
    """log E[(L - 1)^order], L = exp(mu x - mu^2/2), x ~ N(0, 1), for even orders: a positive integrand."""
    import numpy as np

    step = 0.1  # the integrand is entire, so only its width of about 1 matters
    peak = max(order * mu, math.sqrt(order))
    if (peak + 2 * _TAIL + math.sqrt(order)) / step > _MAX_NODES:
        return order * (order - 1) * mu * mu / 2  # E[(L-1)^j] <= E[L^j] + 1, and the cap 2 E[L^j] is the smaller then
    x = np.arange(-_TAIL - math.sqrt(order), peak + _TAIL, step)
    log_l = mu * x - mu * mu / 2
    with np.errstate(divide="ignore", over="ignore"):
        near = np.log(np.abs(np.expm1(np.minimum(log_l, 1.0))))
        magnitude = np.where(log_l < 1, near, log_l + np.log1p(-np.exp(-np.maximum(log_l, 1.0))))
    return float(np.logaddexp.reduce(order * magnitude - x * x / 2) + math.log(step / math.sqrt(2 * math.pi)))
