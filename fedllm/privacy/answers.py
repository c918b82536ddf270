"""An epsilon with everything that gives it meaning."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BOUND, ESTIMATE = "bound", "estimate"
UPPER, LOWER, EXACT, UNKNOWN = "upper", "lower", "exact", "unknown"


@dataclass(frozen=True)
class PrivacyAnswer:
    """One (epsilon, delta) statement; whichever of the two was asked for, the other is what was given.

    epsilon: >= 0, or None where there is no finite figure (then `reason` says why; JSON has no infinity).
    delta: in [0, 1], or None where it was asked for and there is no figure.
    unit: what one neighbour adds, removes or replaces (client, user, example). relation: see events.py.
    accountant, conversion: who computed it and how a divergence became epsilon.
    adversary: release | server. kind: 'bound' (a theorem stands behind it) or 'estimate'.
    reason: why there is no figure, or a remark the figure must not be read without.
    direction: on which side of the truth the figure stands: upper (never below it), lower (never above it), exact, or unknown.
    interval: (low, high) that holds the truth for certain, where the accountant has one; None for an end that is vacuous.
    seconds: time it took, where it was measured.
    """

    epsilon: float | None
    delta: float | None
    unit: str
    relation: str
    accountant: str
    conversion: str
    adversary: str
    kind: str
    reason: str | None = None
    direction: str = UPPER
    interval: tuple[float | None, float | None] | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in (BOUND, ESTIMATE):
            raise ValueError(f"Expected kind={self.kind!r} to be 'bound' or 'estimate'")
        if self.direction not in (UPPER, LOWER, EXACT, UNKNOWN):
            raise ValueError(f"Expected direction={self.direction!r} to be upper, lower, exact or unknown")
        if (self.epsilon is None or self.delta is None) and not self.reason:
            raise ValueError("Expected a reason where epsilon or delta is None")

    def as_json(self) -> dict[str, Any]:
        """The answer as plain values for `json.dumps`."""
        return asdict(self) | {"interval": None if self.interval is None else list(self.interval)}
