"""The DeepSpeed engine: all ranks work on the same units, each on its share of their examples, the frozen base divided by ZeRO.

Every rank holds one engine, and all make the same calls: rank 0's word is passed on (`on_all_ranks`), and only it gets the result. Of the
batches each rank takes every so-manieth; gradients go to rows of their own (`UnitGradients`) and these are summed over the ranks, so that
LoRA gradients are whole and float32 from any ZeRO stage, and what encodes, clips and noises them does not know how they came about.

Stage 3 divides the base, and gathers a layer when it is used. What stages 1 and 2 divide, DeepSpeed's own gradients and optimiser states,
is never filled here: local steps are SGD on the rows, and the server's optimiser is rank 0's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedllm import ranks
from fedllm.data.batches import Batch, make_batches
from fedllm.errors import UserError
from fedllm.schema import Config
from fedllm.training.deepspeed_file import DeepSpeedFile, read
from fedllm.training.engine import Encoded, Evaluation, TorchEngine
from fedllm.training.objectives import Objective

INSTALL = "pip install 'dr-encoder[deepspeed]'"


def prepare(config: Config) -> Callable[..., DeepSpeedEngine]:
    """What makes the engine, once there is a model. Raises UserError where DeepSpeed, or its file, is not there or not right."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"engine.name=deepspeed: needs DeepSpeed, which is not installed; {INSTALL}")
    team = ranks.join()
    file = read(Path(config.engine.deepspeed), config, team.size)
    return functools.partial(DeepSpeedEngine, team=team, file=file)


def on_all_ranks(method: Callable) -> Callable:
    """A method that all ranks must call at once: rank 0 has the others do it too, and is the only one to get the result.

    Positional arguments travel, keywords stay on rank 0.
    """

    @functools.wraps(method)
    def call(self: DeepSpeedEngine, *arguments: Any, **own: Any) -> Any:
        if self.team.size == 1:
            return method(self, *arguments, **own)
        if self.team.rank > 0:
            try:
                method(self, *arguments)
            except Exception as error:
                raise self._amid(error) from error
            return None
        self.team.tell("on_engine", method.__name__, *arguments)
        try:
            result = method(self, *arguments, **own)
        except RuntimeError as error:
            if not of_connection(error):
                raise
            raise ranks.lost() from None
        list(self.team.replies())
        return result

    return call


def of_connection(error: RuntimeError) -> bool:
    """Whether an error amid DeepSpeed's own collectives means that another rank is gone."""
    return "gloo" in str(error) or isinstance(error, torch.distributed.DistError)


