"""GaussianPrior: what the codec may know of client updates before it sees one.

Two structures. `diagonal`: independent Gaussians with one mean and one scale a factor, from released moments (DR-Encoder, section
"random-prior pre-training"). `samples`: a zero-mean Gaussian with the second moment of given rows, from gradients of public text.
Nothing here touches private data: moments come released (clipped and noised), rows come from public text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dr_encoder.layout import AdapterLayout


@dataclass(frozen=True)
class GaussianPrior:
    """A Gaussian over updates in R^n.

    name: where it came from, for the ledger ('moments', 'public').
    mean, std: per factor, float32 [L]; `std` is the root mean square deviation of one coordinate.
    rows: [count, n] or None; with rows the second moment is rows^T rows / count and mean, std only describe scale.
    """

    name: str
    layout: AdapterLayout
    mean: Tensor
    std: Tensor
    rows: Tensor | None = None

    @property
    def structure(self) -> str:
        return "diagonal" if self.rows is None else "samples"

    def variance(self) -> Tensor:
        """Second moment of each coordinate, [n]."""
        if self.rows is not None:
            return self.rows.square().mean(0)
        return self.layout.spread(self.mean.square() + self.std.square())

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` synthetic updates [count, n]."""
        if self.rows is None:
            white = torch.randn(count, self.layout.size, generator=generator)
            return white.mul_(self.layout.spread(self.std)).add_(self.layout.spread(self.mean))
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
    """Prior of independent Gaussians from *released* per-factor moments [L], [L]."""
    return GaussianPrior("moments", layout, mean.float(), std.float())


def from_public_gradients(layout: AdapterLayout, rows: Tensor) -> GaussianPrior:
    """Prior with the second moment of public gradients [count, n].

    Raises ValueError for non-finite or all-zero rows.
    """
    if not torch.isfinite(rows).all():
        raise ValueError("Expected finite public gradients")
    if not rows.any():
        raise ValueError("Expected public gradients that are not all zero")
    return GaussianPrior("public", layout, torch.zeros(len(layout.factors)), factor_rms(layout, rows), rows.float())


def factor_rms(layout: AdapterLayout, rows: Tensor) -> Tensor:
    """Root mean square of each factor's coordinates over the rows [count, n] -> [L]."""
    return torch.stack([rows[:, f.offset : f.stop].square().mean().sqrt() for f in layout.factors])
