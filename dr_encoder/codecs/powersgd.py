"""PowerSGD (Vogels, Karimireddy and Jaggi 2019, arXiv 1905.13727, algorithm 1): each matrix by one subspace iteration at rank r.

P = orth(M Q), Q' = M^T P, and M is rebuilt as P Q'^T: the projection of M on P's columns. A lossy baseline without DP: P differs
from update to update, so codes cannot be summed. (The original agrees on P in a first all-reduce and sums Q' in a second; a federated
client sends one message.) Use it with `dr_encoder.feedback`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dr_encoder.codecs.base import Codec, check_code_size, register, require_no_noise
from dr_encoder.layout import AdapterLayout, Factor
from dr_encoder.priors import GaussianPrior


class Block(NamedTuple):
    """One factor: place and shape [rows, columns] in the update; rank 0 where it is sent whole."""

    offset: int
    rows: int
    columns: int
    rank: int

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def code_size(self) -> int:
        return self.rank * (self.rows + self.columns) if self.rank else self.size


@register("powersgd")
class PowerSGDCodec(Codec):
    """Blocks, and the start Q [columns, rank] of each. Code: per factor P, then Q', both flat; the factor itself where rank is 0.

    A factor is sent whole where P and Q would take as many numbers: vectors, and small matrices.
    """

    summable = False
    fits = ()

    def __init__(self, blocks: list[Block], starts: Tensor):
        self.blocks, self.starts = blocks, starts
        self._starts = [
            rearrange(start, "(column rank) -> column rank", rank=block.rank) if block.rank else None
            for block, start in zip(blocks, starts.split([block.columns * block.rank for block in blocks]), strict=True)
        ]
        self.update_size = sum(block.size for block in blocks)
        self.code_size = sum(block.code_size for block in blocks)

    @classmethod
    def fit(
        cls,
        prior: GaussianPrior | None,
        layout: AdapterLayout,
        code_size: int | None,
        noise_std: float,
        seed: int,
        *,
        rank: int | None = None,
        **options: Any,
    ) -> PowerSGDCodec:
        """Start each Q at random columns, as at every refit of a run; `warm_started` carries the last one on where somebody holds it.

        Args:
            code_size: None, or at most so many numbers are sent (the codec's own `code_size` says how many).
            rank: >= 1 for all matrices; None for the largest that fits `code_size`, or 1 without one.
        Raises:
            ValueError: where rank 1, or the rank given, does not fit.
        """
        if code_size is not None:
            check_code_size(code_size, layout.size)
        if rank is not None and rank < 1:
            raise ValueError(f"Expected rank={rank} >= 1")
        chosen = rank or 1
        while rank is None and code_size is not None and _code_size(layout, chosen + 1) <= code_size and chosen < _most(layout):
            chosen += 1
        needed = _code_size(layout, chosen)
        if code_size is not None and needed > code_size:
            raise ValueError(f"Expected code_size={code_size} >= {needed}, what rank {chosen} takes")
        blocks = _blocks(layout, chosen)
        generator = torch.Generator().manual_seed(seed)
        return cls(blocks, torch.randn(sum(block.columns * block.rank for block in blocks), generator=generator))

    def warm_started(self, code: Tensor) -> PowerSGDCodec:
        """The codec of the next step, which starts from the Q' of this step's code [k] (of one update, or of the mean update encoded).

        A column of Q' that is zero keeps its old start: it would stay zero for ever.
        """
        starts = []
        for block, start, part in self._parts(code):
            if block.rank:
                found = rearrange(part[block.rows * block.rank :], "(column rank) -> column rank", rank=block.rank)
                starts.append(torch.where(found.any(0), found, start).flatten())
        return PowerSGDCodec(self.blocks, torch.cat(starts) if starts else self.starts)

    def encode(self, updates: Tensor) -> Tensor:
        codes = torch.empty(len(updates), self.code_size)
        done = 0
        for block, start in zip(self.blocks, self._starts, strict=True):
            flat = updates[:, block.offset : block.offset + block.size]
            part = flat
            if block.rank:
                matrices = rearrange(flat, "unit (row column) -> unit row column", row=block.rows)
                left = torch.linalg.qr(matrices @ start).Q
                right = matrices.mT @ left
                left = left * right.any(1, keepdim=True)  # a column that carries nothing is no news: zero updates get zero codes
                part = torch.cat([left.flatten(1), right.flatten(1)], 1)
            codes[:, done : done + block.code_size] = part
            done += block.code_size
        return codes

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        """ONE update's code [k] -> update [n]. Raises ValueError for noise."""
        require_no_noise(noise_std, self.name)
        update = torch.empty(self.update_size)
        for block, _, part in self._parts(mean_code):
            whole = part
            if block.rank:
                left, right = part.split([block.rows * block.rank, block.columns * block.rank])
                left = rearrange(left, "(row rank) -> row rank", rank=block.rank)
                right = rearrange(right, "(column rank) -> rank column", rank=block.rank)
                whole = (left @ right).flatten()
            update[block.offset : block.offset + block.size] = whole
        return update

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"starts": self.starts}, {"blocks": [list(block) for block in self.blocks]}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> PowerSGDCodec:
        return cls([Block(*block) for block in meta["blocks"]], tensors["starts"])

    def _parts(self, code: Tensor) -> list[tuple[Block, Tensor | None, Tensor]]:
        parts = code.split([block.code_size for block in self.blocks])
        return list(zip(self.blocks, self._starts, parts, strict=True))


def _block(factor: Factor, rank: int) -> Block:
    rows = factor.shape[0] if len(factor.shape) > 1 else 1
    block = Block(factor.offset, rows, factor.size // max(rows, 1), min(rank, rows, factor.size // max(rows, 1)))
    return block if block.code_size < block.size else block._replace(rank=0)


def _blocks(layout: AdapterLayout, rank: int) -> list[Block]:
    return [_block(factor, rank) for factor in layout.factors]


def _code_size(layout: AdapterLayout, rank: int) -> int:
    return sum(block.code_size for block in _blocks(layout, rank))


def _most(layout: AdapterLayout) -> int:
    """A rank beyond which nothing changes."""
    return max(min(factor.shape[0], factor.size // max(factor.shape[0], 1)) if factor.shape else 1 for factor in layout.factors)
