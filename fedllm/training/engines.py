"""The engines by name: one file and one line each."""

from __future__ import annotations

from collections.abc import Callable

from fedllm.schema import Config
from fedllm.training.engine import Engine, TorchEngine


def _torch(config: Config) -> Callable[..., Engine]:
    from fedllm.models import default_device

    return lambda model, *rest: TorchEngine(model.to(default_device()), *rest)


def _deepspeed(config: Config) -> Callable[..., Engine]:
    from fedllm.training.deepspeed_engine import prepare

    return prepare(config)


# engine.name -> (config) -> what makes the engine of a model. The first call is before anything is loaded, and refuses what will not do.
ENGINES: dict[str, Callable[[Config], Callable[..., Engine]]] = {"torch": _torch, "deepspeed": _deepspeed}
