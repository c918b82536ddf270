"""Accountants: from events to epsilon. One file and one line in the registry each; imported only when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from fedllm.privacy.answers import BOUND, PrivacyAnswer
from fedllm.privacy.events import ADD_REMOVE, Event, FreeEvent, flatten

_REGISTRY = {
    "pld": "fedllm.privacy.accountants.pld:PldAccountant",
    "pld_optimistic": "fedllm.privacy.accountants.pld_optimistic:PldOptimistic",
    "rdp": "fedllm.privacy.accountants.rdp:RdpAccountant",
    "rdp_classic": "fedllm.privacy.accountants.rdp:ClassicRdpAccountant",
    "gdp": "fedllm.privacy.accountants.gdp:GdpAccountant",
    "edgeworth_1": "fedllm.privacy.accountants.edgeworth:Edgeworth1",
    "edgeworth_2": "fedllm.privacy.accountants.edgeworth:Edgeworth2",
    "edgeworth_3": "fedllm.privacy.accountants.edgeworth:Edgeworth3",
}
# What `--accountant NAME` asks for.
FAMILIES: dict[str, tuple[str, ...]] = {
    "pld": ("pld", "pld_optimistic"),
    "rdp": ("rdp", "rdp_classic"),
    "gdp": ("gdp",),
    "edgeworth": ("edgeworth_1", "edgeworth_2", "edgeworth_3"),
}


class UnsupportedEvent(ValueError):
    """An accountant was given an event that it has no theorem for; the message names both."""


class Accountant(Protocol):
    """Collects events and answers for their (adaptive) composition."""

    name: str
    relation: str

    def supports(self, event: Event) -> bool:
        """Whether `compose` accepts this event."""

    def compose(self, event: Event, count: int = 1) -> Accountant:
        """Add `count` >= 0 independent releases of an event; returns itself. Raises UnsupportedEvent, never guesses."""

    def epsilon(self, delta: float) -> PrivacyAnswer:
        """The epsilon at `delta` in (0, 1); its `unit` and `adversary` are for the caller to fill in."""

    def delta(self, epsilon: float) -> PrivacyAnswer:
        """The delta at `epsilon` >= 0, labelled like an epsilon."""

    def deltas(self, epsilons: Sequence[float]) -> list[float]:
        """The delta at many epsilons >= 0, for curves; plain numbers, of the same kind and direction as `delta`."""


def names() -> list[str]:
    """Registered accountants."""
    return list(_REGISTRY)


def create(name: str, relation: str = ADD_REMOVE, **options: float) -> Accountant:
    """An empty accountant by its registered name, with options of its own. Raises ValueError for an unknown name."""
    if name not in _REGISTRY:
        raise ValueError(f"Expected accountant={name!r} to be one of {', '.join(_REGISTRY)}")
    module, cls = _REGISTRY[name].split(":")
    return getattr(import_module(module), cls)(relation, **options)


class EventCounts:
    """Shared base: a multiset of events under one relation, with the checks every accountant needs.

    A subclass gives `name`, `conversion`, `refusal` (None, or why it has no theorem for a noisy sum) and the answers.
    """

    name = "base"
    conversion = ""

    def __init__(self, relation: str = ADD_REMOVE) -> None:
        from fedllm.privacy.events import relation_factor

        self.factor = relation_factor(relation)
        self.relation = relation
        self.counts: dict[Event, int] = {}

    def refusal(self, event: Event) -> str | None:
        """Why there is no valid theorem here for this noisy sum under this relation; None where there is one."""
        raise NotImplementedError

    def supports(self, event: Event) -> bool:
        return all(self.refusal(part) is None for part, _ in flatten(event))

    def compose(self, event: Event, count: int = 1) -> EventCounts:
        if count < 0:
            raise ValueError(f"Expected count={count} >= 0")
        for part, times in flatten(event, count):
            reason = self.refusal(part)
            if reason is not None:
                raise UnsupportedEvent(f"accountant {self.name} ({self.relation}) does not support {part}: {reason}")
            if times:
                self.counts[part] = self.counts.get(part, 0) + times
        return self

    def deltas(self, epsilons: Sequence[float]) -> list[float]:
        return [self.delta(epsilon).delta for epsilon in epsilons]

    def _costly(self) -> tuple[tuple[Event, int], ...]:
        """Events that cost something, in one canonical order: calibration, guard and report agree to the last bit."""
        kept = [
            (event, count)
            for event, count in self.counts.items()
            if not isinstance(event, FreeEvent) and getattr(event, "sampling_rate", 1.0) > 0
        ]
        return tuple(sorted(kept, key=repr))

    def _answer(self, epsilon: float | None, delta: float | None, reason: str | None = None, **changes) -> PrivacyAnswer:
        fields = {"accountant": self.name, "conversion": self.conversion, "kind": BOUND, **changes}
        return PrivacyAnswer(
            epsilon=epsilon, delta=delta, unit="unit", relation=self.relation, adversary="", reason=reason, **fields
        )


def check_delta(delta: float) -> None:
    """Raises ValueError unless 0 < delta < 1."""
    if not 0 < delta < 1:
        raise ValueError(f"Expected delta={delta} in (0, 1)")


def check_epsilon(epsilon: float) -> None:
    """Raises ValueError unless epsilon >= 0 (infinity allowed)."""
    if not epsilon >= 0:
        raise ValueError(f"Expected epsilon={epsilon} >= 0")
