"""One question, many accountants: epsilon, delta or steps of a composition, each answer labelled and timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fedllm.errors import UserError
from fedllm.privacy import accountants
from fedllm.privacy.answers import BOUND, EXACT, UPPER, PrivacyAnswer
from fedllm.privacy.events import (
    ADD_REMOVE,
    Event,
    FixedSizeGaussianEvent,
    GaussianEvent,
    PoissonGaussianEvent,
)

Phases = Sequence[tuple[Event, int]]
MAX_STEPS = 10**9


@dataclass(frozen=True)
class Refusal:
    """An accountant that has no valid theorem for what was asked."""

    accountant: str
    reason: str


def phase_event(noise_multiplier: float, sampling_rate: float, group: int = 1) -> Event:
    """A noisy sum of one phase: Poisson-sampled below rate 1; `group` units at once."""
    if sampling_rate == 1:
        return GaussianEvent(noise_multiplier, sensitivity=float(group))
    return PoissonGaussianEvent(noise_multiplier, sampling_rate, group)


def fixed_event(noise_multiplier: float, population: int, cohort: int) -> Event:
    """A noisy sum over exactly `cohort` of `population` units."""
    return FixedSizeGaussianEvent(noise_multiplier, population, cohort)


def members(accountant: str) -> tuple[str, ...]:
    """Registered accountants that `--accountant NAME` asks for: a family, one of them, or `all`. Raises UserError."""
    families = accountants.FAMILIES
    if accountant == "all":
        return tuple(name for family in families.values() for name in family)
    if accountant in families:
        return families[accountant]
    if accountant in accountants.names():
        return (accountant,)
    expected = ", ".join(dict.fromkeys([*families, *accountants.names(), "all"]))
    raise UserError(f"--accountant {accountant}: expected one of {expected}")


def composed(name: str, phases: Phases, relation: str = ADD_REMOVE) -> accountants.Accountant:
    """The accountant with all phases. Raises UnsupportedEvent."""
    accountant = accountants.create(name, relation)
    for event, count in phases:
        accountant.compose(event, count)
    return accountant


def ask(name: str, phases: Phases, relation: str, *, delta: float | None = None, epsilon: float | None = None) -> PrivacyAnswer:
    """One accountant's epsilon at `delta`, or delta at `epsilon` (give one of the two), with the seconds it took."""
    composed(name, [(GaussianEvent(1.0), 1)]).epsilon(0.5)  # imports and their like are not the question's time
    begun = time.perf_counter()
    accountant = composed(name, phases, relation)
    found = accountant.epsilon(delta) if delta is not None else accountant.delta(epsilon)
    return replace(found, seconds=time.perf_counter() - begun)


def ask_each(names: Iterable[str], question: Callable[[str], PrivacyAnswer]) -> tuple[list[PrivacyAnswer], list[Refusal]]:
    """The answers of those accountants that have a theorem, and the refusals of the others."""
    answers, refusals = [], []
    for name in names:
        try:
            answers.append(question(name))
        except accountants.UnsupportedEvent as error:
            refusals.append(Refusal(name, str(error).rpartition("): ")[2] or str(error)))
    return answers, refusals


def to_quote(answers: Iterable[PrivacyAnswer]) -> PrivacyAnswer | None:
    """The answer to quote: the least of the figures that are never below the truth; None where there is none."""
    bounds = [
        answer
        for answer in answers
        if answer.kind == BOUND and answer.direction in (UPPER, EXACT) and answer.epsilon is not None and answer.delta is not None
    ]
    return min(bounds, key=lambda answer: (answer.epsilon, answer.delta), default=None)


def most_steps(name: str, event: Event, relation: str, epsilon: float, delta: float) -> tuple[int | None, PrivacyAnswer]:
    """How many releases of an event stay within (epsilon, delta) by one accountant, and its answer there.

    None where MAX_STEPS fit; the answer is then the one for so many.
    """
    composed(name, [(GaussianEvent(1.0), 1)]).epsilon(0.5)
    begun = time.perf_counter()

    def at(steps: int) -> float:
        found = composed(name, [(event, steps)], relation).epsilon(delta).epsilon
        return math.inf if found is None else found

    low, high = 0, 1
    while low < MAX_STEPS and at(high) <= epsilon:
        low, high = high, min(4 * high, MAX_STEPS)
    while low < MAX_STEPS and high - low > 1:
        middle = _between(low, high)
        if at(middle) <= epsilon:
            low = middle
        else:
            high = middle
    found = composed(name, [(event, low)], relation).epsilon(delta)
    return None if low == MAX_STEPS else low, replace(found, seconds=time.perf_counter() - begun)


def _between(low: int, high: int) -> int:
    """The next number to try: geometric mean while far apart, the middle when close."""
    middle = round(math.sqrt(low * high)) if low and high > 2 * low else (low + high) // 2
    return min(max(middle, low + 1), high - 1)
