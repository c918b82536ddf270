"""A matrix-normal code: for each matrix factor M numbers u_i^T M v_j, the k of largest variance over all factors.

Under a matrix-normal prior M = L Z R^T the second moment of vec(M) is the Kronecker product E[M^T M] x E[M M^T] / E|M|^2. Its
eigenvectors are products of the two sides' eigenvectors u_i, v_j with variances lambda_i mu_j / trace, so numbers u_i^T M v_j are the
best linear code (Eckart-Young) that such a prior has. A side is told by many more samples than the whole: R rows of public gradients
hold R q vectors of length p and R p of length q, so a code may have more than R numbers, where `linear` ends.
Kronecker-factored moments are those of K-FAC (Martens and Grosse 2015) and Shampoo (Gupta et al. 2018).

Scale: nothing of size k x n is ever formed. A factor [p, q] with a and b used columns stores p a + q b numbers and costs about 2 p q b
operations (q the long side). Fitting holds one factor's part of the rows at a time: rows may be a memory-mapped tensor
(`priors.rows_on_disk`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dr_encoder.codecs.base import Codec, check_code_size, register, require_prior, wiener_gain
from dr_encoder.codecs.coordinate import CoordinateCodec
from dr_encoder.layout import AdapterLayout, Factor
from dr_encoder.priors import GaussianPrior

MAX_COLUMNS = 256
KEPT = 2**24  # most numbers of the bases that a fit keeps, 64 MiB
_EXACT = 512  # sides with more samples than this are found by subspace iteration: a full eigendecomposition takes seconds a factor
_OVERSAMPLING = 32
_ITERATIONS = 2
_SPANNED = 1e-6


class Block(NamedTuple):
    """One matrix factor: place and shape in the update, used columns of either side, numbers it gives to the code."""

    offset: int
    rows: int
    columns: int
    left: int
    right: int
    count: int

    @property
    def stop(self) -> int:
        return self.offset + self.rows * self.columns


@register("kronecker")
class KroneckerCodec(Codec):
    """Used columns of U and V for each factor, which pairs (i, j) are sent, and single coordinates of factors that are no matrices.

    left, right: the used columns [p, a] and [q, b] of all blocks, flat, one after the other.
    cells: for each number sent its place i b + j in its block's a x b grid, int32.
    coordinates: places in the update, int64; they come last in the code.
    variance: of a unit's code under the prior [k].
    """

    linear = True
    orthonormal = True
    fits = ("rows", "moments")

    def __init__(
        self, blocks: list[Block], left: Tensor, right: Tensor, cells: Tensor, coordinates: Tensor, variance: Tensor, update_size: int
    ):
        self.blocks, self.left, self.right, self.cells = blocks, left, right, cells
        self.coordinates, self.variance, self.update_size = coordinates, variance, update_size
        self.code_size = len(variance)
        lefts = left.split([block.rows * block.left for block in blocks])
        rights = right.split([block.columns * block.right for block in blocks])
        self._parts = [
            (block, one.view(block.rows, block.left), other.view(block.columns, block.right), places)
            for block, one, other, places in zip(blocks, lefts, rights, cells.split([block.count for block in blocks]), strict=True)
        ]

    @classmethod
    def fit(
        cls,
        prior: GaussianPrior | None,
        layout: AdapterLayout,
        code_size: int,
        noise_std: float,
        seed: int,
        *,
        max_columns: int = MAX_COLUMNS,
        **options: Any,
    ) -> Codec:
        """Principal directions of either side of every factor; for a diagonal prior the coordinates of largest variance.

        Args:
            max_columns: directions kept on a side of a factor, >= 1: bounds what is stored and the time to encode.
            seed: starts the subspace iteration for sides with more than 512 samples; decides nothing where they are exact.
        Raises:
            ValueError: where the prior's rows span fewer than `code_size` such directions.
        """
        check_code_size(code_size, layout.size)
        if max_columns < 1:
            raise ValueError(f"Expected max_columns={max_columns} >= 1")
        prior = require_prior(prior, cls.name)
        if prior.structure == "diagonal":
            return CoordinateCodec.fit(prior, layout, code_size, noise_std, seed)
        # For a large update the bases are made twice, first for the variances, then for the columns that are used: all of them at once
        # would not fit. Those of a small one are kept.
        small = sum(side * min(side, max_columns) for factor in layout.factors if _is_matrix(factor) for side in _shape(factor)) <= KEPT
        grids, kept = [], {}
        for factor in layout.factors:
            grid, bases = _variances(prior.rows, factor, max_columns, seed)
            grids.append(grid)
            if small:
                kept[factor.offset] = bases
        chosen = _largest(grids, code_size, len(prior.rows))
        used = [part for part in zip(layout.factors, grids, chosen, strict=True) if len(part[2])]
        matrices, vectors = [part for part in used if _is_matrix(part[0])], [part for part in used if not _is_matrix(part[0])]
        pairs = [_pairs(places, grid.shape[1]) for _, grid, places in matrices]
        blocks = [
            Block(factor.offset, *_shape(factor), len(left), len(right), len(cells))
            for (factor, *_), (left, right, cells) in zip(matrices, pairs, strict=True)
        ]
        codec = cls(
            blocks,
            torch.empty(sum(block.rows * block.left for block in blocks)),
            torch.empty(sum(block.columns * block.right for block in blocks)),
            torch.cat([torch.zeros(0, dtype=torch.int32), *(cells for *_, cells in pairs)]),
            torch.cat([torch.zeros(0, dtype=torch.int64), *(factor.offset + places for factor, _, places in vectors)]),
            torch.cat([grid.flatten()[places] for _, grid, places in matrices + vectors]),  # single coordinates come last in the code
            layout.size,
        )
        for (factor, *_), (_, *sides, _), columns in zip(matrices, codec._parts, pairs, strict=True):
            bases = kept.get(factor.offset) or [basis for basis, _ in _bases(_matrices(prior.rows, factor), max_columns, seed)]
            for side, basis, wanted in zip(sides, bases, columns, strict=False):
                side.copy_(basis[:, wanted])
        return codec

    def encode(self, updates: Tensor) -> Tensor:
        numbers = []
        for block, left, right, cells in self._parts:
            matrices = rearrange(updates[:, block.offset : block.stop], "unit (row column) -> unit row column", row=block.rows)
            # The long side first: what remains is small.
            grid = left.T @ (matrices @ right) if block.columns >= block.rows else (left.T @ matrices) @ right
            numbers.append(grid.flatten(1)[:, cells])
        return torch.cat([*numbers, updates[:, self.coordinates]], 1)

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        shrunk = mean_code * wiener_gain(mean_code, noise_std, self.variance)
        numbers, single = shrunk.split([len(self.cells), len(self.coordinates)])
        update = torch.zeros(self.update_size)
        update[self.coordinates] = single
        for (block, left, right, cells), part in zip(self._parts, numbers.split([block.count for block in self.blocks]), strict=True):
            grid = torch.zeros(block.left * block.right)
            grid[cells] = part
            matrix = torch.linalg.multi_dot([left, grid.view(block.left, block.right), right.T])
            update[block.offset : block.stop] = matrix.flatten()
        return update

    def decode_rows(self, codes: Tensor) -> Tensor:
        updates = codes.new_zeros(len(codes), self.update_size)
        numbers, updates[:, self.coordinates] = codes.split([len(self.cells), len(self.coordinates)], 1)
        for (block, left, right, cells), part in zip(self._parts, numbers.split([block.count for block in self.blocks], 1), strict=True):
            grid = codes.new_zeros(len(codes), block.left * block.right)
            grid[:, cells] = part
            updates[:, block.offset : block.stop] = (left @ grid.view(-1, block.left, block.right) @ right.T).flatten(1)
        return updates

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        names = ("left", "right", "cells", "coordinates", "variance")
        meta = {"blocks": [list(block) for block in self.blocks], "update_size": self.update_size}
        return {name: getattr(self, name) for name in names}, meta

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> KroneckerCodec:
        return cls([Block(*block) for block in meta["blocks"]], **tensors, update_size=meta["update_size"])


def leading_directions(stack: Tensor, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors of stack^T stack, orthonormal columns [length, m], and their eigenvalues [m], float64.

    stack: [count, length]; m <= most, and no more than the stack spans. Exact (from the smaller Gram matrix) up to 512 samples or
    entries; beyond, `most` + 32 columns of seeded subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4).
    """
    count, length = stack.shape
    if min(count, length) > max(_EXACT, most + _OVERSAMPLING):
        basis = torch.randn(length, most + _OVERSAMPLING, generator=torch.Generator().manual_seed(seed))
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(stack.T @ (stack @ basis)).Q
        values, mix = _eigen(_gram((stack @ basis).T))
        basis = basis.double() @ mix
    elif length <= count:
        values, basis = _eigen(_gram(stack.T))
    else:
        values, mix = _eigen(_gram(stack))
        basis = stack.T.double() @ mix[:, : min(most, _spanned(values))]
    kept = min(most, _spanned(values))
    # QR, for rounding of small eigenvalues costs orthogonality, and the privacy of `noise_in: update` rests on it.
    return torch.linalg.qr(basis[:, :kept]).Q, values[:kept]


