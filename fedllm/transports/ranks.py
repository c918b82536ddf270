"""Clients on all ranks (`parallel.mode: clients`): rank 0 draws the cohort and deals it out; each rank trains its clients, packs messages.

Updates never leave the rank that made them. Noise is keyed by round and client, so that it is the same on any number of ranks; without a
seed each rank takes it from its own operating system.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from torch import Tensor

from dr_encoder.codecs import Codec
from fedllm import ranks
from fedllm.client import Encode
from fedllm.codec_fit import Announcement
from fedllm.privacy.noise import Noise
from fedllm.public import PublicGradients
from fedllm.release import PrivateSum
from fedllm.schema import Config
from fedllm.setting import Setting
from fedllm.stopwatch import Stopwatch
from fedllm.transports import expect_codec, register
from fedllm.transports.simulation import RESIDUAL, Simulation


@register("ranks")
class Ranks:
    """A simulation on each rank; this is rank 0's, which knows of the others."""

    def __init__(self, setting: Setting, config: Config, noise: Noise, watch: Stopwatch):
        self.team, self.watch = ranks.team(), watch
        self.local = Simulation(dataclasses.replace(setting, engine=setting.engine.local), config, noise, watch)
        self.setting, self.with_feedback = setting, config.codec.error_feedback

    def messages(self, spec: PrivateSum, encode: Encode | None = None) -> Iterator[bytes]:
        """This rank's messages, then the others', who work meanwhile."""
        self.local.expect(spec, encode)
        shares = self.dealt(self.local.taking_part(spec))
        self.team.tell("messages", spec, encode, shares=shares)
        yield from self.local.messages_of(shares[0], spec, encode)
        replies = self.team.replies()
        while True:
            with self.watch.phase("local_training"):  # theirs
                sent = next(replies, None)
            if sent is None:
                return
            yield from sent

    def dealt(self, clients: np.ndarray) -> list[np.ndarray]:
        """Clients [some] for each rank: even by tokens; where they remember something, a client is always on the same one."""
        if self.with_feedback:
            return [clients[clients % self.team.size == rank] for rank in range(self.team.size)]
        train, records = self.setting.train, self.setting.partition.records
        tokens = np.array([sum(len(train.tokens[record]) for record in records(client)) for client in clients.tolist()])
        order = clients[np.argsort(tokens, kind="stable")]
        there_and_back = [*range(self.team.size), *reversed(range(self.team.size))]
        rank_of = np.resize(there_and_back, len(order))
        return [order[rank_of == rank] for rank in range(self.team.size)]

    def refit(self, announced: Announcement, copy: Callable[[], Codec], rows: PublicGradients | None) -> bool:
        """As in one process; all ranks then hold this rank's codec."""
        fetched = self.local.refit(announced, copy, rows)
        self._hand_over(self.local.codec)
        return fetched

    def state(self) -> dict[str, Tensor]:
        """All ranks' residuals, as one process would have them."""
        merged = self.local.state()
        for others in self.team.ask("residuals") if self.with_feedback else ():
            merged |= others
        return merged

    def restore(self, codec: Codec, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`, for any number of ranks."""
        kept = {int(name.removeprefix(RESIDUAL)): name for name in tensors if name.startswith(RESIDUAL)}
        size = self.team.size
        shares = [{name: tensors[name] for client, name in kept.items() if client % size == rank} for rank in range(size)]
        self.local.restore(codec, shares[0])
        self._hand_over(codec)
        if self.with_feedback:
            self.team.ask("restore", shares=shares)

    def _hand_over(self, codec: Codec) -> None:
        for found in self.team.ask("take_codec", codec.name, *codec.state()):
            expect_codec(found, self.local.held)
