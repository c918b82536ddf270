"""All clients in this process: the cohort is drawn here, trains in shared batches, and each member packs its own message."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs import Codec
from dr_encoder.feedback import ErrorFeedback
from fedllm.client import Encode, message, unit_vectors
from fedllm.codec_fit import Announcement, client_fit
from fedllm.privacy.noise import Noise
from fedllm.public import PublicGradients
from fedllm.release import PrivateSum
from fedllm.schema import Config
from fedllm.setting import Setting
from fedllm.stopwatch import Stopwatch
from fedllm.transports import expect_codec, register

RESIDUAL = "residual."


@register("simulation")
class Simulation:
    """Holds the clients' data, their noise source and their codec; what leaves it are messages only.

    The clients are one machine: what all of them would compute alike, the codec, is computed once.
    """

    def __init__(self, setting: Setting, config: Config, noise: Noise, watch: Stopwatch):
        self.setting, self.config, self.local, self.noise, self.watch = setting, config, config.federation.local, noise, watch
        self.with_feedback = config.codec.error_feedback
        self.feedback: ErrorFeedback | None = None
        self.codec: Codec | None = None
        self.held = "none"  # its fingerprint

    def refit(self, announced: Announcement, copy: Callable[[], Codec], rows: PublicGradients | None) -> bool:
        """Take over the codec of the rounds to come; whether it is the server's copy. What a code dropped is kept across codecs.

        With `fit_at: client` this is a second fit, from the prior on. The public gradients are the server's: same process, model and text.
        """
        self.codec, fetched = None, self.config.codec.fit_at == "server"
        if not fetched:
            self.codec = client_fit(self.config, self.setting.engine.layout, rows, announced)
            fetched = self.codec.fingerprint() != announced.codec
        if fetched:
            self.codec = copy()
            expect_codec(self.codec.fingerprint(), announced.codec)
        self.held = announced.codec
        if self.with_feedback:
            self.feedback = ErrorFeedback(self.codec, {} if self.feedback is None else self.feedback.residuals)
        return fetched

    def state(self) -> dict[str, Tensor]:
        """What clients remember from round to round, as named tensors for a checkpoint; nothing under privacy."""
        return {} if self.feedback is None else {RESIDUAL + client: kept for client, kept in self.feedback.state().items()}

    def restore(self, codec: Codec, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`; the codec's file serves both sides, whoever fitted it."""
        self.codec, self.held = codec, codec.fingerprint()
        if self.with_feedback:
            kept = {name.removeprefix(RESIDUAL): value for name, value in tensors.items() if name.startswith(RESIDUAL)}
            self.feedback = ErrorFeedback.from_state(codec, kept)

    def messages(self, spec: PrivateSum, encode: Encode | None = None) -> Iterator[bytes]:
        """Messages of the clients that take part in this round."""
        if encode is None:
            expect_codec(self.held, spec.codec)
            encode = self.codec.encode
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
