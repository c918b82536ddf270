"""GaussianPrior: what the codec may know of client updates before it sees one.

Two structures. `diagonal`: independent Gaussians with one mean and one scale a factor, from released moments (DR-Encoder, section
"random-prior pre-training"). `samples`: a zero-mean Gaussian with the second moment of given rows: gradients of public text, noisy
codes that earlier rounds have released, random directions, and mixtures of these.
Nothing here touches private data: moments come released (clipped and noised), rows are public or released. `cost` says which, for
the ledger.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dr_encoder.layout import AdapterLayout

STAGE_1 = "stage 1 (in the ledger)"
PUBLIC = "none: public text"
GENERATED = "none: text that a language model wrote"
RELEASED = "none: post-processing of released codes"
RANDOM = "none: random numbers of a public seed"


@dataclass(frozen=True)
class GaussianPrior:
    """A Gaussian over updates in R^n.

    name: where it came from, for the ledger ('moments', 'public', 'generated', 'released', 'random', or several joined by '+').
    mean, std: per factor, float32 [L]; `std` is the root mean square deviation of one coordinate.
    rows: [count, n] or None; with rows the second moment is rows^T rows / count and mean, std only describe scale.
    cost: what it costs in privacy, and why.
    """

    name: str
    layout: AdapterLayout
    mean: Tensor
    std: Tensor
    rows: Tensor | None = None
    cost: str = "not stated"

    @property
    def structure(self) -> str:
        return "diagonal" if self.rows is None else "samples"

    def variance(self) -> Tensor:
        """Second moment of each coordinate, [n]."""
        if self.rows is not None:
            total = torch.zeros(self.layout.size)
            for row in self.rows:  # not all at once: the squares of all rows would be a copy of them
                total.addcmul_(row, row)
            return total.div_(len(self.rows))
        return self.layout.spread(self.mean.square() + self.std.square())

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` synthetic updates [count, n]."""
        if self.rows is None:
            white = torch.randn(count, self.layout.size, generator=generator)
            for factor, mean, std in zip(self.layout.factors, self.mean, self.std, strict=True):
                white[:, factor.offset : factor.stop].mul_(std).add_(mean)
            return white
        mix = torch.randn(count, len(self.rows), generator=generator) / len(self.rows) ** 0.5
        return mix @ self.rows

    def fingerprint(self) -> str:
        """16 hex digits over every number that defines the prior."""
        digest = hashlib.sha256(self.layout.fingerprint().encode())
        for tensor in (self.mean, self.std, self.rows):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]


def from_moments(layout: AdapterLayout, mean: Tensor, std: Tensor) -> GaussianPrior:
    """Prior of independent Gaussians from *released* per-factor moments [L], [L]. Costs stage 1, which the ledger has."""
    return GaussianPrior("moments", layout, mean.float(), std.float(), cost=STAGE_1)


def from_public_gradients(layout: AdapterLayout, rows: Tensor, generated: bool = False) -> GaussianPrior:
    """Prior with the second moment of public gradients [count, n]; generated: of text that a language model wrote. Costs nothing.

    Raises ValueError for non-finite or all-zero rows.
    """
    name, cost = ("generated", GENERATED) if generated else ("public", PUBLIC)
    return from_rows(name, layout, rows, cost, "public gradients")


def from_released(
    layout: AdapterLayout, updates: Tensor, noise_std: float | Tensor, code_size: int, half_life: float | None = None
) -> GaussianPrior:
    """Prior from the noisy mean codes released so far. Costs nothing: post-processing of what is in the ledger already.

    Args:
        updates: the codes decoded without shrinking (noise_std 0), oldest first [rounds, n].
        noise_std: standard deviation >= 0 of the noise in one number of a code, for all rounds or of each [rounds].
        code_size: k. For an orthonormal code the noise has the expected energy k noise_std^2, before and after decoding.
        half_life: rounds after which a row counts half; None: all count alike.
    Row i is shrunk by the Wiener gain g_i = v / (v + N_i), N_i = k s_i^2: under a white prior in the code's span the posterior second
    moment of the signal is g^2 x x^T and a part without direction. v, the signal's energy in a round, is one for all rounds, the mean of
    |x_i|^2 - N_i with little weight on noisy rounds: a gain from each row's own energy would favour rows whose noise happened to be long.
    Raises:
        ValueError: for non-finite rows, and where they do not stand above their noise.
    """
    energy = updates.double().square().sum(1)
    noise = (code_size * torch.as_tensor(noise_std, dtype=torch.float64).square()).expand(len(updates))
    precision = 1 / (noise + energy.min().clamp_min(torch.finfo(torch.float32).tiny)).square()
    signal = (precision * (energy - noise)).sum() / precision.sum()
    if torch.isfinite(energy).all() and not signal > 0:
        raise ValueError(f"Expected released updates above their noise, got {len(updates)} that are not")
    gain = signal / (signal + noise)
    if half_life is not None:
        gain = gain * (recency_weights(len(updates), half_life) * len(updates)).sqrt()
    return from_rows("released", layout, updates * gain.float()[:, None], RELEASED, "released updates")


