"""Seconds by phase: nested phases count once, for the innermost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("setup", "stage1", "local_training", "codec", "privacy", "messages", "server", "evaluation")


class Stopwatch:
    """Adds up exclusive seconds of each phase; `seconds` survives a resume by being handed back in."""

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = {phase: 0.0 for phase in PHASES} | (seconds or {})
        self._stack: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for `name` instead of for the phase around it."""
        if name not in self.seconds:
            raise KeyError(f"Expected one of {', '.join(self.seconds)}, got {name}")
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def total(self) -> dict[str, float]:
        """All phases and their sum `total`, rounded to milliseconds."""
        self._book()
        rounded = {name: round(value, 3) for name, value in self.seconds.items()}
        return rounded | {"total": round(sum(self.seconds.values()), 3)}

    def _book(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now
