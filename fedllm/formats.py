"""How figures are written for people: bytes, epsilons, seconds, percentages. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def bytes_text(count: float | None) -> str:
    """Bytes in decimal units, three significant digits: 611 B, 1.84 MB."""
    if count is None:
        return "-"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{_significant(size)} {unit}"
        size /= 1000
    return f"{_significant(size)} TB"


def epsilon_text(epsilon: float | None) -> str:
    """An epsilon rounded up, so that what is shown never claims more privacy than what was computed."""
    if epsilon is None:
        return "none"
    if epsilon >= 1e12:
        text = f"{epsilon:.3e}"
        return text if float(text) >= epsilon else f"{epsilon * 1.001:.3e}"
    decimals = 3 if epsilon < 1 else 2 if epsilon < 100 else 0
    # The small step back keeps 8.0 from becoming 8.01 through binary rounding.
    rounded = math.ceil(epsilon * 10**decimals - 1e-6) / 10**decimals
    return f"{rounded:,.{decimals}f}"


def seconds_text(seconds: float) -> str:
    """A duration: 0.42 s, 12.3 s, 4:05 min, 2:03:00 h."""
    if seconds < 99.95:
        return f"{seconds:.1f} s" if seconds >= 9.995 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def percent_text(share: float | None, decimals: int = 1) -> str:
    """A share in [0, 1] as a percentage: 82.4 %."""
    return "-" if share is None else f"{100 * share:.{decimals}f} %"


def times_text(factor: float | None) -> str:
    """A ratio: 1.0×, 12.5×, 3,012×."""
    if factor is None:
        return "-"
    return f"{factor:,.0f}×" if factor >= 99.5 else f"{factor:.1f}×"


def delta_text(delta: float) -> str:
    """A small probability: 1e-4, 2.5e-5, 0."""
    mantissa, _, exponent = f"{delta:.3e}".partition("e")
    return "0" if delta == 0 else f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def claim_text(claimed: Mapping[str, Any] | None) -> str:
    """A claimed epsilon and whom it is claimed against, e.g. 8.00 (release, server)."""
    if claimed is None:
        return "-"
    against = ", ".join(claimed.get("against", ()))  # which runs of before do not tell
    return epsilon_text(claimed["epsilon"]) + (f" ({against})" if against else "")


def claim_meaning(claimed: Mapping[str, Any]) -> str:
    """What a published method's claimed epsilon is worth: its delta and how the paper gets it."""
    return f"as published, δ {delta_text(claimed['delta'])}: {claimed['statement']}"


def why_text(why: str | list[str] | None) -> str:
    """The reasons why a run is not private, as one phrase."""
    return why or "" if isinstance(why, str | None) else ", ".join(why)


def _significant(size: float) -> str:
    return f"{size:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"
