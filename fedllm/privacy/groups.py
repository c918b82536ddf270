"""Clip groups: which coordinates of an update are clipped together. Clipped apart, they move together: see `PrivateSum.sensitivity`."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dr_encoder.layout import AdapterLayout

Group = tuple[tuple[int, int], ...]  # ranges [start, stop) of coordinates

JOINT, HEAD = "joint", "head"
_KIND = re.compile(r"\blora_(\w+?)\b")  # A, B, or what else stands between them
_LAYER = re.compile(r"^(.*?\.\d+)\.")


def _kind(factor: str) -> str:
    found = _KIND.search(factor)
    return found.group(1) if found else HEAD


def _layer(factor: str) -> str:
    found = _LAYER.match(factor)
    return found.group(1) if found else HEAD


# How factors are told apart: name of a factor -> name of its group.
GROUPS: dict[str, Callable[[str], str]] = {
    JOINT: lambda factor: JOINT,
    "matrix": lambda factor: factor,
    "layer": _layer,
    "kind": _kind,
}


def clip_groups(layout: AdapterLayout, by: str) -> tuple[Group, ...]:
    """The groups of an update's coordinates, in the order of their first factor; together they are all of them, once.

    by: joint (one group), matrix (every factor), layer (every transformer block, and a head), kind (all A's, all B's, and a head).
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for factor in layout.factors:
        ranges = found.setdefault(GROUPS[by](factor.name), [])
        if ranges and ranges[-1][1] == factor.offset:
            ranges[-1] = (ranges[-1][0], factor.stop)
        else:
            ranges.append((factor.offset, factor.stop))
    return tuple(tuple(ranges) for ranges in found.values())


def is_partition(groups: tuple[Group, ...], size: int) -> bool:
    """Whether every one of `size` coordinates stands in exactly one group."""
    ranges = sorted(part for group in groups for part in group)
    ends_meet = all(before[1] == after[0] for before, after in pairwise(ranges))
    return bool(ranges) and ranges[0][0] == 0 and ranges[-1][1] == size and ends_meet and all(start < stop for start, stop in ranges)
