"""Error feedback: what a lossy codec dropped from a client's update is added to that client's next one.

Karimireddy, Rebjock, Stich and Jaggi 2019 (arXiv 1901.09847), algorithm 1: p = u + e, send C(p), keep e = p - D(C(p)). Only for runs
without DP: the residual is private data that a later message would leak, and it makes one unit's influence outlast its round.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dr_encoder.codecs.base import Codec


@dataclass
class ErrorFeedback:
    """A codec with a memory for each client.

    codec: may be replaced at any time (a refit, a warm start): the residuals are updates, not codes, and stay.
    residuals: client -> what has not been sent yet [n]; a client never seen has none.
    """

    codec: Codec
    residuals: dict[int, Tensor] = field(default_factory=dict)

    def compress(self, client: int, update: Tensor) -> Tensor:
        """Code [k] of this client's update [n] and everything it still owes; decode(code) + new residual = update + old residual.

        Raises ValueError for an update that is not finite or has another length; the memory is then as before.
        """
        if update.shape != (self.codec.update_size,) or not torch.isfinite(update).all():
            raise ValueError(f"Expected a finite update of {self.codec.update_size} numbers from client {client}")
        owed = update + self.residuals[client] if client in self.residuals else update
        code = self.codec.encode(owed[None])[0]
        self.residuals[client] = owed - self.codec.decode(code)
        return code

    def state(self) -> dict[str, Tensor]:
        """The memory as named tensors, for a checkpoint."""
        return {str(client): residual for client, residual in self.residuals.items()}

    @classmethod
    def from_state(cls, codec: Codec, state: dict[str, Tensor]) -> ErrorFeedback:
        """Inverse of `state`, with the codec of the moment."""
        return cls(codec, {int(client): residual for client, residual in state.items()})
