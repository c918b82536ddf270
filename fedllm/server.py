"""The server's side: messages -> validate -> sum -> noise to exactly the promised variance -> mean; and the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs import Codec
from dr_encoder.message import Inbox, MessageError
from dr_encoder.quantize import dequantize, quantize
from fedllm.privacy.clipping import clip_units
from fedllm.privacy.noise import Noise
from fedllm.release import PrivateSum
from fedllm.schema import ServerConfig
from fedllm.server_optimizers import OPTIMIZERS


def noisy_mean(messages: Iterable[bytes], spec: PrivateSum, noise: Noise) -> Tensor:
    """Mean over the *expected* cohort [size], its noise std spec.mean_std (and the lattice's rounding) whoever took part.

    A refused message counts as the zero code: nothing about it is told, and the server draws the noise share it would have brought.
    A well-formed hostile message is not detected; the lattice bounds it (with 32 bits only `central` does, by clipping again).
    """
    total = np.zeros(spec.size)
    shares = 0.0  # squared weights of the noise that came
    for weight, code in accepted(messages, spec):
        if spec.private and spec.noise == "central" and spec.unit == "client":
            # Rounding before the noise can lengthen a code; the sensitivity is what this clip says. (A sum of several users' codes
            # comes unrounded and is no single unit's: clipping it would cut it to the length of one.)
            code = clip_units(torch.from_numpy(code)[None], spec.sensitivity)[0].double().numpy()
        total += weight * code
        shares += weight**2
    if spec.noise == "central":
        missing = spec.sum_std
    else:
        # A share that came was rounded at random, at a variance of step^2 / 6; one that the server draws must weigh the same.
        rounding = 0.0 if spec.bits == 32 else spec.scale**2 / 6
        missing = math.sqrt(max(0.0, spec.square_weights - shares) * (spec.share_std**2 + rounding))
    if spec.private and missing > 0:
        total += noise.gaussian(total.shape, missing, purpose="server", stage=spec.stage, round=spec.round)
    if spec.private and spec.bits != 32:
        # On the lattice whoever took part: what is released has no low bits of floating-point noise.
        total = np.round(total / spec.scale) * spec.scale
    return torch.from_numpy(total / spec.expected).float()


def decoded_mean(
    messages: Iterable[bytes],
    spec: PrivateSum,
    noise: Noise,
    decode: Callable[[Tensor], Tensor],
    see: Callable[[Tensor, float], None] = lambda update, weight: None,
) -> Tensor:
    """Mean over the expected cohort of *decoded* messages [n], as published for the auto-encoder: `codec.decode: each`.

    The model then depends on every message, each protected by its own noise alone, and is accounted so (mechanism `gaussian_each`).
    Absent and refused ones are stood in for by messages of noise only, so that nothing follows the realised cohort.
    decode: one code [k] -> update [n]. see: is shown each of these with its message's weight.
    """
    total, slots = None, spec.shares if spec.private else 0
    for weight, code in accepted(messages, spec):
        update = decode(torch.from_numpy(code).float())
        see(update, weight)
        total = weight * update.double() if total is None else total + weight * update.double()
        slots -= 1
    for number in range(max(0, slots)):
        key = {"stage": spec.stage, "round": spec.round, "client": number}
        code = noise.gaussian((spec.size,), spec.share_std, purpose="stand-in", **key)
        if spec.bits != 32:
            uniforms = noise.uniform((spec.size,), purpose="stand-in rounding", **key)
            code = dequantize(quantize(code, spec.scale, spec.bits, uniforms), spec.scale)
        update = decode(torch.from_numpy(code).float())
        see(update, 1.0)
        total = update.double() if total is None else total + update.double()
    if total is None:  # an empty cohort of a run without privacy
        total = torch.zeros_like(decode(torch.zeros(spec.size)), dtype=torch.float64)
    return (total / spec.expected).float()


def accepted(messages: Iterable[bytes], spec: PrivateSum) -> Iterator[tuple[float, np.ndarray]]:
    """Weight and code [size], float64, of each message that passes every check; the others are dropped without a word."""
    inbox = Inbox(spec.expects())
    for sent in messages:
        try:
            client, lattice = inbox.accept(sent)
        except MessageError:
            continue
        yield spec.weight(client), dequantize(lattice, spec.scale)


SCHEDULES: dict[str, Callable[[int, int], float]] = {  # (round, rounds) -> the share of lr that a step takes; public, and costs nothing
    "constant": lambda number, rounds: 1.0,
    "linear": lambda number, rounds: 1.0 - number / rounds,
}


class ServerOptimizer:
    """One of OPTIMIZERS on the flat adapter; the decoded mean update stands where a gradient stands."""

    def __init__(self, adapter: Tensor, config: ServerConfig):
        self.adapter = adapter.clone().requires_grad_()
        self.optimizer = OPTIMIZERS[config.optimizer]([self.adapter], config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def step(self, update: Tensor, rate: float = 1.0) -> Tensor:
        """New adapter [n] after one step along the mean update [n], `rate` of the configured lr long.

        Raises FloatingPointError where the update or the new adapter is not finite; the adapter then stays as it was.
        """
        if not torch.isfinite(update).all():
            raise FloatingPointError("the aggregated update is not finite")
        before = self.adapter.detach().clone()
        self.adapter.grad = update
        for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = lr * rate
        self.optimizer.step()
        if not torch.isfinite(self.adapter).all():
            with torch.no_grad():
                self.adapter.copy_(before)
            raise FloatingPointError("the new adapter is not finite")
        return self.adapter.detach().clone()

    def state(self) -> dict[str, Tensor]:
        """The adapter and the optimiser's moments, as named tensors."""
        moments = self.optimizer.state_dict()["state"].get(0, {})
        return {"adapter": self.adapter.detach()} | {
            f"optimizer.{key}": value for key, value in moments.items() if isinstance(value, Tensor)
        }

    def restore(self, tensors: dict[str, Tensor], codec: Codec | None = None) -> None:
        """Inverse of `state`; the codec is of no use to moments of updates."""
        with torch.no_grad():
            self.adapter.copy_(tensors["adapter"])
        moments = {key.removeprefix("optimizer."): value for key, value in tensors.items() if key.startswith("optimizer.")}
        if moments:
            full = self.optimizer.state_dict()
            full["state"] = {0: moments}
            self.optimizer.load_state_dict(full)
