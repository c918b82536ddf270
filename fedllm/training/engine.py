"""The torch engine: one model on one device, gradients of many units in shared batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dr_encoder.layout import AdapterLayout
from fedllm.data.batches import make_batches
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


class TorchEngine:
    """Local training and evaluation of one model.

    The adapter is what `layout` names; everything else of the model stays as it is.
    """

    def __init__(self, model: nn.Module, objective: Objective, pad_id: int, batch_tokens: int, side: str = "left"):
        self.model, self.objective = model, objective
        self._batching = {"batch_tokens": batch_tokens, "pad_id": pad_id, "side": side}
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.layout = AdapterLayout.of(self.parameters.items())
        self.gradients = UnitGradients(model, self.layout)

    def adapter(self) -> Tensor:
        """The adapter as one vector [n]."""
        return self.layout.flatten(self.parameters)

    @torch.no_grad()
    def load(self, flat: Tensor) -> None:
        """Put a flat adapter [n] into the model."""
        for name, view in self.layout.views(flat).items():
            self.parameters[name].copy_(view)

    def updates(
        self, data: Encoded, units: list[np.ndarray], steps: int = 1, lr: float = 1.0, prox: float = 0.0
    ) -> Iterator[tuple[slice, Tensor]]:
        """Updates (old - new adapter) of units, a few at a time: (which units, [some, n] float32).

        units: for each the indices of its examples; one without examples has the zero update. An update is lr times the gradient of
        the unit's mean loss, for several steps the sum of such along the unit's own path. prox: mu >= 0 of FedProx, whose loss has
        mu/2 |adapter - start|^2 beside (Li et al., arXiv 1812.06127); a single step starts where that is flat.
        """
        size = max(1, CHUNK_BYTES // (4 * self.layout.size)) if steps == 1 else 1
        for start in range(0, len(units), size):
            where = slice(start, min(start + size, len(units)))
            yield where, (self._gradients(data, units[where]).mul_(lr) if steps == 1 else self._path(data, units[start], steps, lr, prox))

    def batches(self, data: Encoded, units: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Which units, of one example each, share a batch: their updates need not be held longer than it lasts."""
        for batch in make_batches([data.tokens[example] for (example,) in units], **self._batching):
            yield batch.index

    def evaluate(self, data: Encoded, progress: Callable[[int], None] | None = None) -> Evaluation:
        """Mean loss and accuracy over all examples, adapter as loaded."""
        loss, right, counted = 0.0, 0, True
        with torch.inference_mode():
            for batch in make_batches(data.tokens, **self._batching):
                losses, correct = self.objective(self.model, batch, torch.from_numpy(data.targets[batch.index]))
                loss += float(losses.double().sum())
                counted = correct is not None
                right += int(correct.sum()) if counted else 0
                if progress is not None:
                    progress(len(batch.index))
        return Evaluation(loss / len(data), right / len(data) if counted else None)

    def probabilities(self, data: Encoded) -> Tensor:
        """The model's own prediction of each label [examples, labels], float64, adapter as loaded; for tasks with labels."""
        rows = {}
        with torch.inference_mode():
            for batch in make_batches(data.tokens, **self._batching):
                rows |= zip(batch.index.tolist(), self.objective.logits(self.model, batch).double().softmax(1), strict=True)
        return torch.stack([rows[example] for example in range(len(data))])

    def _gradients(self, data: Encoded, units: list[np.ndarray]) -> Tensor:
        """Gradient of each unit's mean loss [units, n]."""
        self.gradients.begin(len(units))
        if any(len(unit) for unit in units):
            examples = np.concatenate(units)
            row_of = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
            weight = 1.0 / np.repeat([max(1, len(unit)) for unit in units], [len(unit) for unit in units])
            for batch in make_batches([data.tokens[i] for i in examples], **self._batching):
                self.gradients.batch(torch.from_numpy(row_of[batch.index]))
                losses, _ = self.objective(self.model, batch, torch.from_numpy(data.targets[examples[batch.index]]))
                (losses * torch.from_numpy(weight[batch.index]).float()).sum().backward()
        return self.gradients.end()

    def _path(self, data: Encoded, unit: np.ndarray, steps: int, lr: float, prox: float) -> Tensor:
        """Old minus new adapter after SGD steps of one unit [1, n]; the adapter is put back."""
        start = self.adapter()
        here = start.clone()
        for _ in range(steps):
            here -= lr * (self._gradients(data, [unit])[0] + prox * (here - start))
            self.load(here)
        self.load(start)
        return (start - here)[None]
