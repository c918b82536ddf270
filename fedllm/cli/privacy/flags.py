"""The flags that `privacy epsilon`, `calibrate` and `tradeoff` share, and what they mean together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from fedllm.errors import UserError
from fedllm.privacy.events import ADD_REMOVE, REPLACE_ONE, Event

RELATIONS = {"add-remove": ADD_REMOVE, "replace-one": REPLACE_ONE}

NoiseFlag = Annotated[float | None, typer.Option("--noise-multiplier", metavar="S", help="Noise over clip norm, of the sum.")]
RateFlag = Annotated[float | None, typer.Option("--sampling-rate", metavar="Q", help="Poisson rate of a unit; 1: no sampling.")]
StepsFlag = Annotated[int | None, typer.Option("--steps", metavar="T", help="Number of releases.")]
DeltaFlag = Annotated[float | None, typer.Option("--delta", metavar="D", help="Below one over the number of units.")]
EpsilonFlag = Annotated[float | None, typer.Option("--epsilon", metavar="E")]
PhaseFlag = Annotated[
    list[str] | None, typer.Option("--phase", metavar="S,Q,T", help="Noise multiplier, rate and steps of one phase; may be repeated.")
]
RelationFlag = Annotated[str, typer.Option("--relation", help="add-remove | replace-one: what neighbours differ in.")]
GroupFlag = Annotated[int, typer.Option("--group", metavar="K", help="Units that neighbours differ in (group privacy).")]
PopulationFlag = Annotated[int | None, typer.Option("--population", metavar="N", help="With --cohort: fixed-size cohorts of N units.")]
CohortFlag = Annotated[int | None, typer.Option("--cohort", metavar="M", help="Units in every cohort, drawn without replacement.")]
UnitFlag = Annotated[str, typer.Option("--unit", help="What one unit is; only a name: client, user, example.")]
AccountantFlag = Annotated[str, typer.Option("--accountant", help="pld | rdp | gdp | edgeworth, one of their members, or all.")]

CheckFlag = Annotated[bool, typer.Option("--check", help="Ask Google's dp-accounting too, an independent implementation.")]


@dataclass(frozen=True)
class Sampling:
    """How a unit comes into a cohort: by Poisson at `rate`, or as one of exactly `cohort` of `population`."""

    rate: float | None
    population: int | None
    cohort: int | None
    group: int

    def event(self, noise_multiplier: float, rate: float | None = None) -> Event:
        """The noisy sum of one release."""
        from fedllm.privacy.questions import fixed_event, phase_event

        if self.cohort is not None:
            return fixed_event(noise_multiplier, self.population, self.cohort)
        return phase_event(noise_multiplier, self.rate if rate is None else rate, self.group)


def sampling(rate: float | None, population: int | None, cohort: int | None, group: int, phases: list[str] | None = None) -> Sampling:
    """The flags' sampling. Raises UserError for a missing one or two that exclude each other."""
    if group < 1:
        raise UserError(f"--group {group}: expected a whole number >= 1")
    if (population is None) != (cohort is None):
        raise UserError("--population and --cohort belong together: expected both (fixed-size cohorts) or neither")
    if cohort is not None:
        if rate is not None or phases:
            raise UserError("--cohort: expected without --sampling-rate and --phase; a fixed-size cohort has no Poisson rate")
        if not 1 <= cohort <= population:
            raise UserError(f"--cohort {cohort}: expected a whole number in [1, --population {population}]")
        if group > 1:
            raise UserError(f"--group {group}: expected 1 with fixed-size cohorts; there is no theorem for their groups here")
    elif rate is not None:
        check_rate("--sampling-rate", rate)
    elif not phases:
        raise UserError("--sampling-rate: expected a number in [0, 1] (1: no sampling), or --population and --cohort")
    return Sampling(rate, population, cohort, group)


def phases_of(texts: list[str] | None, drawn: Sampling, noise: float | None, steps: int | None) -> list[tuple[Event, int]]:
    """(event, count) of every phase, from `--phase` or from the three flags. Raises UserError."""
    if not texts:
        check_noise("--noise-multiplier", noise)
        check_steps("--steps", steps)
        return [(drawn.event(noise), steps)]
    if noise is not None or steps is not None or drawn.rate is not None:
        raise UserError("--phase: expected in place of --noise-multiplier, --sampling-rate and --steps, not beside them")
    phases = []
    for text in texts:
        try:
            noise_text, rate_text, steps_text = text.split(",")
            numbers = float(noise_text), float(rate_text), int(steps_text)
        except ValueError:
            raise UserError(f"--phase {text}: expected S,Q,T (noise multiplier, sampling rate, steps), such as 0.8,0.01,5000") from None
        check_noise(f"--phase {text}: noise multiplier", numbers[0])
        check_rate(f"--phase {text}: sampling rate", numbers[1])
        check_steps(f"--phase {text}: steps", numbers[2])
        phases.append((drawn.event(numbers[0], numbers[1]), numbers[2]))
    return phases


def relation_of(name: str) -> str:
    """The relation that `--relation` names. Raises UserError."""
    if name not in RELATIONS:
        raise UserError(f"--relation {name}: expected one of {', '.join(RELATIONS)}")
    return RELATIONS[name]


def check_noise(flag: str, value: float | None) -> None:
    """Raise UserError unless a finite number >= 0."""
    if value is None or not 0 <= value < math.inf:
        raise UserError(f"{_given(flag, value)}: expected a finite number >= 0")


def check_rate(flag: str, value: float | None) -> None:
    """Raise UserError unless in [0, 1]."""
    if value is None or not 0 <= value <= 1:
        raise UserError(f"{_given(flag, value)}: expected a number in [0, 1]")


def check_steps(flag: str, value: int | None) -> None:
    """Raise UserError unless a whole number >= 0 that is not absurd."""
    from fedllm.privacy.questions import MAX_STEPS

    if value is None or not 0 <= value <= MAX_STEPS:
        raise UserError(f"{_given(flag, value)}: expected a whole number in [0, {MAX_STEPS:g}]")


def check_delta(value: float | None) -> None:
    """Raise UserError unless in [1e-12, 1)."""
    if value is None or not 1e-12 <= value < 1:
        raise UserError(f"{_given('--delta', value)}: expected a number in [1e-12, 1)")


def check_epsilon(value: float | None, positive: bool = False) -> None:
    """Raise UserError unless finite and >= 0 (> 0 where `positive`)."""
    if value is None or not 0 <= value < math.inf or (positive and value == 0):
        raise UserError(f"{_given('--epsilon', value)}: expected a finite number {'> 0' if positive else '>= 0'}")


def query(**given: Any) -> dict[str, Any]:
    """The question as `--json` repeats it: what was given, nothing else."""
    return {key: value for key, value in given.items() if value is not None and value != []}


def text(asked: dict[str, Any]) -> str:
    """The question in one line, for a title."""
    return ", ".join(f"{key.replace('_', ' ')} {_value_text(key, value)}" for key, value in asked.items())


def _value_text(key: str, value: Any) -> str:
    from fedllm.formats import delta_text

    if isinstance(value, list):
        return " + ".join(value)
    if isinstance(value, float):
        return delta_text(value) if key == "delta" else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else value


def _given(flag: str, value: float | None) -> str:
    if value is None:
        return f"{flag} is missing"
    return f"{flag} {value:g}"
