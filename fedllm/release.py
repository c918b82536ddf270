"""PrivateSum: everything public about one private sum. Clients, server and ledger all derive their numbers from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dr_encoder.message import Expected, Header
from dr_encoder.quantize import dtype_of, levels
from fedllm.privacy.events import ADD_REMOVE


@dataclass(frozen=True, kw_only=True)
class PrivateSum:
    """One round of one stage: sum over sampled units of vectors of norm at most C, with Gaussian noise.

    size: length of the vector; clip: C, the L2 sensitivity of the sum under add/remove (2C under replace-one), inf without privacy;
    noise_multiplier: z, of the sum ('distributed', 'central') or of each message ('local'), 0 without privacy; shares: M, how many
    noise shares the sum always carries; expected: the public divisor; bit_weight: length of the adaptive clip's bit, 0 without one;
    each: whether messages are decoded one by one, so that the release depends on all of them.
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

    @property
    def private(self) -> bool:
        return self.noise_multiplier > 0

    @property
    def sensitivity(self) -> float:
        """L2 norm a unit's whole vector can have: the clipped code and the clip's bit of +-1/2."""
        return math.hypot(self.clip, self.bit_weight / 2)

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
        return self.share_std * math.sqrt(self.shares)

    @property
    def mean_std(self) -> float:
        """Noise on the mean."""
        return self.sum_std / self.expected

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
            dtype=dtype_of(self.bits),
            scale=self.scale,
            clients=self.clients,
        )

    def ledger_entry(self, rng: str) -> dict[str, Any]:
        """The record of what is about to be released; the ledger adds id and attempt."""
        return {
            "stage": f"stage{self.stage}",
            "round": self.round,
            "mechanism": "gaussian_each" if self.each else "gaussian",
            "noise_multiplier": self.noise_multiplier,
            "clip": self.clip if math.isfinite(self.clip) else None,
            "sampling_rate": self.sampling_rate,
            "max_cohort": self.max_cohort,
            "shares": self.shares,
            "noise": self.noise,
            "unit": self.unit,
            "relation": ADD_REMOVE,
            "codec": self.codec,
            "prior": self.prior,
            "rng": rng,
        }
