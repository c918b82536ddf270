"""Adam in the code's own coordinates: what a code leaves out stays out of the step.

Adam on a decoded mean brings all n coordinates of the adapter to one size, also those in which k numbers leave a small constant remainder;
on some tasks these carry the model off. Here first and second moments are those of the k numbers, as GaLore (arXiv 2403.03507) keeps them
of a projected gradient, and the second moment of a noisy number counts its noise: each is damped by as much as it drowns. When the codec
is fitted anew the moments are carried over by its change of basis, after LDAdam (arXiv 2410.16103).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dr_encoder.codecs import Codec
from fedllm.errors import UserError
from fedllm.schema import ServerConfig

MOST_CARRIED = 8192  # numbers of a code whose change of basis [k, k] is still formed


class CodeAdam:
    """The server's step where `federation.server.space` is code.

    The step is decode(lr sqrt(n / k) m / (sqrt(v) + tau)) with both moments corrected for their start, so that with any code size lr is
    the root mean square of a step over the n numbers of the adapter, as Adam's on all of them.
    """

    def __init__(self, adapter: Tensor, config: ServerConfig):
        self.adapter = adapter.clone()
        self.config = config
        self.codec: Codec | None = None
        self.first = self.second = torch.zeros(0)
        self.steps = 0

    def use(self, codec: Codec) -> None:
        """Take over a codec; moments of an earlier one move into its coordinates.

        Raises UserError where both have more than MOST_CARRIED numbers.
        """
        if self.codec is None:
            self.first, self.second = torch.zeros(codec.code_size), torch.zeros(codec.code_size)
        elif codec.fingerprint() != self.codec.fingerprint():
            turn = change_of_basis(self.codec, codec)
            self.first, self.second = turn @ self.first, turn.square() @ self.second
        self.codec = codec

    def step(self, code: Tensor, rate: float = 1.0) -> Tensor:
        """New adapter [n] after one step along the mean code [k], `rate` of the configured lr long.

        Raises FloatingPointError where the code or the new adapter is not finite; everything then stays as it was.
        """
        if not torch.isfinite(code).all():
            raise FloatingPointError("the aggregated code is not finite")
        c = self.config
        first = torch.lerp(self.first, code, 1 - c.betas[0])
        second = torch.lerp(self.second, code.square(), 1 - c.betas[1])
        count = self.steps + 1
        moment = first / (1 - c.betas[0] ** count)
        spread = (second / (1 - c.betas[1] ** count)).sqrt()
        length = c.lr * rate * math.sqrt(len(self.adapter) / len(code))
        adapter = self.adapter - self.codec.decode(length * moment / (spread + c.tau))
        if not torch.isfinite(adapter).all():
            raise FloatingPointError("the new adapter is not finite")
        self.adapter, self.first, self.second, self.steps = adapter, first, second, count
        return adapter.clone()

    def state(self) -> dict[str, Tensor]:
        """The adapter and the moments, as named tensors."""
        moments = {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}
        return {"adapter": self.adapter} | {f"optimizer.{key}": value for key, value in moments.items()}

    def restore(self, tensors: dict[str, Tensor], codec: Codec | None) -> None:
        """Inverse of `state`, with the codec that the moments are of."""
        self.adapter, self.codec = tensors["adapter"].clone(), codec
        self.first, self.second = tensors["optimizer.first"], tensors["optimizer.second"]
        self.steps = int(tensors["optimizer.steps"])


def too_long_to_carry(size: int) -> UserError:
    """What is said of moments of more than MOST_CARRIED numbers that would have to follow a refit."""
    return UserError(
        f"federation.server.space=code: expected codec.refresh=0 with a code of more than {MOST_CARRIED:,} numbers "
        f"(here {size:,}), whose change of basis is too large; or space=update"
    )


def change_of_basis(old: Codec, new: Codec) -> Tensor:
    """What a code [k_old] becomes when it is decoded and encoded anew: a matrix [k_new, k_old].

    Raises UserError above MOST_CARRIED numbers.
    """
    longer = max(old.code_size, new.code_size)
    if longer > MOST_CARRIED:
        raise too_long_to_carry(longer)
    pieces = torch.eye(old.code_size).split(64)
    return torch.cat([new.encode(old.decode_rows(piece)) for piece in pieces]).T
