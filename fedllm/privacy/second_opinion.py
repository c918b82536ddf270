"""A second opinion on the quoted epsilon: Google's dp-accounting, an independent implementation, on the same releases."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fedllm.privacy.events import (
    ADD_REMOVE,
    Event,
    FixedSizeGaussianEvent,
    FreeEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    flatten,
)
from fedllm.privacy.questions import Phases

if TYPE_CHECKING:
    from dp_accounting import DpEvent


def library_epsilon(phases: Phases, relation: str, delta: float) -> float | None:
    """Epsilon of a composition by dp-accounting's PLD at its default grid; None where it knows no such release."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    neighbours = NeighboringRelation.ADD_OR_REMOVE_ONE if relation == ADD_REMOVE else NeighboringRelation.REPLACE_ONE
    accountant = PLDAccountant(neighbours)
    for event, count in phases:
        for part, times in flatten(event, count):
            if isinstance(part, FreeEvent) or times == 0:
                continue
            theirs = _library_event(part)
            if theirs is None or not accountant.supports(theirs):
                return None
            accountant.compose(theirs, times)
    return float(accountant.get_epsilon(delta))


def second_opinion(phases: Phases, relation: str, delta: float, ours: float | None) -> dict[str, Any]:
    """The library's epsilon beside ours, as plain values; `difference` is ours over theirs, less one."""
    theirs = library_epsilon(phases, relation, delta)
    known = theirs is not None and ours is not None and 0 < theirs < math.inf
    finite = theirs if theirs is not None and math.isfinite(theirs) else None
    return {"accountant": "dp-accounting pld", "epsilon": finite, "difference": ours / theirs - 1 if known else None}


def _library_event(event: Event) -> DpEvent | None:
    import dp_accounting as library
    from scipy.stats import binom

    if isinstance(event, FixedSizeGaussianEvent) or event.noise_multiplier == 0:
        return None
    if isinstance(event, GaussianEvent):
        return library.GaussianDpEvent(event.noise_multiplier / event.sensitivity)
    if isinstance(event, TruncatedPoissonGaussianEvent):
        return library.dp_event.TruncatedSubsampledGaussianDpEvent(
            event.population, event.sampling_rate, event.max_cohort, event.noise_multiplier
        )
    if isinstance(event, PoissonGaussianEvent) and event.group > 1:
        sampled = range(event.group + 1)
        weights = [float(binom.pmf(number, event.group, event.sampling_rate)) for number in sampled]
        return library.dp_event.MixtureOfGaussiansDpEvent(event.noise_multiplier, list(map(float, sampled)), weights)
    return library.PoissonSampledDpEvent(event.sampling_rate, library.GaussianDpEvent(event.noise_multiplier))
