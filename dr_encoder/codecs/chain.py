"""Two codecs in a row: the second codes the first one's code. Cheap and wide first, then narrow and exact: `coordinate` then `linear`.

`allocation` then `linear` is the principal subspace in the metric of an Adam server. Adam divides a coordinate by the root of its second
moment, so that g^T D^-1 g with D = diag(rms) is what a step along g gains; `allocation` divides a factor by the square root of its rms.
Without it a factor of large gradients (a new head) takes the whole code, and the others are lost though Adam would move them as far.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dr_encoder.codecs.allocation import AllocationCodec
from dr_encoder.codecs.base import CODECS, Codec, check_code_size, register, require_prior
from dr_encoder.codecs.linear import LinearCodec, check_dense, principal_subspace
from dr_encoder.layout import AdapterLayout, Factor
from dr_encoder.priors import GaussianPrior, from_rows

WIDER = 16


@register("chain")
class ChainCodec(Codec):
    """outer: update -> inner code; inner: inner code -> code. Linear, orthonormal and summable where both are."""

    def __init__(self, outer: Codec, inner: Codec):
        self.outer, self.inner = outer, inner
        self.update_size, self.code_size = outer.update_size, inner.code_size
        self.linear = outer.linear and inner.linear
        self.orthonormal = outer.orthonormal and inner.orthonormal
        self.summable = outer.summable and inner.summable

    @classmethod
    def fit(
        cls,
        prior: GaussianPrior | None,
        layout: AdapterLayout,
        code_size: int,
        noise_std: float,
        seed: int,
        *,
        parts: tuple[str, str] = ("coordinate", "linear"),
        inner_size: int | None = None,
        **options: Any,
    ) -> ChainCodec:
        """Fit the first to the prior, encode the prior's rows with it, fit the second to those.

        Args:
            parts: two registered families; the first one's codes must be summable, or they have no second moment to fit to.
            inner_size: code size of the first, from code_size to n; None for 16 code_size, at most n.
            options: go to both parts.
        Raises:
            ValueError: for a prior without rows, unknown or unfit parts, sizes out of order.
        """
        check_code_size(code_size, layout.size)
        rows = require_prior(prior, cls.name, rows=True).rows
        if len(parts) != 2 or not set(parts) <= CODECS.keys() or not CODECS[parts[0]].summable:
            known = ", ".join(sorted(CODECS))
            raise ValueError(f"Expected parts={list(parts)} to be two of {known}, the first with codes that can be summed")
        inner_size = min(WIDER * code_size, layout.size) if inner_size is None else inner_size
        if not code_size <= inner_size <= layout.size:
            raise ValueError(f"Expected code_size={code_size} <= inner_size={inner_size} <= {layout.size}")
        # The noise of a run is in the last code alone: the first codec never meets it.
        outer = CODECS[parts[0]].fit(prior, layout, inner_size, 0.0, seed, **options)
        if isinstance(outer, AllocationCodec) and parts[1] == LinearCodec.name:  # as long as the update: no copy of all rows for a scale
            check_dense(code_size, layout.size)
            return cls(outer, LinearCodec(*principal_subspace(rows, code_size, seed, outer.scale)))
        inner_layout = AdapterLayout((Factor("code", (outer.code_size,), 0),))
        codes = torch.empty(len(rows), outer.code_size)
        for row, code in zip(rows, codes, strict=True):
            code.copy_(outer.encode(row[None])[0])
        inner_prior = from_rows(prior.name, inner_layout, codes, prior.cost)
        return cls(outer, CODECS[parts[1]].fit(inner_prior, inner_layout, code_size, noise_std, seed, **options))

    def encode(self, updates: Tensor) -> Tensor:
        return self.inner.encode(self.outer.encode(updates))

    def metric(self, updates: Tensor) -> Tensor:
        return updates if self.orthonormal else self.outer.metric(updates)

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        between = self.inner.decode(mean_code, noise_std)
        if isinstance(self.outer, AllocationCodec):  # as long as the update: scaled in place
            return between.mul_(self.outer.scale)
        return self.outer.decode(between)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = {}, {}
        for key, part in (("outer", self.outer), ("inner", self.inner)):
            own, meta_of_part = part.state()
            tensors |= {f"{key}.{name}": tensor for name, tensor in own.items()}
            meta[key] = [part.name, meta_of_part]
        return tensors, meta

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> ChainCodec:
        parts = []
        for key in ("outer", "inner"):
            name, meta_of_part = meta[key]
            own = {name.removeprefix(f"{key}."): tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
            parts.append(CODECS[name].from_state(own, meta_of_part))
        return cls(*parts)
