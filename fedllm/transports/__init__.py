"""How messages travel. One file and one registration each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from dr_encoder.codecs import Codec
from fedllm.client import Encode
from fedllm.codec_fit import Announcement
from fedllm.errors import RunStopped
from fedllm.public import PublicGradients
from fedllm.ranks import team
from fedllm.release import PrivateSum
from fedllm.schema import Config

TRANSPORTS: dict[str, Callable] = {}


class Transport(Protocol):
    """Asks the clients for one private sum and brings their messages, in any order."""

    def messages(self, spec: PrivateSum, encode: Encode | None = None) -> Iterator[bytes]:
        """encode: what stage 1 sums; None for codes of the codec that the clients hold.

        Raises RunStopped, before anything is sent, where that codec is not the one that `spec` names.
        """

    def refit(self, announced: Announcement, copy: Callable[[], Codec], rows: PublicGradients | None) -> bool:
        """The clients take over the codec of the rounds to come; whether they took the server's copy.

        copy: fetches that copy. rows: public gradients, for clients that live in the server's process.
        Raises RunStopped where neither their own fit nor the copy is the codec announced.
        """

    def state(self) -> dict[str, Tensor]:
        """What must survive an interruption, as named tensors; nothing under privacy."""

    def restore(self, codec: Codec, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`; codec: the one that was in force."""


def expect_codec(found: str, announced: str) -> None:
    """Raise RunStopped where the codec that clients hold is not the one announced: their codes would be decoded as something else."""
    if found != announced:
        raise RunStopped(f"codec {found}: expected {announced}, the one that the server announced; nothing was sent")


def register(name: str):
    """Make a transport known under `name`."""

    def add(cls):
        TRANSPORTS[name] = cls
        return cls

    return add


def transport_of(config: Config) -> str:
    """The name of a run's transport: its own, or the one over ranks where there are some."""
    return "ranks" if config.parallel.mode == "clients" and team() is not None else config.federation.transport


from fedllm.transports import ranks, simulation  # noqa: E402,F401
