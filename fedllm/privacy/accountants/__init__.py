"""Accountants: from events to epsilon. One file and one line in the registry each; imported only when asked for."""

from importlib import import_module
from typing import Protocol

from fedllm.privacy.answers import PrivacyAnswer
from fedllm.privacy.events import ADD_REMOVE, Event

_REGISTRY = {
    "pld": "fedllm.privacy.accountants.pld:PldAccountant",
    "gdp": "fedllm.privacy.accountants.gdp:GdpAccountant",
}


class UnsupportedEvent(ValueError):
    """An accountant was given an event that it has no theorem for; the message names both."""


class Accountant(Protocol):
    """Collects events and answers for their (adaptive) composition."""

    name: str
    relation: str

    def supports(self, event: Event) -> bool:
        """Whether `compose` accepts this event."""

    def compose(self, event: Event, count: int = 1) -> "Accountant":
        """Add `count` >= 0 independent releases of an event; returns itself. Raises UnsupportedEvent, never guesses."""

    def epsilon(self, delta: float) -> PrivacyAnswer:
        """The epsilon at `delta` in (0, 1); its `unit` and `adversary` are for the caller to fill in."""

    def delta(self, epsilon: float) -> float:
        """The delta at `epsilon` >= 0."""


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
    """Shared base: a multiset of events under one relation, with the checks every accountant needs."""

    name = "base"
    conversion = ""

    def __init__(self, relation: str = ADD_REMOVE) -> None:
        from fedllm.privacy.events import relation_factor

        self.factor = relation_factor(relation)
        self.relation = relation
        self.counts: dict[Event, int] = {}

    def supports(self, event: Event) -> bool:
        raise NotImplementedError

    def compose(self, event: Event, count: int = 1) -> "EventCounts":
        if not self.supports(event):
            raise UnsupportedEvent(f"accountant {self.name} ({self.relation}) does not support {event}")
        if count < 0:
            raise ValueError(f"Expected count={count} >= 0")
        if count:
            self.counts[event] = self.counts.get(event, 0) + count
        return self

    def _answer(self, epsilon: float | None, delta: float, reason: str | None = None, **changes: str) -> PrivacyAnswer:
        fields = {"accountant": self.name, "conversion": self.conversion, "kind": "bound", **changes}
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