class DeepSpeedEngine(TorchEngine):
    """A `TorchEngine` whose model DeepSpeed runs. Made by all ranks at once; ranks above 0 then serve rank 0's calls."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        pad_id: int,
        batch_tokens: int,
        side: str = "left",
        *,
        team: ranks.Team,
        file: DeepSpeedFile,
    ):
        super().__init__(model, objective, pad_id, batch_tokens, side)
        self.team, self.file = team, file
        if file.checkpointing:
            checkpoint_layers(model)
        team.meet()  # DeepSpeed's own patience is shorter than what rank 0 may have had to do first
        try:
            self._asked = start(_Asked(model, objective), list(self.parameters.values()), file)
        except Exception as error:
            if team.rank == 0:
                raise
            raise self._amid(error) from error
        self.device = self.gradients.device = torch.device(self._asked.device)

    @on_all_ranks
    def adapter(self) -> Tensor:
        with self._whole(self.parameters.values()):
            return super().adapter()

    @on_all_ranks
    def load(self, flat: Tensor) -> None:
        with self._whole(self.parameters.values(), written=True):
            super().load(flat)

    @on_all_ranks
    def save(self, path: Path) -> None:
        own = [value for name, value in self.model.named_parameters() if "lora_" in name or ".modules_to_save." in name]
        with self._whole(own):
            if self.team.rank == 0:
                super().save(path)

    @on_all_ranks
    def probabilities(self, data: Encoded) -> Tensor:
        return super().probabilities(data)

    def evaluate(self, data: Encoded, progress: Callable[[int], None] | None = None) -> Evaluation:
        every = None if progress is None else lambda count: progress(count * self.team.size)
        return super().evaluate(data, every)

    @on_all_ranks
    def _sums(self, data: Encoded, progress: Callable[[int], None] | None = None) -> tuple[float, int | None]:
        return super()._sums(data, progress)

    def _gradients(self, data: Encoded, units: list[np.ndarray]) -> Tensor:
        """Only the examples of these units travel."""
        examples = np.concatenate([*units, np.zeros(0, np.int64)])
        used = Encoded([data.tokens[i] for i in examples], data.targets[examples])
        bounds = np.cumsum([len(unit) for unit in units])
        return self._rows(used, np.split(np.arange(len(examples)), bounds[:-1]))

    @on_all_ranks
    def _rows(self, data: Encoded, units: list[np.ndarray]) -> Tensor:
        return super()._gradients(data, units)

    def _turns(self, tokens: list[list[int]]) -> Iterator[tuple[Batch, bool]]:
        """Of as many batches as there are ranks this one's; where none is left for it another's first row, which does not count.

        Under ZeRO 3 a forward pass asks all ranks for their parts of each layer, so that none may sit one out.
        """
        size = self.team.size
        most = -(-len(tokens) // size)
        batches = list(make_batches(tokens, most=min(most, self.file.micro_batch or most), **self._batching))
        for start_at in range(0, len(batches), size):
            turn = batches[start_at : start_at + size]
            counts = self.team.rank < len(turn)
            yield (turn[self.team.rank], True) if counts else (turn[0].first(), False)

    def _amid(self, error: Exception) -> ranks.RankLost:
        """An error of a rank above 0 in work that rank 0 does too, and waits for this part of: ending is all that it can be told.

        Where rank 0 met it as well, it has its time to tell.
        """
        time.sleep(ranks.GRACE)
        return ranks.RankLost(f"rank {self.team.rank}: {error}")

    def _losses(self, batch: Batch, targets: np.ndarray) -> tuple[Tensor, Tensor | None]:
        return self._asked.module(batch.to(self.device), torch.from_numpy(targets[batch.index]).to(self.device))

    def _logits(self, batch: Batch) -> Tensor:
        return self._asked.module(batch.to(self.device))

    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        if self.file.stage == 3:  # nothing told it that it is done with layers whose input needs no gradient
            self._asked.optimizer.release_backward_leftovers()

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return self.team.all_reduce(sums).cpu()

    def _whole(self, parameters: Any, written: bool = False) -> contextlib.AbstractContextManager:
        """Within it ZeRO 3's parameters are whole; `written`: and after it they are as rank 0 left them."""
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(parameters), modifier_rank=0 if written else None, enabled=self.file.stage == 3)


class _Asked(nn.Module):
    """Model and objective as one module: ZeRO 3 gathers what a module uses when it is called."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, targets: Tensor | None = None) -> Any:
        if targets is None:
            return self.objective.logits(self.model, batch)
        return self.objective(self.model, batch, targets)


def start(
    module: nn.Module, trained: list[nn.Parameter], file: DeepSpeedFile, optimizer: torch.optim.Optimizer | None = None
) -> Any:
    """DeepSpeed's engine of a module, its parameters moved and divided as the file has it.

    optimizer: of the trained parameters; None for none, or one that makes no steps. Raises UserError for settings that DeepSpeed refuses.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("LOCAL_RANK", "0")  # a process on its own, which no launcher told
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would find that out, and print it
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime.config import DeepSpeedConfig

    # On a CPU it would compile a shared-memory reduction of its own, for minutes, that nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed()
    try:
        DeepSpeedConfig(dict(file.settings))
    except Exception as error:  # assertions, pydantic's errors and its own: each says what is wrong with a key
        raise UserError(f"{file.path}: DeepSpeed refuses it: {' '.join(str(error).split())[:300]}") from None
    if optimizer is None and file.stage in (1, 2):  # which must have one to divide
        optimizer = torch.optim.SGD(trained, lr=1.0)
    engine, *_ = deepspeed.initialize(model=module, config=file.settings, optimizer=optimizer, model_parameters=trained)
    return engine


def checkpoint_layers(model: nn.Module) -> None:
    """Have each transformer layer keep its input alone, and be computed again in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": False})
    for layer in base.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True  # it asks for this; what is inside stays in evaluation mode, without dropout