def shrunk_variance(empirical: Tensor, product: Tensor, count: int) -> Tensor:
    """Variances of u_i^T M v_j: the means of `count` squares, shrunk towards the matrix-normal form [a, b].

    Positive-part James-Stein with one weight a factor: a mean of R squares of a Gaussian has variance 2 v^2 / R, estimated by
    2 empirical^2 / (R + 2); whatever spread around the product form that explains is not believed.
    """
    noise = 2 / (count + 2) * empirical.square().sum()
    spread = (empirical - product).square().sum()
    weight = (1 - noise / spread).clamp_min(0) if spread > 0 else 0.0
    return product + weight * (empirical - product)


def _variances(rows: Tensor, factor: Factor, most: int, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Estimated variance of each candidate number of a factor, a grid [a, b] ([1, size] for what is no matrix), and its sides' bases."""
    if not _is_matrix(factor):
        return rows[:, factor.offset : factor.stop].square().mean(0)[None], ()
    matrices = _matrices(rows, factor)
    (left, left_energy), (right, right_energy) = _bases(matrices, most, seed)
    energy = torch.linalg.vector_norm(matrices, dtype=torch.float64).square()
    if energy == 0:
        return torch.zeros(0, 1), ()
    product = left_energy[:, None] * right_energy / (energy * len(rows))
    left, right = left.float(), right.float()
    numbers = left.T @ (matrices @ right)
    return shrunk_variance(numbers.square().mean(0).double(), product, len(rows)).float(), (left, right)


def _pairs(places: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Used rows, used columns, and the places counted in the smaller grid of those, of flat places in a grid `width` columns wide."""
    (left, row), (right, column) = (side.unique(return_inverse=True) for side in (places // width, places % width))
    return left, right, (row * len(right) + column).int()


def _bases(matrices: Tensor, most: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Directions and energies (sums over the samples) of the left and of the right side of [sample, p, q]."""
    left = rearrange(matrices, "sample row column -> (sample column) row")
    right = rearrange(matrices, "sample row column -> (sample row) column")
    return [leading_directions(stack, most, seed) for stack in (left, right)]


def _largest(grids: list[Tensor], code_size: int, count: int) -> list[Tensor]:
    """For each grid the flat places, ascending, that are among the `code_size` largest positive values of all."""
    flat = torch.cat([grid.flatten() for grid in grids])
    if code_size > (usable := int((flat > 0).sum())):
        raise ValueError(f"Expected code_size={code_size} <= {usable}, the number of directions the prior's {count} rows span")
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.argsort(flat, descending=True, stable=True)[:code_size]] = True
    return [part.nonzero().flatten() for part in chosen.split([grid.numel() for grid in grids])]


def _is_matrix(factor: Factor) -> bool:
    return len(factor.shape) > 1 and min(_shape(factor)) > 1


def _shape(factor: Factor) -> tuple[int, int]:
    return factor.shape[0], factor.size // factor.shape[0]


def _matrices(rows: Tensor, factor: Factor) -> Tensor:
    return rearrange(rows[:, factor.offset : factor.stop], "sample (row column) -> sample row column", row=factor.shape[0])


def _gram(stack: Tensor) -> Tensor:
    """stack stack^T in float64, by pieces of columns so that the stack is not copied whole."""
    return sum(piece.double() @ piece.double().T for piece in stack.split(65_536, dim=1))


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and none below 0, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _spanned(values: Tensor) -> int:
    return int((values > _SPANNED * values[0]).sum())
