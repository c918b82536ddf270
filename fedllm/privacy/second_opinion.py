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
    relation_factor,
)
from fedllm.privacy.questions import Phases

if TYPE_CHECKING:
    from dp_accounting import DpEvent

MAX_LOSS = 300.0  # the library's grid of 1e-4 is never coarsened: larger losses take it minutes and gigabytes


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
    """The library's epsilon beside ours, as plain values; `difference` is ours over theirs, less one.

    No figure where it knows no such release, or where the losses are too large for its grid.
    """
    within = ours is not None and max(ours, _largest_loss(phases, relation)) <= MAX_LOSS
    theirs = library_epsilon(phases, relation, delta) if within else None
    known = theirs is not None and ours is not None and 0 < theirs < math.inf
    finite = theirs if theirs is not None and math.isfinite(theirs) else None
    return {"accountant": "dp-accounting pld", "epsilon": finite, "difference": ours / theirs - 1 if known else None}


def _largest_loss(phases: Phases, relation: str) -> float:
    """Of one release at ten standard deviations, where the unit takes part for certain."""
    losses = [0.0]
    for event, count in phases:
        for part, times in flatten(event, count):
            if times and getattr(part, "noise_multiplier", 0.0):
                mu = relation_factor(relation) * getattr(part, "sensitivity", 1.0) * getattr(part, "group", 1) / part.noise_multiplier
                losses.append(mu * mu / 2 + 10 * mu)
    return max(losses)


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
