"""All clients in this process: the cohort is drawn here, trains in shared batches, and each member packs its own message."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs import Codec
from dr_encoder.feedback import ErrorFeedback
from fedllm.client import Encode, add_rows, code_of, expect_finite, local_batches, message, unit_vectors
from fedllm.codec_fit import Announcement, client_fit
from fedllm.privacy.noise import Noise
from fedllm.public import PublicGradients
from fedllm.release import PrivateSum
from fedllm.schema import Config
from fedllm.setting import Setting
from fedllm.stopwatch import Stopwatch
from fedllm.transports import expect_codec, register

RESIDUAL = "residual."
SLICE_BYTES = 32 * 2**20  # of updates encoded and clipped at once


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
        self.hold(self.codec)
        return fetched

    def hold(self, codec: Codec) -> None:
        """From now on codes are this codec's."""
        self.codec, self.held = codec, codec.fingerprint()
        if self.with_feedback:
            self.feedback = ErrorFeedback(codec, {} if self.feedback is None else self.feedback.residuals)

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
        self.expect(spec, encode)
        yield from self.messages_of(self.taking_part(spec), spec, encode)

    def expect(self, spec: PrivateSum, encode: Encode | None) -> None:
        """Raise RunStopped where codes of another codec than the announced one would be sent."""
        if encode is None:
            expect_codec(self.held, spec.codec)

    def taking_part(self, spec: PrivateSum) -> np.ndarray:
        """The clients of this round, drawn where the client is the unit (a truncated Poisson cohort); all of them elsewhere. Draw once."""
        if spec.unit != "client":
            return np.arange(spec.clients)
        return self.noise.sample_cohort(spec.clients, spec.sampling_rate, spec.max_cohort, stage=spec.stage, round=spec.round)

    def messages_of(self, clients: np.ndarray, spec: PrivateSum, encode: Encode | None = None) -> Iterator[bytes]:
        """Messages of these clients [some]."""
        if encode is None:
            encode = code_of(self.codec, self.setting.engine.adapter() if spec.of_state else None)
        vectors = self._of_clients if spec.unit == "client" else self._of_units
        for client, vector in vectors(clients, spec, encode):
            with self.watch.phase("messages"):
                sent = message(vector, spec, client, self.noise, encode)
            yield sent

    def _of_clients(self, cohort: np.ndarray, spec: PrivateSum, encode: Encode) -> Iterator[tuple[int, Tensor]]:
        """The client is the unit."""

        def vectors(where: slice, updates: Tensor) -> Tensor:
            if self.feedback is None:
                return unit_vectors(updates, encode, spec)
            expect_finite(updates)
            return torch.stack([self.feedback.compress(*one) for one in zip(cohort[where].tolist(), updates, strict=True)])

        records = [self._drawn(client, spec) for client in cohort.tolist()]
        for where, some in self._trained(records, vectors):
            yield from zip(cohort[where].tolist(), some, strict=True)

    def _of_units(self, everyone: np.ndarray, spec: PrivateSum, encode: Encode) -> Iterator[tuple[int, Tensor]]:
        """Every client takes part and samples its own users or examples by Poisson; how many it took, it tells nobody.

        Clients share batches here too, as many at a time as SLICE_BYTES hold sums of.
        """
        engine, train = self.setting.engine, self.setting.train
        length = engine.layout.size if spec.noise_in == "update" else spec.size
        size = max(1, SLICE_BYTES // (8 * length))

        def vectors(_: slice, updates: Tensor) -> Tensor:
            return unit_vectors(updates, encode, spec)

        for start in range(0, len(everyone), size):
            clients = everyone[start : start + size].tolist()
            taken = [self._sampled(client, spec) for client in clients]
            units = [unit for some in taken for unit in some]
            row_of = torch.repeat_interleave(torch.tensor([len(some) for some in taken]))
            totals = torch.zeros(len(clients), length, dtype=torch.float64)
            for places in engine.batches(train, units) if spec.unit == "example" else [np.arange(len(units))]:
                for where, clipped in self._trained([units[place] for place in places], vectors):
                    add_rows(totals, row_of[places[where]], clipped)
            yield from zip(clients, totals, strict=True)

    def _drawn(self, client: int, spec: PrivateSum) -> np.ndarray:
        """The records that a client trains on, by its own draw."""
        key = {"stage": spec.stage, "round": spec.round, "client": client, "purpose": "batch"}
        return local_batches(self.setting.partition.records(client), self.local, lambda shape: self.noise.uniform(shape, **key))

    def _sampled(self, client: int, spec: PrivateSum) -> list[np.ndarray]:
        """The records of each unit that a client takes, by its own coin each."""
        key = {"stage": spec.stage, "round": spec.round, "client": client}
        draws = self.noise.uniform((len(self.setting.partition.unit_ids(client)),), purpose="units", **key)
        return self.setting.partition.units(client, np.flatnonzero(draws < spec.sampling_rate))

    def _trained(self, records: list[np.ndarray], vectors: Callable[[slice, Tensor], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Local training of units, and what their updates [some, n] become: (which units, `vectors` of them), a slice at a time."""
        chunks = self.setting.engine.updates(self.setting.train, records, self.local.steps, self.local.lr, self.local.prox)
        while True:
            with self.watch.phase("local_training"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            where, updates = chunk
            size = max(1, SLICE_BYTES // (4 * updates.shape[1]))  # clipping makes a few copies
            for start in range(where.start, where.stop, size):
                part = slice(start, min(start + size, where.stop))
                with self.watch.phase("codec"):
                    made = vectors(part, updates[start - where.start : part.stop - where.start])
                yield part, made
            del chunk, updates, made  # before the next chunk is made
