"""AdapterLayout: the named LoRA factors of a model and one flat vector, the same numbers in the same order."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """One trainable tensor of the adapter: its name, shape, and its place in the flat vector."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class AdapterLayout:
    """Order of the factors in the flat vector of length `size`."""

    factors: tuple[Factor, ...]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> AdapterLayout:
        """Lay out `(name, tensor)` pairs in the order given.

        Raises ValueError where nothing is trainable or a name comes twice.
        """
        factors: list[Factor] = []
        offset = 0
        for name, tensor in named:
            factors.append(Factor(name, tuple(tensor.shape), offset))
            offset += tensor.numel()
        if not factors:
            raise ValueError("Expected at least one trainable factor, found none")
        if len({factor.name for factor in factors}) != len(factors):
            raise ValueError("Expected distinct factor names")
        return cls(tuple(factors))

    @property
    def size(self) -> int:
        """Length n of the flat vector."""
        return self.factors[-1].stop

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Named tensors -> one float32 vector [n]."""
        return torch.cat([named[factor.name].detach().reshape(-1).float() for factor in self.factors])

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat [..., n] -> named views [..., *shape] into the same memory."""
        if flat.shape[-1] != self.size:
            raise ValueError(f"Expected a flat vector of {self.size} numbers, got {flat.shape[-1]}")
        lead = flat.shape[:-1]
        return {f.name: flat[..., f.offset : f.stop].reshape(*lead, *f.shape) for f in self.factors}

    def factor_ids(self) -> Tensor:
        """For each of the n coordinates the index of its factor, int64 [n]."""
        return torch.repeat_interleave(torch.tensor([factor.size for factor in self.factors]))

    def spread(self, per_factor: Tensor) -> Tensor:
        """One number a factor [L] -> one number a coordinate [n]."""
        spread = torch.empty(self.size, dtype=per_factor.dtype)  # repeat_interleave would make an index of n places
        for factor, value in zip(self.factors, per_factor, strict=True):
            spread[factor.offset : factor.stop] = value
        return spread

    def fingerprint(self) -> str:
        """16 hex digits over names and shapes."""
        text = json.dumps([[f.name, list(f.shape)] for f in self.factors])
        return hashlib.sha256(text.encode()).hexdigest()[:16]
