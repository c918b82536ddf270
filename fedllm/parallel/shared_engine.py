"""Rank 0's engine in `parallel.mode: clients`: what is public is shared out over the ranks, and every rank has the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedllm.evaluation import merge
from fedllm.lora_layers import beside_adapter
from fedllm.ranks import Team
from fedllm.training.engine import Encoded, Evaluation, TorchEngine, chunks


class SharedEngine:
    """An engine like `local`, the one of this rank, with the help of the others'."""

    def __init__(self, local: TorchEngine, team: Team):
        self.local, self.team = local, team
        self.model, self.layout = local.model, local.layout

    def adapter(self) -> Tensor:
        return self.local.adapter()

    def load(self, flat: Tensor) -> None:
        """Put a flat adapter [n], and what else of this model is not frozen for good, into all ranks' models."""
        self.local.load(flat)
        self.team.ask("load", flat, beside_adapter(self.model))

    def save(self, path: Path) -> None:
        self.local.save(path)

    def batches(self, data: Encoded, units: list[np.ndarray]) -> Iterator[np.ndarray]:
        return self.local.batches(data, units)

    def updates(
        self, data: Encoded, units: list[np.ndarray], steps: int = 1, lr: float = 1.0, prox: float = 0.0
    ) -> Iterator[tuple[slice, Tensor]]:
        """As of TorchEngine."""
        for where in chunks(len(units), self.layout.size):
            parts = self._dealt(data, units[where])
            shares = [excerpt(data, [units[where][place] for place in part]) for part in parts]
            self.team.tell("updates", steps, lr, prox, shares=shares)
            rows = torch.empty(where.stop - where.start, self.layout.size)
            for some, found in self.local.updates(*shares[0], steps, lr, prox):
                rows[parts[0][some]] = found
            for part, found in zip(parts[1:], self.team.replies(), strict=True):
                rows[part] = found
            yield where, rows

    def evaluate(self, data: Encoded, progress: Callable[[int], None] | None = None) -> Evaluation:
        """As of TorchEngine; progress tells of this rank's part as if it stood for all."""
        shares = [share for share, _ in self._shares(data)]
        own = len(shares[0])
        self.team.tell("evaluate", shares=shares)
        whole, count = self.local.evaluate(shares[0], progress and (lambda done: progress(done * len(data) // own))), own
        for share, found in zip(shares[1:], self.team.replies(), strict=True):
            if found is not None:
                whole, count = merge(whole, count, found, len(share)), count + len(share)
        return whole

    def probabilities(self, data: Encoded) -> Tensor:
        """As of TorchEngine."""
        shares = self._shares(data)
        self.team.tell("probabilities", shares=[share for share, _ in shares])
        found = [self.local.probabilities(shares[0][0]), *self.team.replies()]
        rows = torch.empty(len(data), found[0].shape[1], dtype=found[0].dtype)
        for (_, places), some in zip(shares, found, strict=True):
            if some is not None:
                rows[places] = some
        return rows

    def _shares(self, data: Encoded) -> list[tuple[Encoded, np.ndarray]]:
        """Examples for each rank, at least one for this one, and their places."""
        units = list(np.arange(len(data))[:, None])
        return [(excerpt(data, [units[place] for place in part])[0], part) for part in self._dealt(data, units)]

    def _dealt(self, data: Encoded, units: list[np.ndarray]) -> list[np.ndarray]:
        """Which units each rank takes.

        Single examples go by whole batches: each is then computed beside the same others, to the same bits, as in one process.
        """
        size = self.team.size
        if any(len(unit) != 1 for unit in units):
            return [np.arange(rank, len(units), size) for rank in range(size)]
        batches = [*self.local.batches(data, units), *[np.empty(0, np.int64)] * size]
        return [np.concatenate(batches[rank::size]) for rank in range(size)]


def excerpt(data: Encoded, units: list[np.ndarray]) -> tuple[Encoded, list[np.ndarray]]:
    """The examples of these units alone, and where each unit's stand among them."""
    used = np.concatenate(units) if units else np.empty(0, np.int64)
    places = np.split(np.arange(len(used)), np.cumsum([len(unit) for unit in units])[:-1]) if units else []
    return Encoded([data.tokens[i] for i in used], data.targets[used]), places
