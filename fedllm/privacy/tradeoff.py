"""Trade-off curves (f-DP): the least type II error of an attacker who tests 'was this unit in?' at a given type I error.

An (epsilon, delta) family delta(.) that holds in both directions is f-DP with (Dong, Roth and Su 2022, proposition 6;
Wasserman and Zhou 2010)

    f(alpha) = sup over epsilon >= 0 of max(0, 1 - delta(eps) - exp(eps) alpha, exp(-eps) (1 - delta(eps) - alpha)).

Every epsilon looked at gives a true lower bound on f where delta is an upper bound: a coarse grid only loosens it.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.privacy.accountants import Accountant
from fedllm.privacy.answers import BOUND, EXACT, LOWER, UNKNOWN, UPPER

if TYPE_CHECKING:
    import numpy as np

# From which side f stands when delta stands on the given side: much delta leaves the attacker few errors.
_SIDE_OF_CURVE = {UPPER: LOWER, LOWER: UPPER, EXACT: EXACT, UNKNOWN: UNKNOWN}
LOW_RATES = (1e-4, 1e-3, 0.01, 0.05, 0.1)  # false-positive rates that are asked for, always on the grid
POINTS = 400
SMALLEST_DELTA = 1e-9  # epsilons are looked at up to the one of this delta


@dataclass(frozen=True)
class TradeoffCurve:
    """One curve f, from (0, f(0)) to (1, 0).

    name: whose. kind: bound | estimate. direction: side of the true curve on which this one stands: lower (conservative),
    upper, exact or unknown.
    alphas: type I errors (false positives), ascending in [0, 1]. betas: least type II errors (false negatives) there.
    """

    name: str
    kind: str
    direction: str
    alphas: tuple[float, ...]
    betas: tuple[float, ...]

    @property
    def advantage(self) -> float:
        """The attacker's advantage, max of 1 - alpha - f(alpha): the total variation, delta at epsilon 0."""
        return max(0.0, max(1 - alpha - beta for alpha, beta in zip(self.alphas, self.betas, strict=True)))

    def beta_at(self, alpha: float) -> float:
        """The false-negative rate at the false-positive rate `alpha` in [0, 1]: exact on the grid, else the next point's,
        which is no larger. Raises ValueError outside.
        """
        if not 0 <= alpha <= 1:
            raise ValueError(f"Expected alpha={alpha} in [0, 1]")
        return next(beta for at, beta in zip(self.alphas, self.betas, strict=True) if at >= alpha)


def alpha_grid(advantage: float = 0.0, points: int = POINTS) -> np.ndarray:
    """Type I errors in [0, 1], denser near 0, with LOW_RATES and, where f(alpha) = alpha, (1 - advantage)/2 on it."""
    import numpy as np

    fine = np.geomspace(1e-6, 0.1, points // 2)
    return np.unique(np.concatenate([np.linspace(0, 1, points // 2 + 1), fine, LOW_RATES, [(1 - advantage) / 2]]))


def tradeoff(epsilons: Sequence[float], deltas: Sequence[float], alphas: Sequence[float]) -> np.ndarray:
    """f at `alphas` in [0, 1] from a family delta(epsilon), epsilons >= 0; deltas outside [0, 1] are cut to it."""
    import numpy as np

    eps = np.asarray(epsilons, dtype=float)[:, None]
    kept = 1 - np.clip(np.asarray(deltas, dtype=float), 0, 1)[:, None]
    alpha = np.asarray(alphas, dtype=float)[None, :]
    with np.errstate(over="ignore", invalid="ignore"):
        steep = np.where(alpha == 0, kept, kept - np.exp(eps) * alpha)
    return np.maximum(0.0, np.maximum(steep, np.exp(-eps) * (kept - alpha)).max(axis=0))


def gdp_tradeoff(mu: float, alphas: Sequence[float]) -> np.ndarray:
    """f of mu-GDP in closed form, Phi(Phi^-1(1 - alpha) - mu) (Dong, Roth and Su 2022, definition of mu-GDP). mu: >= 0."""
    import numpy as np
    from scipy.special import ndtr, ndtri

    if not 0 <= mu < math.inf:
        raise ValueError(f"Expected mu={mu} finite and >= 0")
    return ndtr(-ndtri(np.asarray(alphas, dtype=float)) - mu)


def gdp_curve(mu: float, name: str = "mu-GDP", *, kind: str = BOUND, direction: str = EXACT) -> TradeoffCurve:
    """The curve of mu-GDP in closed form, mu >= 0; kind 'estimate' where mu comes from a limit theorem."""
    from scipy.special import ndtr

    alphas = alpha_grid(advantage=float(2 * ndtr(mu / 2) - 1))
    return TradeoffCurve(name, kind, direction, tuple(alphas.tolist()), tuple(gdp_tradeoff(mu, alphas).tolist()))


def curve_of(accountant: Accountant, points: int = POINTS) -> TradeoffCurve:
    """The trade-off curve of what an accountant has composed, under its relation (both directions: f is symmetric).

    Raises ValueError where it gives no figure.
    """
    first = accountant.delta(0.0)
    if first.delta is None:
        raise ValueError(f"accountant {accountant.name} has no trade-off curve: {first.reason}")
    epsilons = _epsilon_grid(accountant, points)
    deltas = accountant.deltas(epsilons)
    if any(delta is None for delta in deltas):
        raise ValueError(f"accountant {accountant.name} has no trade-off curve: no delta at some epsilon")
    alphas = alpha_grid(advantage=min(1.0, max(0.0, deltas[0])), points=points)
    betas = tradeoff(epsilons, deltas, alphas)
    return TradeoffCurve(
        accountant.name, first.kind, _SIDE_OF_CURVE[first.direction], tuple(alphas.tolist()), tuple(betas.tolist())
    )


def _epsilon_grid(accountant: Accountant, points: int) -> list[float]:
    """Epsilons from 0 to where delta has all but gone, denser near 0."""
    import numpy as np

    last = accountant.epsilon(SMALLEST_DELTA).epsilon
    if last is None:
        return [0.0]
    return (max(last, 1e-6) * np.linspace(0, 1, points) ** 1.5).tolist()


def write_csv(curves: Sequence[TradeoffCurve], path: str | Path) -> Path:
    """The curves as rows `curve, kind, alpha, beta`. Returns `path`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["curve", "kind", "alpha", "beta"])
    for curve in curves:
        writer.writerows((curve.name, curve.kind, *point) for point in zip(curve.alphas, curve.betas, strict=True))
    path = Path(path)
    path.write_text(text.getvalue())
    return path
