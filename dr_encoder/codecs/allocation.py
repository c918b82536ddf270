"""An invertible code that gives each factor its own share of clip and noise (after ANADP, arXiv 2410.02912).

A factor f of d_f coordinates is divided by s_f before clip and noise, and multiplied by s_f after: its noise is s_f sigma instead of sigma.
With e_f the second moment of a coordinate, an expected squared norm of sum d_f e_f / s_f^2 has to fit under the clip, and the noise
that comes back has energy sigma^2 sum d_f s_f^2. By Cauchy's inequality the product of both is least for s_f^2 proportional to
sqrt(e_f), where it is (sum d_f sqrt(e_f))^2: never more than for equal shares. ANADP sets noise by a measure of importance taken from
private gradients; here importance is what the prior has, whose cost the ledger holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dr_encoder.codecs.base import Codec, register, require_prior, wiener_gain
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior

_LEAST = 1e-3  # of the largest scale: a factor without moments still gets through


@register("allocation")
class AllocationCodec(Codec):
    """code = update / scale, with one scale a factor, of mean square 1 over all coordinates: isotropic noise keeps its energy.

    scale [n] > 0. Formal guarantees: none of its own; the caller clips codes to C.
    """

    linear = True
    fits = ("moments", "rows")
    fixed_size = True

    def __init__(self, scale: Tensor, variance: Tensor):
        self.scale, self.variance = scale, variance
        self.code_size = self.update_size = len(scale)

    @classmethod
    def fit(
        cls, prior: GaussianPrior | None, layout: AdapterLayout, code_size: int | None, noise_std: float, seed: int, **options: Any
    ) -> AllocationCodec:
        """Scales from the prior's second moment of each factor; its structure within a factor is not used."""
        prior = require_prior(prior, cls.name)
        moment = prior.mean.double().square() + prior.std.double().square()
        if not moment.any():
            raise ValueError("Expected a prior with a factor that is not zero: there is nothing to share out by")
        root = moment.pow(0.25)
        scale = root.clamp_min(_LEAST * root.max())
        sizes = torch.tensor([factor.size for factor in layout.factors], dtype=torch.float64)
        scale = scale / ((sizes * scale.square()).sum() / layout.size).sqrt()
        return cls(layout.spread(scale.float()), layout.spread((moment / scale.square()).float()))

    def encode(self, updates: Tensor) -> Tensor:
        return updates / self.scale

    def metric(self, updates: Tensor) -> Tensor:
        return self.encode(updates)

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        return wiener_gain(mean_code, noise_std, self.variance).mul_(mean_code).mul_(self.scale)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"scale": self.scale, "variance": self.variance}, {}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> AllocationCodec:
        return cls(tensors["scale"], tensors["variance"])
