"""PrivateSum: everything public about one private sum. Clients, server and ledger all derive their numbers from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dr_encoder.message import Expected, Header
from dr_encoder.quantize import dtype_of, levels
from fedllm.privacy.events import ADD_REMOVE
from fedllm.privacy.groups import Group


@dataclass(frozen=True, kw_only=True)
class PrivateSum:
    """One round of one stage: sum over sampled units of vectors of norm at most C, with Gaussian noise.

    size: length of the vector; clip: C, the norm of the vector or of each of its clip groups, inf without privacy; noise_multiplier: z,
    noise over `sensitivity`, of the sum ('distributed', 'central') or of each message ('local'), 0 without privacy; shares: M, how many
    noise shares the sum always carries; expected: the public divisor; bit_weight: length of the adaptive clip's bit, 0 without one;
    each: whether messages are decoded one by one, so that the release depends on all of them; of_state: whether a message stands for
    the new adapter itself and not for its change; groups: what is clipped apart, none: the
    whole vector together; weights: of each client's message in the sum, mean 1, public ('local' only); None: all 1; raw: the ledger's word
    for a release of a private run that no noise protects, empty where there is none.
    """

    run: str
    stage: int
    round: int
    codec: str
    prior: str
    size: int
    clip: float
    noise: str
    noise_in: str
    noise_multiplier: float
    shares: int
    sampling_rate: float
    max_cohort: int | None
    expected: float
    unit: str
    clients: int
    bits: int
    bit_weight: float = 0.0
    each: bool = False
    of_state: bool = False
    groups: tuple[Group, ...] = ()
    weights: tuple[float, ...] | None = None
    raw: str = ""

    @property
    def private(self) -> bool:
        return self.noise_multiplier > 0

    @property
    def sensitivity(self) -> float:
        """L2 norm a unit's whole vector can have: all clip groups at C at once, and the clip's bit of +-1/2.

        The sum's sensitivity under add/remove; twice this under replace-one.
        """
        return math.hypot(self.clip * math.sqrt(max(1, len(self.groups))), self.bit_weight / 2)

    @property
    def share_std(self) -> float:
        """Noise on one message."""
        if not self.private or self.noise == "central":
            return 0.0
        full = self.noise_multiplier * self.sensitivity
        return full if self.noise == "local" else full / math.sqrt(self.shares)

    @property
    def sum_std(self) -> float:
        """Noise on the sum, whatever the realised cohort."""
        if not self.private:
            return 0.0
        if self.noise == "central":
            return self.noise_multiplier * self.sensitivity
        return self.share_std * math.sqrt(self.square_weights)

    @property
    def square_weights(self) -> float:
        """Sum of squared weights of the noise that the sum always carries: of the heaviest `shares` clients; M where all weigh alike."""
        if self.weights is None:
            return self.shares
        return math.fsum(sorted((weight**2 for weight in self.weights), reverse=True)[: self.shares])

    @property
    def largest_weight(self) -> float:
        """By how much the heaviest client's vector counts in the sum."""
        return 1.0 if self.weights is None else max(self.weights)

    def weight(self, client: int) -> float:
        """By how much a client's vector counts in the sum."""
        return 1.0 if self.weights is None else self.weights[client]

    @property
    def mean_std(self) -> float:
        """Noise on the mean."""
        return self.sum_std / self.expected

    @property
    def wire_bits(self) -> int:
        """Bits of a number in a message.

        A sum of several units' vectors that gets its noise at the server travels in float64: rounded to float32 it could move by more
        than C when one unit joins, by 1e-4 C with 2,000 aligned units.
        """
        return 64 if self.private and self.noise == "central" and self.unit != "client" and self.bits == 32 else self.bits

    @property
    def scale(self) -> float:
        """Step of the lattice: a function of C, z and the bit width, the same for all.

        A client of several units sends their sum: there is room for twice as many aligned units as it samples on average.
        """
        if self.bits == 32:
            return 1.0
        units = 1.0 if self.unit == "client" else max(1.0, 2 * self.expected / self.clients)
        return levels(units * self.sensitivity, self.share_std, self.bits)

    def header(self, client: int) -> Header:
        return Header(run=self.run, round=self.round, client=client, codec=self.codec, scale=self.scale)

    def expects(self) -> Expected:
        return Expected(
            run=self.run,
            round=self.round,
            codec=self.codec,
            code_size=self.size,
            dtype=dtype_of(self.wire_bits),
            scale=self.scale,
            clients=self.clients,
        )

    def ledger_entry(self, rng: str) -> dict[str, Any]:
        """The record of what is about to be released; the ledger adds id and attempt.

        clip: C, of each group. shares: with unequal weights as many as would stand in the same proportion to the heaviest client.
        """
        return {
            "stage": f"stage{self.stage}",
            "round": self.round,
            "mechanism": self.raw or ("gaussian_each" if self.each else "gaussian"),
            "noise_multiplier": self.noise_multiplier,
            "clip": self.clip if math.isfinite(self.clip) else None,
            "sampling_rate": self.sampling_rate,
            "max_cohort": self.max_cohort,
            "shares": self.shares if self.weights is None else self.square_weights / self.largest_weight**2,
            "noise": self.noise,
            "unit": self.unit,
            "relation": ADD_REMOVE,
            "codec": self.codec,
            "prior": self.prior,
            "rng": rng,
            "clip_groups": max(1, len(self.groups)),
            "largest_weight": self.largest_weight,
        }
