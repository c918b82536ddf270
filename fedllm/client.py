"""The client's side of a private sum: vectors of its units -> sum -> noise share -> quantize -> message."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs import Codec
from dr_encoder.layout import AdapterLayout
from dr_encoder.message import pack
from dr_encoder.moments import unit_moments
from dr_encoder.quantize import quantize
from fedllm.privacy.clipping import clip_bits, clip_by_group, clip_units_, unit_norms
from fedllm.privacy.noise import Noise
from fedllm.release import PrivateSum
from fedllm.schema import LocalConfig

Encode = Callable[[Tensor], Tensor]  # [units, n] -> [units, size]
BLOCK = 2**19  # values added at once


@dataclass(frozen=True)
class UnitMoments:
    """Stage 1's encode: moments of each factor [units, 2 L] in units of the public `scale` [L]."""

    layout: AdapterLayout
    scale: Tensor

    def __call__(self, updates: Tensor) -> Tensor:
        return unit_moments(updates, self.layout, self.scale)


def local_batches(records: np.ndarray, local: LocalConfig, uniforms: Callable[[tuple[int, int]], np.ndarray]) -> np.ndarray:
    """The records that a client trains on: all it has, or `federation.local.batch` of them drawn anew for each step [steps, batch].

    uniforms: shape -> independent numbers in [0, 1).
    """
    if local.batch is None or len(records) <= local.batch:
        return records
    chosen = records[uniforms((local.steps, len(records))).argsort(axis=1)[:, : local.batch]]
    return chosen if local.steps > 1 else chosen[0]


def code_of(codec: Codec, adapter: Tensor | None) -> Encode:
    """Stage 2's encode: codes of updates; with the `adapter` [n] that they start from, of the way from the new adapter to zero."""
    return codec.encode if adapter is None else lambda updates: codec.encode(updates - adapter)


def unit_vectors(updates: Tensor, encode: Encode, spec: PrivateSum) -> Tensor:
    """What each unit adds to its client's sum: updates [units, n] -> clipped vectors of norm at most spec.sensitivity.

    The updates are overwritten where they are what is clipped: copies of them cost more than all the rest.

    `noise_in: code` encodes, then clips, [units, size]; `noise_in: update` clips the update itself, [units, n]; clip groups one by one,
    each to spec.clip. With an adaptive clip the last coordinate is the unit's bit, +-1/2 of spec.bit_weight; it shares the event's noise.
    The bit is exact in float64 alone.
    Raises FloatingPointError for a non-finite update without privacy; under privacy such a unit becomes the zero vector.
    """
    vectors = updates if spec.noise_in == "update" else encode(updates)
    if not spec.private:
        expect_finite(vectors)
        return vectors
    norms = unit_norms(vectors) if spec.bit_weight else None
    clipped = clip_by_group(vectors, spec.clip, spec.groups) if spec.groups else clip_units_(vectors.detach().float(), spec.clip)
    if norms is None:
        return clipped
    bits = torch.where(norms.isfinite(), clip_bits(norms, spec.clip), 0.0) * spec.bit_weight
    return torch.cat([clipped.double(), bits[:, None]], dim=1)


def add_rows(totals: Tensor, places: Tensor, rows: Tensor) -> None:
    """Add each of rows [units, size] to the row of totals [clients, size], float64, that `places` [units] names."""
    width = max(1, BLOCK // max(1, len(rows)))  # a float64 copy of all rows at once would be twice what they take
    for start in range(0, rows.shape[1], width):
        totals[:, start : start + width].index_add_(0, places, rows[:, start : start + width].double())


def expect_finite(vectors: Tensor) -> None:
    """Without privacy, where nothing replaces it: raise FloatingPointError for a value of a client that is not finite."""
    if not torch.isfinite(vectors).all():
        raise FloatingPointError("a client's update is not finite")


def message(vector: Tensor, spec: PrivateSum, client: int, noise: Noise, encode: Encode) -> bytes:
    """The bytes one client sends.

    vector: sum of its units' clipped vectors. With `noise_in: update` the encoder follows the noise, as post-processing.
    """
    key = {"stage": spec.stage, "round": spec.round, "client": client}
    noisy = vector.double().numpy()
    if spec.share_std > 0:
        noisy = noisy + noise.gaussian(noisy.shape, spec.share_std, purpose="share", **key)
    if spec.noise_in == "update":
        noisy = encode(torch.from_numpy(noisy).float()[None])[0].double().numpy()
    uniforms = noise.uniform(noisy.shape, purpose="rounding", **key) if spec.bits != 32 else np.zeros(0)
    return pack(spec.header(client), quantize(noisy, spec.scale, spec.wire_bits, uniforms))
