"""No code at all: the update itself, for the contrast (noise in all n coordinates)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dr_encoder.codecs.base import Codec, register, wiener_gain
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior


@register("identity")
class IdentityCodec(Codec):
    """code = update; decoding shrinks each coordinate by its prior variance [n] where one is known."""

    linear = True
    orthonormal = True
    fits = ()
    fixed_size = True

    def __init__(self, variance: Tensor):
        self.variance = variance
        self.code_size = self.update_size = len(variance)

    @classmethod
    def fit(
        cls, prior: GaussianPrior | None, layout: AdapterLayout, code_size: int, noise_std: float, seed: int, **options: Any
    ) -> IdentityCodec:
        """Nothing to fit; without a prior all coordinates are shrunk alike."""
        if prior is None:
            return cls(torch.ones(layout.size))
        # One variance a factor: a coordinate's own public variance is too rough an estimate to divide by.
        return cls(layout.spread(prior.mean.square() + prior.std.square()))

    def encode(self, updates: Tensor) -> Tensor:
        return updates

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        return wiener_gain(mean_code, noise_std, self.variance).mul_(mean_code)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"variance": self.variance}, {}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> IdentityCodec:
        return cls(tensors["variance"])
