"""Measuring steps against each other on one machine: paired ratios with an interval, and peak memory."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


def median_interval(values: Sequence[float], level: float = 0.95) -> dict[str, float]:
    """Median, and the distribution-free interval for the true one: the narrowest symmetric order statistics of coverage >= level.

    P[x_(k) <= median <= x_(n+1-k)] = 1 - 2 P[Binomial(n, 1/2) < k]. Below 6 values no pair covers 95 %: the extremes then stand, and
    `coverage` says what they cover.
    """
    ordered, count = sorted(values), len(values)
    outside = [sum(math.comb(count, j) for j in range(k)) / 2**count for k in range(1, count // 2 + 1)]  # P[Binomial < k]
    rank = max((k for k, tail in enumerate(outside, 1) if 1 - 2 * tail >= level), default=1)
    tail = outside[rank - 1] if outside else 0.5
    return {"median": statistics.median(ordered), "low": ordered[rank - 1], "high": ordered[count - rank], "coverage": 1 - 2 * tail}


class Seconds(NamedTuple):
    """Of the clock, and of the processor (all threads): a busy machine changes the first more than the second."""

    wall: float
    processor: float


def timed(step: Callable[[], Any]) -> Seconds:
    """What one call takes."""
    gc.collect()
    wall, processor = time.perf_counter(), time.process_time()
    step()
    processor = time.process_time() - processor
    return Seconds(time.perf_counter() - wall, processor)


def alternate(steps: Mapping[str, Callable[[], Any]], cycles: int) -> Iterator[dict[str, Seconds]]:
    """What every step takes, cycle by cycle, after one that is not counted. The order rotates: none always follows the same one."""
    names = list(steps)
    for cycle in range(-1, cycles):
        first = cycle % len(names)
        seconds = {name: timed(steps[name]) for name in names[first:] + names[:first]}
        if cycle >= 0:
            yield seconds


def ratios(cycles: Sequence[Mapping[str, Seconds]], name: str, against: str) -> dict[str, dict[str, float]]:
    """Paired ratios of one step to another, of both kinds of seconds: median and interval over the cycles."""
    return {
        kind: median_interval([getattr(seconds[name], kind) / getattr(seconds[against], kind) for seconds in cycles])
        for kind in Seconds._fields
    }


def peak_bytes(call: Callable[[], Any]) -> tuple[int, int]:
    """Peak resident bytes of this process during a call: above what was there before, and in all. Linux only.

    Freed memory must go back to the system at once for this to be the call's own: run with MALLOC_ENVIRONMENT.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    call()
    peak = resident("VmHWM")
    return max(peak - before, 0), peak


MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"Expected {field} in /proc/self/status: memory is measured on Linux only")
