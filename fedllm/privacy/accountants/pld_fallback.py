"""What answers where a privacy loss distribution cannot: the smaller of RDP's bound and exact GDP without amplification.

Either is a bound, so their minimum is; which of them it was is written on the answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.privacy import accountants
from fedllm.privacy.accountants.gdp import gdp_delta, gdp_epsilon
from fedllm.privacy.events import Event, GaussianEvent, TruncatedPoissonGaussianEvent, relation_factor

MAX_LOSS = 2e4  # larger privacy losses are not put on a grid

Counts = tuple[tuple[Event, int], ...]


@dataclass(frozen=True)
class Fallback:
    """How a figure was come by that is not the distribution's: the answer's `reason` and `conversion`."""

    reason: str
    conversion: str

    def labels(self) -> dict[str, str]:
        """As fields of an answer."""
        return {"reason": self.reason, "conversion": self.conversion}


def too_large(counts: Counts, relation: str) -> bool:
    """Whether the composed loss, roughly, runs beyond MAX_LOSS, where a grid costs gigabytes or all its precision."""
    factor = relation_factor(relation)
    total = 0.0
    for event, count in counts:
        mu = factor * getattr(event, "sensitivity", 1.0) * getattr(event, "group", 1) / event.noise_multiplier
        if isinstance(event, GaussianEvent):
            total += count * mu * mu / 2 + 9 * math.sqrt(count) * mu
        else:
            expected = count * event.sampling_rate
            hits = min(count, expected + 8 * math.sqrt(expected) + 4)
            total += hits * mu * mu / 2 + 9 * math.sqrt(hits) * mu
    return not total <= MAX_LOSS


def unamplified_mu(counts: Counts, relation: str) -> float:
    """mu if every cohort were public: sampling never costs, by joint convexity, and a cut at most a replacement, 2."""
    factor = relation_factor(relation)
    total = 0.0
    for event, count in counts:
        sensitivity = getattr(event, "sensitivity", 1.0) * getattr(event, "group", 1) * factor
        if isinstance(event, TruncatedPoissonGaussianEvent):
            sensitivity = 2.0
        mu = sensitivity / event.noise_multiplier
        total += count * mu * mu
    return math.sqrt(total)


def closed_form(counts: Counts, relation: str, delta: float) -> float:
    """epsilon at `delta` if every cohort were public."""
    return gdp_epsilon(unamplified_mu(counts, relation), delta)


def fallback_epsilon(counts: Counts, relation: str, delta: float, because: str) -> tuple[float, Fallback]:
    """(epsilon at `delta`, how). because: why the distribution did not answer, one phrase."""
    by_gdp, by_rdp = closed_form(counts, relation, delta), math.inf
    renyi = _renyi(counts, relation) if by_gdp < math.inf else None
    if renyi is not None:
        found = renyi.epsilon(delta)
        by_rdp = math.inf if found.epsilon is None else found.epsilon
    return min(by_gdp, by_rdp), _label(by_rdp < by_gdp, because, counts)


def fallback_deltas(counts: Counts, relation: str, epsilons: Sequence[float], because: str) -> tuple[list[float], Fallback]:
    """(delta at each epsilon, how)."""
    mu = unamplified_mu(counts, relation)
    by_gdp = [gdp_delta(mu, epsilon) for epsilon in epsilons]
    renyi = _renyi(counts, relation) if mu < math.inf else None
    by_rdp = [1.0] * len(by_gdp) if renyi is None else [1.0 if one is None else one for one in renyi.deltas(epsilons)]
    found = [min(pair) for pair in zip(by_gdp, by_rdp, strict=True)]
    return found, _label(sum(by_rdp) < sum(by_gdp), because, counts)


def _label(by_rdp: bool, because: str, counts: Counts) -> Fallback:
    if by_rdp:
        return Fallback(f"bound of rdp: {because}", "RDP, improved conversion")
    if all(isinstance(event, GaussianEvent) for event, _ in counts):
        return Fallback(f"exact GDP: {because}", "closed form")
    return Fallback(f"without amplification by sampling: {because}", "closed form")


def _renyi(counts: Counts, relation: str) -> accountants.Accountant | None:
    """The accountant rdp with these events; None where it has no theorem for one of them."""
    if "rdp" not in accountants.names():
        return None
    accountant = accountants.create("rdp", relation)
    if not all(accountant.supports(event) for event, _ in counts):
        return None
    for event, count in counts:
        accountant.compose(event, count)
    return accountant
