"""The private sums of one run: what they have in common, and what each of them will release."""

from __future__ import annotations

from fedllm.data.partition import Partition
from fedllm.mechanism import Mechanism
from fedllm.privacy import adversaries
from fedllm.privacy.calibration import update_multiplier
from fedllm.privacy.events import sum_multiplier
from fedllm.release import PrivateSum
from fedllm.schema import Config


class Sums:
    """Describes a run's sums.

    run: its id; stage1, stage2: noise multipliers of both stages, 0 without privacy.
    """

    def __init__(self, config: Config, partition: Partition, mechanism: Mechanism, run: str, stage1: float, stage2: float):
        self.config, self.partition, self.mechanism, self.run = config, partition, mechanism, run
        self.stage1_multiplier, self.stage2_multiplier = stage1, stage2

    @property
    def shares(self) -> int:
        """Noise shares of every sum: of the largest cohort, or of all clients where all take part."""
        return self.config.federation.max_cohort if self.config.privacy.unit == "client" else self.partition.clients

    @property
    def expected(self) -> float:
        """Expected cohort, the divisor."""
        return sampling_rate(self.config) * self.partition.unit_count

    @property
    def of_sum(self) -> float:
        """Noise multiplier of a whole sum of stage 2."""
        return sum_multiplier(self.config.privacy.noise, self.stage2_multiplier, self.shares)

    @property
    def code_noise(self) -> float:
        """Noise of one number of stage 2's mean code, in clip norms of a group."""
        return self.of_sum * max(1, len(self.mechanism.groups)) ** 0.5 / max(self.expected, 1.0)

    def stage1(self, number: int, size: int, clip: float) -> PrivateSum:
        """What warm-up round `number` will release."""
        privacy = self.config.privacy
        raw = adversaries.RAW_MOMENTS if privacy.enabled and privacy.stage1_share == 0 else ""
        return self._sum(1, number, "moments", "none", size, clip, self.stage1_multiplier, raw=raw)

    def stage2(self, number: int, codec: str, prior: str, size: int, clip: float) -> PrivateSum:
        """What round `number` will release. codec, prior: as the ledger names them; size: of a code, without the clip's bit."""
        privacy = self.config.privacy
        weight = 0.0
        if privacy.enabled and privacy.clip.mode == "adaptive":
            weight = clip * update_multiplier(self.of_sum, privacy.clip.bit_multiplier) / privacy.clip.bit_multiplier
        return self._sum(
            2,
            number,
            codec,
            prior,
            size + (weight > 0),
            clip,
            self.stage2_multiplier,
            noise_in=privacy.noise_in,
            bit_weight=weight,
            each=self.config.codec.decode == "each",
            of_state=self.mechanism.of_state,
            groups=self.mechanism.groups,
            weights=self.mechanism.weights,
        )

    def raw_gradients(self, number: int) -> PrivateSum:
        """Clients' gradients as they are, for the codec of round `number` to learn from."""
        return self._sum(1, number, "none", "real", 0, float("inf"), 0.0, raw=adversaries.RAW_GRADIENTS)

    def _sum(
        self, stage: int, number: int, codec: str, prior: str, size: int, clip: float, multiplier: float, noise_in: str = "code", **more
    ) -> PrivateSum:
        config, raw = self.config, more.get("raw", "")
        return PrivateSum(
            run=self.run,
            stage=stage,
            round=number,
            codec=codec,
            prior=prior,
            size=size,
            clip=clip if config.privacy.enabled and not raw else float("inf"),
            noise=config.privacy.noise,
            noise_in=noise_in,
            noise_multiplier=multiplier if config.privacy.enabled else 0.0,
            shares=self.shares,
            sampling_rate=sampling_rate(config),
            max_cohort=config.federation.max_cohort if config.privacy.unit == "client" else None,
            expected=self.expected,
            unit=config.privacy.unit,
            clients=self.partition.clients,
            bits=config.codec.bits,
            **more,
        )


def sampling_rate(config: Config) -> float:
    """Poisson rate q of a unit: expected_cohort / clients, or the users' own rate."""
    fed = config.federation
    return fed.expected_cohort / fed.clients if config.privacy.unit == "client" else fed.unit_sampling_rate
