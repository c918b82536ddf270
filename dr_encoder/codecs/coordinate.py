"""A code of k chosen coordinates: those of largest prior variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dr_encoder.codecs.base import Codec, check_code_size, register, require_prior, wiener_gain
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior

PART = 2**19  # coordinates looked at together


@register("coordinate")
class CoordinateCodec(Codec):
    """Chosen coordinates, sorted [k], and their prior variance [k]."""

    linear = True
    orthonormal = True
    fits = ("rows", "moments")

    def __init__(self, chosen: Tensor, variance: Tensor, update_size: int):
        self.chosen, self.variance, self.update_size = chosen, variance, update_size
        self.code_size = len(chosen)

    @classmethod
    def fit(
        cls, prior: GaussianPrior | None, layout: AdapterLayout, code_size: int, noise_std: float, seed: int, **options: Any
    ) -> CoordinateCodec:
        """The `code_size` coordinates of largest prior variance; ties (all coordinates of a factor) are broken by the seed."""
        check_code_size(code_size, layout.size)
        variance = require_prior(prior, cls.name).variance()
        # By a threshold, part by part: sorting a large update would take many times its memory.
        largest = variance[:0]
        for part in variance.split(PART):
            both = torch.cat([largest, part])
            largest = both.topk(min(code_size, len(both)), sorted=False).values
        least = float(largest.min())
        taken = variance > least
        open_places = code_size - int(taken.count_nonzero())  # a sum would first turn every one of them into 8 bytes
        if int((variance == least).count_nonzero()) > open_places:
            shuffled = torch.randperm(layout.size, generator=torch.Generator().manual_seed(seed))
            taken[shuffled[variance[shuffled] == least][:open_places]] = True
        else:
            taken |= variance == least
        chosen = taken.nonzero().flatten()
        return cls(chosen, variance[chosen], layout.size)

    def encode(self, updates: Tensor) -> Tensor:
        return updates[:, self.chosen]

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        update = torch.zeros(self.update_size)
        update[self.chosen] = mean_code * wiener_gain(mean_code, noise_std, self.variance)
        return update

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"chosen": self.chosen, "variance": self.variance}, {"update_size": self.update_size}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> CoordinateCodec:
        return cls(tensors["chosen"], tensors["variance"], meta["update_size"])
