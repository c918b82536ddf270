"""What was released, apart from what it costs: frozen records of noisy sums, and the conventions they share.

Sensitivities are in units of the clip norm C: one unit's contribution has L2 norm at most C, so adding or removing it
moves the sum by at most 1 (times C) and replacing it by at most 2. Events record the former; `relation_factor` is the
only place where replace-one becomes 2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

ADD_REMOVE = "add-or-remove-one"
REPLACE_ONE = "replace-one"
_FACTORS = {ADD_REMOVE: 1.0, REPLACE_ONE: 2.0}


def relation_factor(relation: str) -> float:
    """How far a sum of contributions of norm <= 1 moves between neighbours: 1 for add or remove, 2 for replace."""
    if relation not in _FACTORS:
        raise ValueError(f"Expected relation={relation!r} to be one of {', '.join(_FACTORS)}")
    return _FACTORS[relation]


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"Expected {message}")


def _check_noise(noise_multiplier: float) -> None:
    _check(
        math.isfinite(noise_multiplier) and noise_multiplier >= 0,
        f"noise_multiplier={noise_multiplier} finite and >= 0",
    )


def _check_rate(sampling_rate: float) -> None:
    _check(0 <= sampling_rate <= 1, f"sampling_rate={sampling_rate} in [0, 1]")


@dataclass(frozen=True)
class GaussianEvent:
    """A sum plus N(0, (noise_multiplier C)^2) in every coordinate, without sampling.

    sensitivity: bound on one unit's contribution, in units of C; > 0.
    """

    noise_multiplier: float
    sensitivity: float = 1.0

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check(
            math.isfinite(self.sensitivity) and self.sensitivity > 0, f"sensitivity={self.sensitivity} finite and > 0"
        )


@dataclass(frozen=True)
class PoissonGaussianEvent:
    """The Gaussian sum over a cohort in which every unit is included independently with probability `sampling_rate`.

    group: how many units neighbours differ in, >= 1, each sampled on its own (group privacy).
    """

    noise_multiplier: float
    sampling_rate: float
    group: int = 1

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check_rate(self.sampling_rate)
        _check(self.group >= 1, f"group={self.group} >= 1")


@dataclass(frozen=True)
class TruncatedPoissonGaussianEvent:
    """The same, but a Poisson cohort above `max_cohort` is first cut to a uniform subset of `max_cohort` units.

    population: number of units in the larger of two neighbouring data sets (add/remove), i.e. the unit in question
    included.
    """

    noise_multiplier: float
    sampling_rate: float
    population: int
    max_cohort: int

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check_rate(self.sampling_rate)
        _check(self.population >= 1, f"population={self.population} >= 1")
        _check(self.max_cohort >= 1, f"max_cohort={self.max_cohort} >= 1")


@dataclass(frozen=True)
class FixedSizeGaussianEvent:
    """The Gaussian sum over a cohort of exactly `cohort` units drawn without replacement from `population`.

    Neighbours replace one unit (adding one would change the population, which is public here).
    """

    noise_multiplier: float
    population: int
    cohort: int

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check(1 <= self.cohort <= self.population, f"cohort={self.cohort} in [1, population={self.population}]")


@dataclass(frozen=True)
class MomentsEvent:
    """Stage 1's release: per-factor mean and mean square of one cohort, jointly clipped, hence one noisy sum.

    release: the sum, as an event of its own.
    """

    release: "Event"


@dataclass(frozen=True)
class ComposedEvent:
    """Several releases, adaptively: (event, count) pairs, count >= 0."""

    parts: "tuple[tuple[Event, int], ...]"


@dataclass(frozen=True)
class FreeEvent:
    """Something computed from public data or from what was released before: it costs nothing.

    reason: why it is free, one phrase for the report.
    """

    reason: str


NoisySum = GaussianEvent | PoissonGaussianEvent | TruncatedPoissonGaussianEvent | FixedSizeGaussianEvent
Event = NoisySum | MomentsEvent | ComposedEvent | FreeEvent


def flatten(event: Event, count: int = 1) -> Iterator[tuple[Event, int]]:
    """An event without its wrappings: noisy sums and free events, each with how often it was released."""
    if isinstance(event, MomentsEvent):
        yield from flatten(event.release, count)
    elif isinstance(event, ComposedEvent):
        for part, times in event.parts:
            yield from flatten(part, times * count)
    else:
        yield event, count


def truncation_probability(population: int, sampling_rate: float, max_cohort: int) -> float:
    """P[at least `max_cohort` of the population - 1 other units are sampled]: only then can a cut touch the last."""
    from scipy.special import bdtrc

    others = population - 1
    if max_cohort > others or sampling_rate == 0:
        return 0.0
    return float(bdtrc(max_cohort - 1, others, sampling_rate))


def without_cut(counts: "tuple[tuple[Event, int], ...]") -> "tuple[tuple[tuple[Event, int], ...], float]":
    """Truncated events as plain Poisson ones, and the delta that pays for it."""
    plain: dict[Event, int] = {}
    lost = 0.0
    for event, count in counts:
        if isinstance(event, TruncatedPoissonGaussianEvent):
            lost += count * truncation_probability(event.population, event.sampling_rate, event.max_cohort)
            event = PoissonGaussianEvent(event.noise_multiplier, event.sampling_rate)
        plain[event] = plain.get(event, 0) + count
    return tuple(plain.items()), lost


# Trust modes. The ledger's noise_multiplier z is that of the sum for `distributed` and `central`, that of one message
# for `local`.
# The server tops every sum up to exactly `shares` shares, so that its noise never depends on the realised cohort.
_SUM_MULTIPLIER = {
    "distributed": lambda z, shares: z,
    "central": lambda z, shares: z,
    "local": lambda z, shares: z * math.sqrt(shares),
}
_MESSAGE_MULTIPLIER = {
    "distributed": lambda z, shares: z / math.sqrt(shares),
    "central": lambda z, shares: None,
    "local": lambda z, shares: z,
}


def _by_mode(table: dict, noise: str, noise_multiplier: float, shares: int) -> float | None:
    if noise not in table:
        raise ValueError(f"Expected noise={noise!r} to be one of {', '.join(table)}")
    _check(shares >= 1, f"shares={shares} >= 1")
    return table[noise](noise_multiplier, shares)


def sum_multiplier(noise: str, noise_multiplier: float, shares: int) -> float:
    """Noise on the published sum over C, given the configured multiplier; always made up of `shares` >= 1 shares."""
    return _by_mode(_SUM_MULTIPLIER, noise, noise_multiplier, shares)


def message_multiplier(noise: str, noise_multiplier: float, shares: int) -> float | None:
    """Noise on one client's message over C; None where messages are not noised (`central`)."""
    return _by_mode(_MESSAGE_MULTIPLIER, noise, noise_multiplier, shares)


def sampled_event(noise_multiplier: float, sampling_rate: float, population: int, max_cohort: int | None) -> Event:
    """The event of a noisy sum over a Poisson cohort, cut at `max_cohort` unless None (or no cohort can exceed it)."""
    if max_cohort is None or max_cohort >= population:
        return PoissonGaussianEvent(noise_multiplier, sampling_rate)
    return TruncatedPoissonGaussianEvent(noise_multiplier, sampling_rate, population, max_cohort)
