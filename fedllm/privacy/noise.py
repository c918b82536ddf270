"""Secret randomness: Gaussian noise and Poisson cohorts from the operating system, or reproducible ones that are not
private.

Both sources hand out uniform 64-bit words and share everything after that, so tests of one are tests of the other.
Never used: the global generators of numpy and torch, and torch's CPU generator (32 bits of seed).

Sharp edge: float64 Gaussians are not exact (Mironov 2012): the tail ends at 8.6 standard deviations (mass 1e-17 a
value) and low bits carry structure. Messages are rounded to 8 or 16 bits after the noise, which hides them; exact
discrete noise comes with secure aggregation.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence

import numpy as np

_BLOCK = 1 << 19  # values drawn at a time: bounds temporary memory

Words = Callable[[int], np.ndarray]


class Noise:
    """Keyed randomness. Each (purpose, stage, round, client) is a stream of its own.

    seed: None for the operating system's generator, where every call is fresh. A seed makes each key's stream
    reproducible (Philox keyed by SHA-256 of seed and key) and therefore *not private*: the same key then gives the same
    numbers again, so use each key once.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    @property
    def rng(self) -> str:
        """The ledger's word for the source: 'os' or 'seeded'."""
        return "os" if self.seed is None else "seeded"

    def _words(self, purpose: str, stage: str, round: int, client: int | None) -> Words:
        if self.seed is None:
            return lambda count: np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
        key = json.dumps([self.seed, purpose, stage, int(round), None if client is None else int(client)])
        digest = hashlib.sha256(key.encode()).digest()
        return np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8")).random_raw

    def gaussian(
        self, shape: int | Sequence[int], std: float, *, purpose: str, stage: str, round: int, client: int | None = None
    ) -> np.ndarray:
        """Independent N(0, std^2) as float64 of `shape`; std >= 0 and finite."""
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"Expected std={std} finite and >= 0")
        out = np.empty(shape, dtype=np.float64)
        _fill_gaussian(out.reshape(-1), std, self._words(purpose, stage, round, client))
        return out

    def uniform(
        self, shape: int | Sequence[int], *, purpose: str, stage: str, round: int, client: int | None = None
    ) -> np.ndarray:
        """Independent uniforms in [0, 1) with 53 bits, as float64 of `shape`."""
        words = self._words(purpose, stage, round, client)
        return (words(math.prod(np.atleast_1d(shape).tolist())) >> np.uint64(11)).astype(np.float64).reshape(
            shape
        ) * 2.0**-53

    def binomial(
        self, trials: int, probability: float, *, purpose: str, stage: str, round: int, client: int | None = None
    ) -> int:
        """A Binomial(trials, probability) count, in memory of the order of the count (or of its complement)."""
        if trials < 0 or not 0 <= probability <= 1:
            raise ValueError(f"Expected trials={trials} >= 0 and probability={probability} in [0, 1]")
        if probability > 0.5:
            return trials - self.binomial(
                trials, 1 - probability, purpose=purpose, stage=stage, round=round, client=client
            )
        return _successes(trials, probability, self._words(purpose, stage, round, client))

    def choice(
        self, population: int, count: int, *, purpose: str, stage: str, round: int, client: int | None = None
    ) -> np.ndarray:
        """A uniform subset of `count` of range(population), sorted int64; O(count) memory up to half the population."""
        if not 0 <= count <= population:
            raise ValueError(f"Expected count={count} in [0, population={population}]")
        words = self._words(purpose, stage, round, client)
        if 2 * count > population:
            left_out = _distinct(population, population - count, words)
            return np.setdiff1d(np.arange(population), left_out, assume_unique=True)
        return np.sort(_distinct(population, count, words))

    def sample_cohort(
        self,
        population: int,
        sampling_rate: float,
        max_cohort: int | None,
        *,
        stage: str,
        round: int,
        purpose: str = "cohort",
        client: int | None = None,
    ) -> np.ndarray:
        """Sorted int64 indices of a Poisson cohort, cut to a uniform subset of `max_cohort` where it is larger.

        A Binomial count and a uniform subset of that size have the law of independent inclusion at `sampling_rate`, and
        a uniform subset of a uniform subset is one: so the cut can come before the members are drawn.
        """
        key = {"stage": stage, "round": round, "client": client}
        count = self.binomial(population, sampling_rate, purpose=f"{purpose}/size", **key)
        if max_cohort is not None:
            count = min(count, max_cohort)
        return self.choice(population, count, purpose=f"{purpose}/members", **key)


def default_max_cohort(population: int, sampling_rate: float, rounds: int, delta: float) -> int:
    """The smallest cohort limit at which truncation is negligible: rounds * P[a cut can involve a given unit] <= delta
    / 1000.

    rounds: all sampled rounds of both stages, >= 1. Between 1 and `population`, where no cut is possible at all.
    """
    from fedllm.privacy.events import truncation_probability

    allowed = 1e-3 * delta / rounds
    low, high = 1, population
    while low < high:
        middle = (low + high) // 2
        if truncation_probability(population, sampling_rate, middle) <= allowed:
            high = middle
        else:
            low = middle + 1
    return low


def _fill_gaussian(flat: np.ndarray, std: float, words: Words) -> None:
    """Box-Muller: radius from a uniform in (0, 1], angle from one in [0, 1)."""
    for start in range(0, flat.size, 2 * _BLOCK):
        part = flat[start : start + 2 * _BLOCK]
        half = (part.size + 1) // 2
        bits = (words(2 * half) >> np.uint64(11)).astype(np.float64)
        radius = std * np.sqrt(-2.0 * np.log((bits[:half] + 1.0) * 2.0**-53))
        angle = (2.0 * math.pi * 2.0**-53) * bits[half:]
        part[:half] = radius * np.cos(angle)
        part[half:] = (radius * np.sin(angle))[: part.size - half]


def _successes(trials: int, probability: float, words: Words) -> int:
    """Count successes by their geometric gaps: trials until the next success are 1 + floor(log u / log(1 - p))."""
    if trials == 0 or probability == 0:
        return 0
    count, position = 0, 0
    while True:
        size = min(_BLOCK, 16 + int(1.2 * (trials - position) * probability))
        uniforms = ((words(size) >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
        gaps = np.minimum(np.floor(np.log(uniforms) / math.log1p(-probability)), trials) + 1
        positions = position + np.cumsum(gaps)
        inside = int(np.searchsorted(positions, trials, side="right"))
        count += inside
        if inside < size:
            return count
        position = int(positions[-1])


def _distinct(population: int, count: int, words: Words) -> np.ndarray:
    """The first `count` distinct values of a stream of uniform integers below `population`, at least 2 * count."""
    limit = np.uint64(2**64 - 1 - (2**64 % population))  # words above it would favour small remainders
    found = np.empty(0, dtype=np.int64)
    while found.size < count:
        drawn = words(16 + 2 * (count - found.size))
        drawn = (drawn[drawn <= limit] % np.uint64(population)).astype(np.int64)
        together = np.concatenate([found, drawn])
        _, first = np.unique(together, return_index=True)
        found = together[np.sort(first)]
    return found[:count]