def random_directions(layout: AdapterLayout, count: int, seed: int, scale: float | Tensor = 1.0) -> GaussianPrior:
    """Prior of `count` >= 1 fresh random directions, so that a refit can leave its old span. Costs nothing.

    scale: root mean square >= 0 of a coordinate, one for all or one a factor [L] (a public prior's `std`, for example).
    """
    if count < 1:
        raise ValueError(f"Expected count={count} >= 1")
    per_factor = torch.as_tensor(scale, dtype=torch.float32).expand(len(layout.factors))
    rows = torch.randn(count, layout.size, generator=torch.Generator().manual_seed(seed)).mul_(layout.spread(per_factor))
    return from_rows("random", layout, rows, RANDOM, "random directions")


def mixture(priors: Sequence[GaussianPrior], weights: Sequence[float] | Tensor) -> GaussianPrior:
    """Rows of several sample priors, scaled so that prior i gives the share weights_i / sum of the total second moment.

    The total is the weighted mean of the priors' own. Costs what its parts cost. For several refreshes of one prior use `recency_weights`.
    Raises ValueError for a prior without rows, for other layouts, and for weights that are negative or all zero.
    """
    weights = torch.as_tensor(weights, dtype=torch.float64)
    if weights.shape != (len(priors),) or not (torch.isfinite(weights) & (weights >= 0)).all() or not weights.any():
        raise ValueError(f"Expected {len(priors)} finite weights >= 0, not all zero, got {weights.tolist()}")
    for prior in priors:
        if prior.rows is None:
            raise ValueError(f"Expected priors with rows, got the {prior.structure} prior {prior.name}")
        if prior.layout.fingerprint() != priors[0].layout.fingerprint():
            raise ValueError(f"Expected priors of one layout, got another for the prior {prior.name}")
    parts = [(prior, weight) for prior, weight in zip(priors, (weights / weights.sum()).tolist(), strict=True) if weight > 0]
    sums = [float(torch.linalg.vector_norm(prior.rows, dtype=torch.float64).square()) for prior, _ in parts]
    total = sum(weight * energy / len(prior.rows) for (prior, weight), energy in zip(parts, sums, strict=True))
    count = sum(len(prior.rows) for prior, _ in parts)
    rows = [prior.rows * (weight * total * count / energy) ** 0.5 for (prior, weight), energy in zip(parts, sums, strict=True)]
    name, cost = (joint.join(dict.fromkeys(getattr(prior, key) for prior, _ in parts)) for key, joint in (("name", "+"), ("cost", "; ")))
    return from_rows(name, priors[0].layout, torch.cat(rows), cost)


def recency_weights(count: int, half_life: float) -> Tensor:
    """Weights of `count` things, oldest first, that halve every `half_life` > 0 steps back and sum to 1, float64 [count]."""
    if not half_life > 0:
        raise ValueError(f"Expected half_life={half_life} > 0")
    weights = 0.5 ** (torch.arange(count - 1, -1, -1, dtype=torch.float64) / half_life)
    return weights / weights.sum()


def from_rows(name: str, layout: AdapterLayout, rows: Tensor, cost: str, what: str = "rows") -> GaussianPrior:
    """Prior with the second moment of rows [count, n], which must be public or released already.

    Raises ValueError for rows of another length, non-finite or too large to be squared, or all zero.
    """
    if rows.ndim != 2 or rows.shape[1] != layout.size:
        raise ValueError(f"Expected {what} of shape [count, {layout.size}], got {list(rows.shape)}")
    if not all(bool(torch.isfinite(row).all()) for row in rows):
        raise ValueError(f"Expected finite {what}")
    if not rows.any():
        raise ValueError(f"Expected {what} that are not all zero")
    scale = factor_rms(layout, rows)
    if not torch.isfinite(scale).all():
        raise ValueError(f"Expected {what} whose squares are finite too")
    return GaussianPrior(name, layout, torch.zeros(len(layout.factors)), scale, rows.float(), cost)


def rows_on_disk(rows: Iterable[Tensor], path: Path) -> Tensor:
    """Rows [n] as they come, written to a new file and mapped back as [count, n]: a prior of more rows than memory holds.

    Raises ValueError for rows of different lengths or none.
    """
    sizes = []
    with open(path, "xb") as file:
        for row in rows:
            sizes.append(row.numel())
            file.write(row.detach().float().contiguous().numpy())
    if not sizes or len(set(sizes)) > 1:
        raise ValueError(f"Expected rows of one length, got {sorted(set(sizes)) or 'none'}")
    return torch.from_file(str(path), shared=False, size=sum(sizes), dtype=torch.float32).view(len(sizes), sizes[0])


def factor_rms(layout: AdapterLayout, rows: Tensor) -> Tensor:
    """Root mean square of each factor's coordinates over the rows [count, n] -> [L]."""
    norms = torch.stack([torch.linalg.vector_norm(rows[:, f.offset : f.stop]) for f in layout.factors])  # squares would be a copy
    return norms / torch.tensor([len(rows) * f.size for f in layout.factors]).sqrt()
