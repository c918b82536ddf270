"""Checks of single values, one phrasing for all: what was given, where, and what would be right."""

from __future__ import annotations

import difflib
import math
from typing import Any

from fedllm.errors import UserError


def one_of(key: str, value: Any, allowed: Any) -> None:
    """Raise UserError unless `value` is one of the allowed names."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(name) for name in allowed], 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{key}={value}: expected one of {', '.join(str(name) for name in allowed)}{hint}")


def in_range(key: str, value: float, low: float, high: float = float("inf"), open_low: bool = False, open_high: bool = False) -> None:
    """Raise UserError unless low <= value <= high (or <, where open)."""
    good = math.isfinite(value) and (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not good:
        bounds = "" if math.isfinite(value) else "a finite number, "
        bounds += f"{low:g} {'<' if open_low else '<='} {key}" + ("" if high == float("inf") else f" {'<' if open_high else '<='} {high:g}")
        raise UserError(f"{key}={value}: expected {bounds}")
