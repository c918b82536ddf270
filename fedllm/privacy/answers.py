"""An epsilon with everything that gives it meaning."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class PrivacyAnswer:
    """One (epsilon, delta) statement.

    epsilon: >= 0, or None where there is no finite figure (then `reason` says why; JSON has no infinity).
    unit: what one neighbour adds, removes or replaces (client, user, example). relation: see events.py.
    accountant, conversion: who computed it and how a divergence became epsilon.
    adversary: release | server. kind: 'bound' (never below the truth) or 'estimate'.
    reason: why there is no figure, or a remark the figure must not be read without.
    """

    epsilon: float | None
    delta: float
    unit: str
    relation: str
    accountant: str
    conversion: str
    adversary: str
    kind: str
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("bound", "estimate"):
            raise ValueError(f"Expected kind={self.kind!r} to be 'bound' or 'estimate'")
        if self.epsilon is None and not self.reason:
            raise ValueError("Expected a reason where epsilon is None")

    def as_json(self) -> dict:
        """The answer as plain values for `json.dumps`."""
        return asdict(self)
