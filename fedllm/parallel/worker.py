"""Ranks above 0: what rank 0 can have them do. They decide nothing and write nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs import CODECS
from fedllm.aggregation import AGGREGATIONS
from fedllm.client import Encode
from fedllm.lora_layers import beside_adapter
from fedllm.models import quiet
from fedllm.privacy.noise import Noise
from fedllm.ranks import RankLost, Team
from fedllm.release import PrivateSum
from fedllm.schema import Config
from fedllm.setting import Setting, build
from fedllm.stopwatch import Stopwatch
from fedllm.training.engine import Encoded, Evaluation
from fedllm.transports.simulation import Simulation


class Worker:
    """What any rank above 0 serves; each method is a command, see `Team.tell`. After `build` its mode's own are known too."""

    def __init__(self, team: Team):
        quiet()
        self.team, self.mode = team, None

    def build(self, config: Config, public_seed: int) -> None:
        """Load model and data; public text, and what comes of it, is rank 0's alone."""
        alone = dataclasses.replace(
            config, task=dataclasses.replace(config.task, public=None), lora=dataclasses.replace(config.lora, init="random")
        )
        mode = WORKERS[config.parallel.mode]
        try:
            setting = build(alone, public_seed)
        except RankLost:
            raise
        except Exception as error:
            if not mode.meets:
                raise
            self.team.meet(error)  # where rank 0 waits; it ends there
        self.mode = mode(setting, config, public_seed)

    def __getattr__(self, command: str) -> Any:
        return getattr(self.mode, command)


class ClientsWorker:
    """`clients`: the model and all clients' data, as rank 0 has them."""

    meets = False

    def __init__(self, setting: Setting, config: Config, public_seed: int):
        self.engine = setting.engine
        self.clients = Simulation(setting, config, Noise(config.seed), Stopwatch())
        AGGREGATIONS[config.federation.aggregation](self.engine.model, self.engine.layout, public_seed)  # makes room for what it adds

    def load(self, adapter: Tensor, beside: dict[str, Tensor]) -> None:
        """The adapter [n], and what else of rank 0's model is not frozen for good."""
        self.engine.load(adapter)
        own = beside_adapter(self.engine.model)
        with torch.no_grad():
            for name, value in beside.items():
                own[name].copy_(value)

    def evaluate(self, data: Encoded) -> Evaluation | None:
        return self.engine.evaluate(data) if len(data) else None

    def probabilities(self, data: Encoded) -> Tensor | None:
        return self.engine.probabilities(data) if len(data) else None

    def updates(self, steps: int, lr: float, prox: float, share: tuple[Encoded, list[np.ndarray]]) -> Tensor:
        """Updates of these units [units, n]."""
        rows = torch.empty(len(share[1]), self.engine.layout.size)
        for where, some in self.engine.updates(*share, steps, lr, prox):
            rows[where] = some
        return rows

    def take_codec(self, family: str, tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
        """The codec of the rounds to come; its fingerprint as it is here."""
        self.clients.hold(CODECS[family].from_state(tensors, meta))
        return self.clients.held

    def messages(self, spec: PrivateSum, encode: Encode | None, clients: np.ndarray) -> list[bytes]:
        """Messages of these clients: their updates stay here."""
        return list(self.clients.messages_of(clients, spec, encode))

    def residuals(self) -> dict[str, Tensor]:
        """What the clients of this rank still owe."""
        return self.clients.state()

    def restore(self, residuals: dict[str, Tensor]) -> None:
        """Inverse of `residuals`, once the codec is here."""
        self.clients.restore(self.clients.codec, residuals)


class DataWorker:
    """`data`: this rank's part of the one engine (training/deepspeed_engine.py)."""

    meets = True  # the other ranks, before the model is divided

    def __init__(self, setting: Setting, config: Config, public_seed: int):
        self.engine = setting.engine

    def on_engine(self, name: str, *arguments: Any) -> None:
        """What rank 0's engine is doing, here too."""
        getattr(self.engine, name)(*arguments)


WORKERS: dict[str, type[ClientsWorker] | type[DataWorker]] = {"clients": ClientsWorker, "data": DataWorker}
