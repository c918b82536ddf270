"""The largest magnitudes of each update, with their places: a lossy baseline without DP.

Which coordinates were kept is part of the code and differs from update to update, so codes cannot be summed, and the choice
itself would be a release of private data.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dr_encoder.codecs.base import Codec, check_code_size, register, require_no_noise
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior

RADIX = 1 << 24  # float32 holds every whole number up to here


@register("topk")
class TopKCodec(Codec):
    """Code: m values, then for each `digit` the m digits of their places (base 2^24, least first), in order of place.

    One digit does for updates of up to 2^24 numbers, so a kept coordinate costs two numbers there and three beyond. `code_size` counts
    what is sent, so m = code_size // (1 + digits), and an odd number left over is not sent. Slots without a value are zeros.
    """

    summable = False
    fits = ()

    def __init__(self, update_size: int, kept: int):
        self.update_size, self.kept = update_size, kept
        self.digits = digits_of(update_size)
        self.code_size = kept * (1 + self.digits)

    @classmethod
    def fit(
        cls, prior: GaussianPrior | None, layout: AdapterLayout, code_size: int, noise_std: float, seed: int, **options: Any
    ) -> TopKCodec:
        """Nothing to fit. Raises ValueError where not even one value with its place fits."""
        check_code_size(code_size, layout.size)
        least = 1 + digits_of(layout.size)
        if code_size < least:
            raise ValueError(f"Expected code_size={code_size} >= {least}: a value and its place")
        return cls(layout.size, code_size // least)

    def encode(self, updates: Tensor) -> Tensor:
        places = torch.empty(len(updates), self.kept, dtype=torch.int64)
        for update, row in zip(updates, places, strict=True):
            row.copy_(largest_places(update, self.kept))
        values = updates.gather(1, places)
        places = torch.where(values == 0, 0, places)  # so that a zero update has the zero code
        digits = torch.stack([places // RADIX**digit % RADIX for digit in range(self.digits)], 1)
        return torch.cat([values, rearrange(digits.float(), "unit digit kept -> unit (digit kept)")], 1)

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        """ONE update's code [k] -> update [n].

        Raises ValueError for noise, and for places that are none: a mean of several codes, most likely.
        """
        require_no_noise(noise_std, self.name)
        values, *digits = rearrange(mean_code, "(part kept) -> part kept", kept=self.kept).double()
        places = sum(digit * RADIX**power for power, digit in enumerate(digits))
        if not ((places == places.round()) & (places >= 0) & (places < self.update_size)).all():
            raise ValueError(f"Expected one update's code: its places are not whole numbers below {self.update_size}")
        # Added, not assigned: empty slots say "nothing at place 0".
        return torch.zeros(self.update_size).index_add_(0, places.long(), values.float())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"update_size": self.update_size, "kept": self.kept}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> TopKCodec:
        return cls(meta["update_size"], meta["kept"])


def largest_places(update: Tensor, kept: int) -> Tensor:
    """Places of the `kept` largest magnitudes of update [n], ascending; of equal ones the first.

    By a partition in place: a sort of values with their places, as in torch.topk, takes the memory of five updates. NaN counts as infinite.
    """
    magnitudes = update.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf).numpy()
    magnitudes.partition(len(magnitudes) - kept)
    least = float(magnitudes[len(magnitudes) - kept])
    above = ((update > least) | (update < -least) | update.isnan()).nonzero().flatten()
    level = ((update == least) | (update == -least)).nonzero().flatten()
    return torch.cat([above, level])[:kept].sort().values


def digits_of(update_size: int) -> int:
    """How many digits of base 2^24 a place below `update_size` needs."""
    digits = 1
    while RADIX**digits < update_size:
        digits += 1
    return digits
