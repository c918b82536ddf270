"""How far an Edgeworth expansion is from the CDF of this very sum, by its characteristic function.

Prawitz ("Limits for a distribution, if the characteristic function is given in a finite domain", 1972), the inequality that
Derumigny, Girard and Guyonvarch (arXiv 2101.05780) start from as well: for every F with characteristic function f and Omega > 0

    F(x) <= 1/2 + int_{-Omega}^{Omega} e^{-ixt} K(t/Omega)/Omega f(t) dt,
    F(x) >= 1/2 - int_{-Omega}^{Omega} e^{-ixt} K(-t/Omega)/Omega f(t) dt,
    K(u) = (1 - |u|)/2 + i/2 [(1 - |u|) cot(pi u) + sgn(u)/pi]                           (principal values).

By Gil-Pelaez an expansion is F_k(x) = 1/2 + int e^{-ixt} i/(2 pi t) g(t) dt with g its own transform. Subtract, take absolute
values under the integral, and x is gone: with a + ib = K(t/Omega)/Omega,

    sup |F - F_k| <= 2 max over signs of int_0^Omega |(+-a + ib) f - i g/(2 pi t)| dt + int_Omega^infty |g|/(pi t) dt.

Where they bound |f - g| by moments, f is computed here: the summands are known, f is a product of powers of one-dimensional
integrals. The last term is far below double precision at every Omega used. Valid for any number of summands; about
1.25/Omega + sup |F - F_k|, ten to forty times below what Berry and Esseen give. No interval arithmetic stands behind the
quadrature over t: its result is raised by 5 % (ten times as many points change it by 1.2 % at most, for losses that are almost
on a lattice), and what the quadrature over x cannot resolve is counted as wrong altogether.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

from fedllm.privacy.accountants.cumulants import NODES, Phase, loss_nodes

if TYPE_CHECKING:
    from collections.abc import Sequence

OMEGAS = (30.0, 100.0, 300.0, 1000.0)  # each gives a bound and the least counts: a small one where f hardly decays
SAFETY = 1.05
_CORE = 12.0  # exp(-12^2/2) = 5e-32: beyond, the expansion's transform is nothing
_RESOLVED = 24.0  # radians over which Gauss-Legendre with 20 nodes integrates exp(it) to 1e-15
_MASS = 1e-20


@lru_cache(maxsize=2)
def quadrature(finer: int = 1):
    """t and weights over (0, OMEGAS[-1]): panels even up to _CORE, geometric from there, an edge at each Omega; `finer` times as many."""
    import numpy as np

    def panels(edges, count):
        nodes, weights = np.polynomial.legendre.leggauss(count)
        half = np.diff(edges)[:, None] / 2
        return (edges[:-1, None] + half * (1 + nodes)).ravel(), (half * weights).ravel()

    pieces = [panels(np.linspace(0, _CORE, 16 * finer + 1), 8)]
    pieces += [panels(np.geomspace(low, high, 10 * finer + 1), 3) for low, high in zip((_CORE, *OMEGAS[:-1]), OMEGAS, strict=True)]
    return tuple(np.concatenate(column) for column in zip(*pieces, strict=True))


def one_summand(mu: float, rate: float, with_unit: bool, mean: float, frequency):
    """(f, slack): E exp(i frequency (L - mean)) of one sampled release for an array of frequencies; |f - truth| <= slack."""
    import numpy as np

    _, loss, without, shifted = loss_nodes(mu, rate)
    weights = shifted if with_unit else without
    # Panels are runs of NODES points, and L is convex: its phase turns fastest in the panels on the right.
    turn = np.repeat(np.ptp(loss.reshape(-1, NODES), axis=1), NODES)
    kept = weights > _MASS
    loss, weights, turn = loss[kept] - mean, weights[kept], turn[kept]
    order = np.argsort(turn)
    mass = np.concatenate((np.cumsum(weights[order][::-1])[::-1], [0.0]))
    unresolved = mass[np.searchsorted(turn[order], _RESOLVED / frequency)]
    transform = np.empty(len(frequency), dtype=complex)
    for start in range(0, len(frequency), 64):  # blocks that stay in the cache
        phase = np.multiply.outer(frequency[start : start + 64], loss)
        transform[start : start + 64] = np.cos(phase) @ weights + 1j * (np.sin(phase) @ weights)
    return transform, 2 * unresolved


@lru_cache(maxsize=64)
def _sum(phases: "tuple[Phase, ...]", with_unit: bool, std: float):
    """(f, slack) of the standardised sum at the points of `quadrature`."""
    import numpy as np

    t, _ = quadrature()
    frequency = t / std
    f, possible = np.ones(len(t), dtype=complex), np.ones(len(t))
    for phase in phases:
        if phase.gaussian:
            one, slack = np.exp(-((phase.mu * frequency) ** 2) / 2), 0.0
        else:
            mean = (phase.pair.with_unit if with_unit else phase.pair.without).cumulants[0]
            one, slack = one_summand(phase.mu, phase.rate, with_unit, mean, frequency)
        f = f * one**phase.count
        possible = possible * np.minimum(np.abs(one) + slack, 1.0) ** phase.count
    return f, np.maximum(possible - np.abs(f), 0.0)


def transform_of_expansion(cumulants: "Sequence[float]", order: int, t):
    """g(t): exp(-t^2/2) times the expansion's polynomial in it; cumulants: K1..K5 of the sum."""
    import numpy as np

    scale = cumulants[1] ** -0.5
    g3, g4, g5 = (cumulants[j - 1] * scale**j for j in (3, 4, 5))
    s = 1j * t
    terms = (
        (0, 1.0 + 0 * s),
        (1, g3 * s**3 / 6),
        (2, g4 * s**4 / 24 + g3**2 * s**6 / 72),
        (3, g5 * s**5 / 120 + g3 * g4 * s**7 / 144 + g3**3 * s**9 / 1296),
    )
    return np.exp(-t * t / 2) * sum(term for degree, term in terms if degree <= order)


@lru_cache(maxsize=256)
def smoothing_error(phases: "tuple[Phase, ...]", with_unit: bool, cumulants: tuple[float, ...], order: int) -> float:
    """sup |F - F_k| at most, for the summed loss of `phases` with these cumulants under one hypothesis; order: k in 0 .. 3."""
    t, weights = quadrature()
    f, slack = _sum(phases, with_unit, cumulants[1] ** 0.5)
    g = transform_of_expansion(cumulants, order, t)
    found = []
    for omega in OMEGAS:
        inside = t < omega
        found.append(prawitz(t[inside], weights[inside], f[inside], slack[inside], g[inside], omega))
    return min(1.0, *(SAFETY * error for error in found))


def prawitz(t, weights, f, slack, g, omega: float) -> float:
    """The bound for one Omega, by a quadrature (t, weights) over (0, Omega); |f - truth| <= slack. The same for -X as for X."""
    import numpy as np

    u = t / omega
    a = (1 - u) / 2 / omega
    b = ((1 - u) / np.tan(np.pi * u) + 1 / np.pi) / 2 / omega
    unsure = np.abs(a + 1j * b) * slack
    sides = (np.abs((sign * a + 1j * b) * f - 1j * g / (2 * np.pi * t)) + unsure for sign in (1, -1))
    return 2 * max(float(weights @ side) for side in sides)
