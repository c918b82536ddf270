"""The closed-form linear code of a prior: projection on its principal subspace.

Of all linear codes of k numbers the one that keeps most of the prior's energy projects on the top k eigenvectors of its second moment
(Eckart-Young). For a diagonal prior those are the coordinates of largest variance: see `coordinate`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dr_encoder.codecs.base import Codec, check_code_size, register, require_prior, wiener_gain
from dr_encoder.codecs.coordinate import CoordinateCodec
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior

PIECE = 2**20  # numbers of a matrix that are worked on at once
DENSE_NUMBERS = 2**29  # most numbers of a dense k x n matrix, 2 GiB; above that a code needs a structure


def check_dense(code_size: int, update_size: int) -> None:
    """Raise ValueError for a dense matrix [code_size, update_size] of more than DENSE_NUMBERS."""
    if code_size * update_size > DENSE_NUMBERS:
        raise ValueError(
            f"Expected code_size={code_size} <= {DENSE_NUMBERS // update_size} for updates of {update_size:,}, a dense matrix of "
            f"{DENSE_NUMBERS:,} numbers; kronecker, coordinate and sketch store less"
        )


@register("linear")
class LinearCodec(Codec):
    """Orthonormal rows [k, n]; the variance of a unit's code under the prior [k]."""

    linear = True
    orthonormal = True
    fits = ("rows", "moments")

    def __init__(self, basis: Tensor, variance: Tensor):
        self.basis, self.variance = basis, variance
        self.code_size, self.update_size = basis.shape

    @classmethod
    def fit(
        cls, prior: GaussianPrior | None, layout: AdapterLayout, code_size: int, noise_std: float, seed: int, **options: Any
    ) -> Codec:
        """Principal subspace of the prior; for a diagonal prior the coordinates of largest variance.

        Raises ValueError for fewer than `code_size` rows, or a basis of more than DENSE_NUMBERS. Rows that span fewer directions than
        they are (a text that comes twice, an example that the model has learnt, whose gradient is nearly zero) are no error: random
        directions of variance 0 fill up the rest.
        """
        check_code_size(code_size, layout.size)
        prior = require_prior(prior, cls.name)
        if prior.structure == "diagonal":
            return CoordinateCodec.fit(prior, layout, code_size, noise_std, seed)
        check_dense(code_size, layout.size)
        return cls(*principal_subspace(prior.rows, code_size, seed))

    def encode(self, updates: Tensor) -> Tensor:
        return updates @ self.basis.T

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        return (mean_code * wiener_gain(mean_code, noise_std, self.variance)) @ self.basis

    def decode_rows(self, codes: Tensor) -> Tensor:
        return codes @ self.basis

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"basis": self.basis, "variance": self.variance}, {}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> LinearCodec:
        return cls(tensors["basis"], tensors["variance"])


def principal_subspace(rows: Tensor, rank: int, seed: int = 0, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Top `rank` eigenvectors of rows^T rows / count as orthonormal rows [rank, n], and their eigenvalues [rank].

    scale: [n] > 0, which the rows are divided by first, piece by piece, so that they are not copied whole.
    By the Gram matrix of the rows, so that nothing of size n x n is formed. Where the rows span fewer directions, random ones of the seed
    are added, orthogonal to them and with eigenvalue 0: a decoder that knows of noise then leaves them out.
    Raises ValueError for fewer rows than `rank`.
    """
    if rank > len(rows):
        raise ValueError(f"Expected code_size={rank} <= {len(rows)}, the number of the prior's rows")
    values, vectors = torch.linalg.eigh(gram(rows, scale))
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    spanned = int((values > 1e-6 * values[0]).sum())
    basis = torch.empty(rank, rows.shape[1])
    torch.mm((vectors[:, :spanned] / values[:spanned].sqrt()).float().T, rows, out=basis[:spanned])
    if scale is not None:
        basis[:spanned].div_(scale)
    basis[spanned:].normal_(generator=torch.Generator().manual_seed(seed))
    values[spanned:] = 0.0
    return orthonormalize(basis), (values / len(rows)).float()


def orthonormalize(basis: Tensor) -> Tensor:
    """Gram-Schmidt in the order of the rows of basis [k, n], in place: by Cholesky of their Gram matrix, without a second basis.

    Twice, since the rounding of small eigenvalues costs orthogonality, and the privacy of `noise_in: update` rests on it.
    """
    for _ in range(2):
        lower = torch.linalg.cholesky(gram(basis))
        back = torch.linalg.inv(lower).float()
        for piece in basis.split(piece_width(basis), dim=1):
            piece.copy_(back @ piece)
    return basis


def gram(rows: Tensor, scale: Tensor | None = None) -> Tensor:
    """rows rows^T in float64 (in float32 small eigenvalues would be rounding), by pieces: the rows are not copied whole.

    scale: [n] > 0, which the rows are divided by first.
    """
    total, width = torch.zeros(len(rows), len(rows), dtype=torch.float64), piece_width(rows)
    for start in range(0, rows.shape[1], width):
        double = rows[:, start : start + width].double()
        if scale is not None:
            double /= scale[start : start + width]
        total.addmm_(double, double.T)
    return total


def piece_width(rows: Tensor) -> int:
    """Columns of rows [k, n] at once: about `PIECE` numbers."""
    return max(PIECE // len(rows), 1024)
