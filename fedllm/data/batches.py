"""Batches of token ids: alike lengths together, padded to the longest, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass. `index` [rows] says which example each row is; tensors are [rows, width], int64."""

    index: np.ndarray
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on a device."""
        return Batch(self.index, *(value.to(device) for value in (self.input_ids, self.attention_mask, self.position_ids)))

    def first(self) -> Batch:
        """Its first row alone."""
        return Batch(self.index[:1], self.input_ids[:1], self.attention_mask[:1], self.position_ids[:1])


def make_batches(
    tokens: Sequence[Sequence[int]],
    index: np.ndarray | None = None,
    batch_tokens: int = 2048,
    pad_id: int = 0,
    side: str = "left",
    most: int | None = None,
) -> Iterator[Batch]:
    """Yield every chosen example exactly once, shortest first.

    Args:
        tokens: token ids of each example, at least one token each.
        index: [examples] which of them, in any order, repeats allowed; None for all.
        batch_tokens: rows x width of a batch stays within this, but for a single longer example.
        pad_id: fills up rows; masked out.
        side: 'left' puts each last token at -1 (causal LM); 'right' each first token at 0 (encoders, whose head
            pools the first token).
        most: rows of a batch; None for as many as fit.
    """
    index = np.arange(len(tokens)) if index is None else np.asarray(index, dtype=np.int64)
    lengths = np.array([len(tokens[i]) for i in index], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        stop = start + 1
        end = len(order) if most is None else min(len(order), start + most)
        while stop < end and (stop + 1 - start) * lengths[order[stop]] <= batch_tokens:
            stop += 1
        yield _pad(tokens, index[order[start:stop]], pad_id, side)
        start = stop


def _pad(tokens: Sequence[Sequence[int]], rows: np.ndarray, pad_id: int, side: str) -> Batch:
    width = max(len(tokens[i]) for i in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, i in enumerate(rows):
        length = len(tokens[i])
        span = slice(width - length, width) if side == "left" else slice(0, length)
        input_ids[row, span] = torch.as_tensor(tokens[i], dtype=torch.int64)
        mask[row, span] = 1
    return Batch(rows, input_ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
