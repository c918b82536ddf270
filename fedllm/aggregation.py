"""What the server makes of a round's messages: the mean of A and of B apart, or an average that is exact for the product B A.

The mean of A and the mean of B multiply to mean(B) mean(A), not to mean(B A). Two remedies read every message: *stack* puts the sum of
the products into the frozen weights and begins a new adapter (FLoRA, arXiv 2409.05976, also DP-FedLoRA, arXiv 2509.09097); *residual*
averages A and B and puts what is missing into the frozen weights (FedEx-LoRA, arXiv 2410.09432). The frozen weights stay as they are: what
goes into them is a dense matrix beside each (`lora_layers.add_dense`).

A message stands for its client's adapter: the global one less the client's update. Sums are divided by the *expected* cohort: what is
averaged is the change of the product, B_i A_i - B A, so that who takes part shows no further than in a mean of updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from dr_encoder.layout import AdapterLayout
from fedllm.adapters import usual_a
from fedllm.lora_layers import ADAPTER, add_dense, lora_layers

CHUNK_BYTES = 128 * 2**20  # of updates that are stacked at once
DENSE = "dense."


class Aggregation(Protocol):
    """One round is `begin`, `add` for each message where these are decoded one by one, and `finish`.

    each: whether it needs every decoded message (`codec.decode: each`); whatever is released then depends on each of them.
    """

    each: ClassVar[bool]

    def __init__(self, model: nn.Module, layout: AdapterLayout, seed: int): ...

    def begin(self, adapter: Tensor, of_state: bool = False) -> None:
        """The adapter [n] that the round starts from; of_state: whether messages count from zero and not from it."""

    def add(self, update: Tensor, weight: float = 1.0) -> None:
        """One decoded message [n], old (or zero) minus new adapter of its client, and its weight in the sum."""

    def finish(self, update: Tensor, expected: float, number: int) -> Tensor:
        """The update [n] for the server's optimiser in round `number`, from the global adapter less the mean of new ones [n]."""

    def state(self) -> dict[str, Tensor]:
        """What the model has besides the adapter, as named tensors: for checkpoints, and broadcast with the adapter."""

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`."""


AGGREGATIONS: dict[str, type[Aggregation]] = {}


def register(name: str):
    """Make an aggregation known under `name`."""

    def add(cls: type[Aggregation]) -> type[Aggregation]:
        AGGREGATIONS[name] = cls
        return cls

    return add


@register("mean")
class Mean:
    """A, B and head averaged apart."""

    each = False

    def __init__(self, model: nn.Module, layout: AdapterLayout, seed: int):
        pass

    def begin(self, adapter: Tensor, of_state: bool = False) -> None:
        pass

    def add(self, update: Tensor, weight: float = 1.0) -> None:
        pass

    def finish(self, update: Tensor, expected: float, number: int) -> Tensor:
        return update

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        pass


@dataclass(frozen=True)
class Pair:
    """The factors of one target matrix by their names, and alpha/r."""

    a: str
    b: str
    scaling: float


class Products:
    """Sums of products over clients, and the dense matrices that they go into.

    With u_i = old - new of client i the change of its product is B_i A_i - B A = u_Bi u_Ai - u_Bi A - B u_Ai. The last two terms follow
    from the means; only the sum of u_Bi u_Ai needs every message, and nothing cancels in it. Where messages count from zero, B and A are
    zero in this.
    """

    each = True

    def __init__(self, model: nn.Module, layout: AdapterLayout, seed: int):
        self.layout, self.seed = layout, seed
        self.pairs = {
            name: Pair(f"{name}.lora_A.{ADAPTER}.weight", f"{name}.lora_B.{ADAPTER}.weight", layer.scaling[ADAPTER])
            for name, layer in lora_layers(model).items()
        }
        self.dense = add_dense(model)
        self.adapter: Tensor | None = None
        self.origin: Tensor | None = None  # that messages count from: the adapter, or zero
        self._waiting: list[tuple[Tensor, float]] = []
        self._sums: dict[str, Tensor] = {}

    def begin(self, adapter: Tensor, of_state: bool = False) -> None:
        self.adapter, self._waiting = adapter, []
        self.origin = torch.zeros_like(adapter) if of_state else adapter
        self._sums = {name: torch.zeros(dense.shape, dtype=torch.float64) for name, dense in self.dense.items()}

    def add(self, update: Tensor, weight: float = 1.0) -> None:
        self._waiting.append((update, weight))
        if len(self._waiting) * 4 * self.layout.size >= CHUNK_BYTES:
            self._stack()

    def _stack(self) -> None:
        """(B_1|...|B_K) (A_1;...;A_K) of the updates that wait, to the sums."""
        if not self._waiting:
            return
        updates = self.layout.views(torch.stack([update for update, _ in self._waiting]))
        weights = torch.tensor([weight for _, weight in self._waiting])
        for name, pair in self.pairs.items():
            b = rearrange(weights[:, None, None] * updates[pair.b], "client m r -> m (client r)")
            self._sums[name] += b @ rearrange(updates[pair.a], "client r n -> (client r) n")
        self._waiting = []

    def _second_order(self, expected: float) -> dict[str, Tensor]:
        """Sum of u_Bi u_Ai over the expected cohort, of each target [out, in] float64."""
        self._stack()
        return {name: value / expected for name, value in self._sums.items()}

    def _factors(self, pair: Pair, adapter: Tensor) -> tuple[Tensor, Tensor]:
        """B [out, r] and A [r, in] of a flat vector [n], float64."""
        views = self.layout.views(adapter.double())
        return views[pair.b], views[pair.a]

    def _to_dense(self, grown: dict[str, Tensor]) -> None:
        """Add (alpha/r) times `grown` to the dense matrices; all or, where something is not finite, FloatingPointError and none."""
        sums = {name: (self.dense[name].double().cpu() + self.pairs[name].scaling * value).float() for name, value in grown.items()}
        if not all(torch.isfinite(value).all() for value in sums.values()):
            raise FloatingPointError("the aggregated product is not finite")
        for name, value in sums.items():
            self.dense[name].copy_(value)

    def state(self) -> dict[str, Tensor]:
        return {DENSE + name: dense for name, dense in self.dense.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, dense in self.dense.items():
            dense.copy_(tensors[DENSE + name])


@register("stack")
class Stack(Products):
    """The whole product into the frozen weights; then a new adapter, A random by the public seed and the round, B zero."""

    def finish(self, update: Tensor, expected: float, number: int) -> Tensor:
        grown, mean = self._second_order(expected), update - (self.adapter - self.origin)
        for name, pair in self.pairs.items():
            (b, a), (mean_b, mean_a) = self._factors(pair, self.origin), self._factors(pair, mean)
            grown[name] += (b - mean_b) @ a - b @ mean_a
        self._to_dense(grown)
        generator = torch.Generator().manual_seed(int(np.random.default_rng([self.seed, 5, number]).integers(2**62)))
        update = update.clone()
        old, step = self.layout.views(self.adapter), self.layout.views(update)  # a head is averaged
        for pair in self.pairs.values():
            step[pair.a].copy_(old[pair.a] - usual_a(old[pair.a].shape, generator))
            step[pair.b].copy_(old[pair.b])
        return update


@register("residual")
class Residual(Products):
    """A and B averaged; mean(B_i A_i) - mean(B) mean(A) into the frozen weights."""

    def finish(self, update: Tensor, expected: float, number: int) -> Tensor:
        grown, mean = self._second_order(expected), update - (self.adapter - self.origin)
        for name, pair in self.pairs.items():
            mean_b, mean_a = self._factors(pair, mean)
            grown[name] -= mean_b @ mean_a
        self._to_dense(grown)
        return update
