"""All clients in this process: the cohort is drawn here, trains in shared batches, and each member packs its own message."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs import Codec
from dr_encoder.feedback import ErrorFeedback
from fedllm.client import Encode, message, unit_vectors
from fedllm.privacy.noise import Noise
from fedllm.release import PrivateSum
from fedllm.schema import Config
from fedllm.setting import Setting
from fedllm.stopwatch import Stopwatch
from fedllm.transports import register

RESIDUAL = "residual."


@register("simulation")
class Simulation:
    """Holds the clients' data and their noise source; what leaves it are messages only."""

    def __init__(self, setting: Setting, config: Config, noise: Noise, watch: Stopwatch):
        self.setting, self.local, self.noise, self.watch = setting, config.federation.local, noise, watch
        self.with_feedback = config.codec.error_feedback
        self.feedback: ErrorFeedback | None = None

    def refit(self, codec: Codec) -> None:
        """Take over the codec of the rounds to come; clients that keep what a code dropped go on keeping it."""
        if self.with_feedback:
            self.feedback = ErrorFeedback(codec, {} if self.feedback is None else self.feedback.residuals)

    def state(self) -> dict[str, Tensor]:
        """What clients remember from round to round, as named tensors for a checkpoint; nothing under privacy."""
        return {} if self.feedback is None else {RESIDUAL + client: kept for client, kept in self.feedback.state().items()}

    def restore(self, codec: Codec, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        if self.with_feedback:
            kept = {name.removeprefix(RESIDUAL): value for name, value in tensors.items() if name.startswith(RESIDUAL)}
            self.feedback = ErrorFeedback.from_state(codec, kept)

    def messages(self, spec: PrivateSum, encode: Encode) -> Iterator[bytes]:
        """Messages of the clients that take part in this round."""
        vectors = self._of_clients(spec, encode) if spec.unit == "client" else self._of_users(spec, encode)
        for client, vector in vectors:
            with self.watch.phase("messages"):
                sent = message(vector, spec, client, self.noise, encode)
            yield sent

    def _of_clients(self, spec: PrivateSum, encode: Encode) -> Iterator[tuple[int, torch.Tensor]]:
        """The client is the unit: a truncated Poisson cohort."""
        cohort = self.noise.sample_cohort(spec.clients, spec.sampling_rate, spec.max_cohort, stage=spec.stage, round=spec.round)
        records = [self.setting.partition.records(client) for client in cohort]
        for where, updates in self._updates(records):
            with self.watch.phase("codec"):
                if self.feedback is not None:
                    vectors = torch.stack([self.feedback.compress(*one) for one in zip(cohort[where].tolist(), updates, strict=True)])
                else:
                    vectors = unit_vectors(updates, encode, spec)
            yield from zip(cohort[where].tolist(), vectors, strict=True)

    def _of_users(self, spec: PrivateSum, encode: Encode) -> Iterator[tuple[int, torch.Tensor]]:
        """Every client takes part and samples its own units by Poisson."""
        for client in range(spec.clients):
            units = self.setting.partition.units(client)
            taken = self.noise.uniform((len(units),), purpose="units", stage=spec.stage, round=spec.round, client=client)
            chosen = [unit for unit, draw in zip(units, taken, strict=True) if draw < spec.sampling_rate]
            length = self.setting.engine.layout.size if spec.noise_in == "update" else spec.size
            total = torch.zeros(length, dtype=torch.float64)
            for _, updates in self._updates(chosen):
                with self.watch.phase("codec"):
                    total += unit_vectors(updates, encode, spec).sum(0, dtype=torch.float64)
            yield client, total

    def _updates(self, records: list[np.ndarray]) -> Iterator[tuple[slice, torch.Tensor]]:
        updates = self.setting.engine.updates(self.setting.train, records, self.local.steps, self.local.lr)
        while True:
            with self.watch.phase("local_training"):
                some = next(updates, None)
            if some is None:
                return
            yield some
