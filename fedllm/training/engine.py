"""What an engine is, and the torch engine: one model on one device, gradients of many units in shared batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dr_encoder.layout import AdapterLayout
from fedllm.adapters import save_adapter
from fedllm.data.batches import Batch, make_batches
from fedllm.training.objectives import Objective
from fedllm.training.unit_gradients import UnitGradients

CHUNK_BYTES = 256 * 2**20  # of per-unit updates held at once


@dataclass(frozen=True)
class Encoded:
    """Examples as the model takes them: token ids of each, and the class of each (zeros where the task has none)."""

    tokens: list[list[int]]
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, some: slice) -> Encoded:
        return Encoded(self.tokens[some], self.targets[some])


@dataclass(frozen=True)
class Evaluation:
    """Mean loss, and the share of right answers or None."""

    loss: float
    accuracy: float | None


class Engine(Protocol):
    """Local training and evaluation of one model, whatever runs it. See `TorchEngine` for what each does."""

    model: nn.Module
    layout: AdapterLayout

    def adapter(self) -> Tensor: ...

    def load(self, flat: Tensor) -> None: ...

    def save(self, path: Path) -> None: ...

    def updates(
        self, data: Encoded, units: list[np.ndarray], steps: int = 1, lr: float = 1.0, prox: float = 0.0
    ) -> Iterator[tuple[slice, Tensor]]: ...

    def batches(self, data: Encoded, units: list[np.ndarray]) -> Iterator[np.ndarray]: ...

    def evaluate(self, data: Encoded, progress: Callable[[int], None] | None = None) -> Evaluation: ...

    def probabilities(self, data: Encoded) -> Tensor: ...


def chunks(count: int, length: int) -> Iterator[slice]:
    """`count` units in parts whose updates, of `length` numbers each, are held at once."""
    size = max(1, CHUNK_BYTES // (4 * length))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class TorchEngine:
    """Local training and evaluation of one model, on the device that it is on; what comes out is in memory.

    The adapter is what `layout` names; everything else of the model stays as it is.
    """

    def __init__(self, model: nn.Module, objective: Objective, pad_id: int, batch_tokens: int, side: str = "left"):
        self.model, self.objective = model, objective
        self._batching = {"batch_tokens": batch_tokens, "pad_id": pad_id, "side": side}
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.layout = AdapterLayout.of(self.parameters.items())
        self.gradients = UnitGradients(model, self.layout)
        self.device = self.gradients.device

    def adapter(self) -> Tensor:
        """The adapter as one vector [n]."""
        return self.layout.flatten(self.parameters).cpu()

    @torch.no_grad()
    def load(self, flat: Tensor) -> None:
        """Put a flat adapter [n] into the model."""
        for name, view in self.layout.views(flat).items():
            self.parameters[name].copy_(view)

    def save(self, path: Path) -> None:
        """Write the adapter into a folder, for PEFT."""
        save_adapter(self.model, path)

    def updates(
        self, data: Encoded, units: list[np.ndarray], steps: int = 1, lr: float = 1.0, prox: float = 0.0
    ) -> Iterator[tuple[slice, Tensor]]:
        """Updates (old - new adapter) of units, a few at a time: (which units, [some, n] float32).

        units: for each the indices of its examples, or of each step's [steps, examples]; one without examples has the zero update.
        An update is lr times the gradient of the unit's mean loss, for several steps the sum of such along the unit's own path.
        prox: mu >= 0 of FedProx, whose loss has
        mu/2 |adapter - start|^2 beside (Li et al., arXiv 1812.06127); a single step starts where that is flat.
        """
        if steps == 1:
            for where in chunks(len(units), self.layout.size):
                gradients = self._gradients(data, units[where])
                yield where, gradients if lr == 1 else gradients.mul_(lr)  # each pass over them costs as much as clipping does
        else:
            for place, unit in enumerate(units):
                yield slice(place, place + 1), self._path(data, unit, steps, lr, prox)

    def batches(self, data: Encoded, units: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Which units, of one example each, share a batch: their updates need not be held longer than it lasts."""
        for batch in make_batches([data.tokens[example] for (example,) in units], **self._batching):
            yield batch.index

    def evaluate(self, data: Encoded, progress: Callable[[int], None] | None = None) -> Evaluation:
        """Mean loss and accuracy over all examples, adapter as loaded."""
        loss, right = self._sums(data, progress=progress)
        return Evaluation(loss / len(data), None if right is None else right / len(data))

    @torch.no_grad()
    def probabilities(self, data: Encoded) -> Tensor:
        """The model's own prediction of each label [examples, labels], float64, adapter as loaded; for tasks with labels."""
        rows = None
        for batch, counts in self._turns(data.tokens):
            found = self._logits(batch).double().softmax(1)
            rows = found.new_zeros(len(data), found.shape[1]) if rows is None else rows
            if counts:
                rows[batch.index] = found
        return self._over_ranks(rows)

    @torch.no_grad()
    def _sums(self, data: Encoded, progress: Callable[[int], None] | None = None) -> tuple[float, int | None]:
        """Sum of the losses, and how many answers are right."""
        sums, counted = torch.zeros(2, dtype=torch.float64), True
        for batch, counts in self._turns(data.tokens):
            losses, correct = self._losses(batch, data.targets)
            counted = correct is not None
            if counts:
                sums += torch.stack([losses.double().sum(), correct.sum() if counted else losses.new_zeros(())]).cpu()
            if progress is not None:
                progress(len(batch.index))
        loss, right = self._over_ranks(sums).tolist()
        return loss, int(right) if counted else None

    def _gradients(self, data: Encoded, units: list[np.ndarray]) -> Tensor:
        """Gradient of each unit's mean loss [units, n]."""
        self.gradients.begin(len(units))
        if any(len(unit) for unit in units):
            examples, row_of, weight = spread(units)
            for batch, counts in self._turns([data.tokens[i] for i in examples]):
                self.gradients.batch(torch.from_numpy(row_of[batch.index]))
                losses, _ = self._losses(batch, data.targets[examples])
                self._backward((losses * torch.from_numpy(weight[batch.index] * counts).to(losses.device)).sum())
        return self._over_ranks(self.gradients.end())

    # -- what an engine of several ranks does its own way --------------------------------------------------------------------------

    def _turns(self, tokens: list[list[int]]) -> Iterator[tuple[Batch, bool]]:
        """This process's batches, and whether each counts."""
        for batch in make_batches(tokens, **self._batching):
            yield batch, True

    def _losses(self, batch: Batch, targets: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Losses and right answers of a batch; targets: of all examples."""
        return self.objective(self.model, batch.to(self.device), torch.from_numpy(targets[batch.index]).to(self.device))

    def _logits(self, batch: Batch) -> Tensor:
        return self.objective.logits(self.model, batch.to(self.device))

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """The sum over all processes, in memory."""
        return sums.cpu()

    def _path(self, data: Encoded, unit: np.ndarray, steps: int, lr: float, prox: float) -> Tensor:
        """Old minus new adapter after SGD steps of one unit [1, n]; the adapter is put back."""
        start = self.adapter()
        here = start.clone()
        for step in range(steps):
            examples = unit[step] if unit.ndim == 2 else unit
            here -= lr * (self._gradients(data, [examples])[0] + prox * (here - start))
            self.load(here)
        self.load(start)
        return (start - here)[None]


def spread(units: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units [examples of each] -> all their examples, which unit each is of, and its weight in the unit's mean (float32)."""
    sizes = [len(unit) for unit in units]
    weight = 1.0 / np.repeat([max(1, size) for size in sizes], sizes)
    return np.concatenate(units), np.repeat(np.arange(len(units)), sizes), weight.astype(np.float32)
