"""What noise on both LoRA factors does to their product: DP-FedLoRA's unbiasedness and variance (arXiv 2509.09097).

B~ = B + s_b N_b and A~ = A + s_a N_a with independent standard normal N_b [m, r], N_a [r, n]. Then

    B~ A~ - B A = s_a B N_a + s_b N_b A + s_a s_b N_b N_a,

three terms of mean 0 (so E[B~ A~] = B A) that are uncorrelated. Every one of the n columns of N_a adds s_a^2 ||B||_F^2,
every one of the m rows of N_b adds s_b^2 ||A||_F^2, and each of the m n entries of N_b N_a has variance r:

    E ||B~ A~ - B A||_F^2 = n s_a^2 ||B||_F^2 + m s_b^2 ||A||_F^2 + s_a^2 s_b^2 m n r     exactly.

The published bound has m and n the other way round in the first two terms. For square matrices it is the exact value; for
others it can fall below the truth, and is then no bound.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LoraVariance:
    """E ||B~ A~ - B A||_F^2 in closed form beside a simulation of it. Squared Frobenius norms throughout.

    exact: the value derived above. published: the bound as printed. terms: exact's three terms, from noise on A, on B and
    on both. monte_carlo, standard_error: of the simulated value. bias, bias_expected: squared norm of the mean simulated
    error, and what pure chance makes of it if the product is unbiased (exact / draws). relative: sqrt(exact) / ||B A||_F.
    """

    exact: float
    published: float
    terms: tuple[float, float, float]
    monte_carlo: float
    standard_error: float
    bias: float
    bias_expected: float
    relative: float
    draws: int

    @property
    def published_is_bound(self) -> bool:
        """Whether the published expression is at least the exact value, up to rounding."""
        return self.published >= self.exact * (1 - 1e-12)

    def as_json(self) -> dict[str, Any]:
        """The record as plain values for `json.dumps`."""
        finite = self.relative if math.isfinite(self.relative) else None
        return asdict(self) | {"terms": list(self.terms), "relative": finite, "published_is_bound": self.published_is_bound}


def variance_terms(
    m: int, n: int, r: int, norm_b: float, norm_a: float, std_b: float, std_a: float
) -> tuple[float, float, float]:
    """The three terms of the exact variance.

    m, n, r: B is [m, r], A is [r, n], all >= 1. norm_b, norm_a: Frobenius norms >= 0. std_b, std_a: noise standard
    deviations >= 0, in the units of the entries (sigma C, not sigma). Raises ValueError outside.
    """
    for name, size in (("m", m), ("n", n), ("r", r)):
        if size < 1:
            raise ValueError(f"Expected {name}={size} >= 1")
    for name, value in (("norm_b", norm_b), ("norm_a", norm_a), ("std_b", std_b), ("std_a", std_a)):
        if not 0 <= value < math.inf:
            raise ValueError(f"Expected {name}={value} finite and >= 0")
    return n * (std_a * norm_b) ** 2, m * (std_b * norm_a) ** 2, (std_a * std_b) ** 2 * m * n * r


def exact_variance(m: int, n: int, r: int, norm_b: float, norm_a: float, std_b: float, std_a: float) -> float:
    """E ||B~ A~ - B A||_F^2; arguments as for `variance_terms`."""
    return sum(variance_terms(m, n, r, norm_b, norm_a, std_b, std_a))


def published_variance(m: int, n: int, r: int, norm_b: float, norm_a: float, std_b: float, std_a: float) -> float:
    """m s_a^2 ||B||^2 + n s_b^2 ||A||^2 + s_a^2 s_b^2 m n r, as published; no bound unless m = n or the norms help."""
    of_a, of_b, of_both = variance_terms(n, m, r, norm_b, norm_a, std_b, std_a)
    return of_a + of_b + of_both


def lora_variance(
    m: int,
    n: int,
    r: int,
    norm_b: float,
    norm_a: float,
    std_b: float,
    std_a: float,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> LoraVariance:
    """Closed forms and a simulation for random B and A of the given norms (e.g. the clip norms).

    draws: >= 2 noise draws. Memory and time grow with m n and draws. Other arguments as for `variance_terms`.
    """
    sizes = (m, n, r, norm_b, norm_a, std_b, std_a)
    terms = variance_terms(*sizes)
    b, a = random_factors(m, n, r, norm_b, norm_a, seed)
    mean, error, bias = monte_carlo(b, a, std_b, std_a, draws, seed + 1)
    product = float(((b @ a) ** 2).sum()) ** 0.5
    return LoraVariance(
        exact=sum(terms),
        published=published_variance(*sizes),
        terms=terms,
        monte_carlo=mean,
        standard_error=error,
        bias=bias,
        bias_expected=sum(terms) / draws,
        relative=math.sqrt(sum(terms)) / product if product else math.inf,
        draws=draws,
    )


def random_factors(m: int, n: int, r: int, norm_b: float, norm_a: float, seed: int):
    """B [m, r] and A [r, n] with Gaussian directions and exactly the given Frobenius norms."""
    import numpy as np

    generator = np.random.default_rng(seed)
    b, a = generator.standard_normal((m, r)), generator.standard_normal((r, n))
    return b * (norm_b / np.linalg.norm(b)), a * (norm_a / np.linalg.norm(a))


def monte_carlo(b, a, std_b: float, std_a: float, draws: int, seed: int) -> tuple[float, float, float]:
    """(mean of ||B~ A~ - B A||_F^2, its standard error, squared norm of the mean of B~ A~ - B A) over `draws` >= 2 draws.

    b: [m, r]. a: [r, n]. The noise is numpy's: a simulation, nothing is released.
    """
    import numpy as np

    if draws < 2:
        raise ValueError(f"Expected draws={draws} >= 2")
    generator = np.random.default_rng(seed)
    product, total = b @ a, 0.0
    squares = np.empty(draws)
    for draw in range(draws):
        noisy_b = b + std_b * generator.standard_normal(b.shape)
        noisy_a = a + std_a * generator.standard_normal(a.shape)
        error = noisy_b @ noisy_a - product
        squares[draw] = (error**2).sum()
        total = total + error
    return float(squares.mean()), float(squares.std(ddof=1) / math.sqrt(draws)), float(((total / draws) ** 2).sum())
