"""A seeded random projection: a count-sketch with equal buckets. Nothing is stored but a seed and two sizes.

The update is cut into blocks of k coordinates. Each coordinate gets a random sign, each block a random cyclic shift, and
coordinate j of a block adds to bucket (j + shift) mod k. Two coordinates of different blocks share a bucket with
probability 1/k, two of one block never, so this is as good a hash as a count-sketch asks for (Charikar, Chen and
Farach-Colton 2002), no bucket is ever empty, and bucket sizes differ by one at most. Buckets have disjoint supports: divided by the
root of its size each is a unit vector orthogonal to all others, exactly.

It knows nothing of the updates, so it keeps k/n of any update's energy on average over seeds, as it would of white noise: the floor that
a codec fitted to a prior has to beat.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs.base import Codec, check_code_size, register, wiener_gain
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior

_PIECE = 1 << 16  # coordinates hashed at once: a multiple of 8, small beside an update, and in the cache


@register("sketch")
class SketchCodec(Codec):
    """n, k and a seed. Encode and decode take O(n) time, and n/8 bytes for the signs."""

    linear = True
    orthonormal = True
    fits = ()

    def __init__(self, update_size: int, code_size: int, seed: int):
        self.update_size, self.code_size, self.seed = update_size, code_size, seed
        # Raw words of a counter-based generator: numpy promises that its bit generators' streams never change (NEP 19), while
        # torch promises nothing between releases or devices, and every party must get the same projection from the same seed.
        words = np.random.Philox(key=seed)
        blocks = -(-update_size // code_size)
        self._shifts = torch.from_numpy((words.random_raw(blocks) % np.uint64(code_size)).astype(np.int64))
        self._signs = words.random_raw(-(-update_size // 64)).astype("<u8").view(np.uint8)
        buckets = (torch.arange(update_size - (blocks - 1) * code_size) + self._shifts[-1]) % code_size
        sizes = torch.full((code_size,), blocks - 1)
        sizes[buckets] += 1
        self._scale = sizes.rsqrt()

    @classmethod
    def fit(
        cls, prior: GaussianPrior | None, layout: AdapterLayout, code_size: int, noise_std: float, seed: int, **options: Any
    ) -> SketchCodec:
        """Nothing to fit: seed >= 0 and the sizes are all there is."""
        check_code_size(code_size, layout.size)
        return cls(layout.size, code_size, seed)

    def encode(self, updates: Tensor) -> Tensor:
        codes = torch.zeros(len(updates), self.code_size)
        for start, stop, bucket, sign in self._hashed():
            for code, update in zip(codes, updates, strict=True):  # one row at a time: a row's code is that row's alone
                code.index_add_(0, bucket, update[start:stop] * sign)
        return codes.mul_(self._scale)

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        spread = mean_code * wiener_gain(mean_code, noise_std, torch.ones(self.code_size)) * self._scale
        update = torch.empty(self.update_size)
        for start, stop, bucket, sign in self._hashed():
            torch.mul(spread[bucket], sign, out=update[start:stop])
        return update

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"update_size": self.update_size, "code_size": self.code_size, "seed": self.seed}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> SketchCodec:
        return cls(meta["update_size"], meta["code_size"], meta["seed"])

    def _hashed(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Pieces of the update: start, stop, each coordinate's bucket and its sign."""
        for start in range(0, self.update_size, _PIECE):
            stop = min(start + _PIECE, self.update_size)
            place = torch.arange(start, stop)
            bits = np.unpackbits(self._signs[start // 8 : -(-stop // 8)], bitorder="little")[: stop - start]
            sign = torch.from_numpy(bits).float().mul_(-2).add_(1)
            yield start, stop, (place + self._shifts[place // self.code_size]) % self.code_size, sign
