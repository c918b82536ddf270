"""How messages travel. One file and one registration each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor

from dr_encoder.codecs import Codec
from fedllm.release import PrivateSum

TRANSPORTS: dict[str, Callable] = {}


class Transport(Protocol):
    """Asks the clients for one private sum and brings their messages, in any order."""

    def messages(self, spec: PrivateSum, encode) -> Iterator[bytes]: ...

    def refit(self, codec: Codec) -> None:
        """Take over the codec of the rounds to come."""

    def state(self) -> dict[str, Tensor]:
        """What must survive an interruption, as named tensors; nothing under privacy."""

    def restore(self, codec: Codec, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state`."""


def register(name: str):
    """Make a transport known under `name`."""

    def add(cls):
        TRANSPORTS[name] = cls
        return cls

    return add


from fedllm.transports import simulation  # noqa: E402,F401
