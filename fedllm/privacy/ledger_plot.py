"""Epsilon by release, as a PNG: what `fedllm privacy report` draws from a ledger alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.formats import delta_text, epsilon_text, why_text
from fedllm.plots import COLOURS, LOG_FROM, MARKERS, WARNING, _figure, _plain_ticks, _save, _style

OUTSIDE = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}  # on the curves it would hide them
KINDS = {"pld": "bound, quoted", "rdp": "bound", "gdp": "estimate", "edgeworth_1": "estimate"}


def ledger_figure(report: Mapping[str, Any], path: str | Path) -> Path:
    """Both adversaries' epsilon after each release; of the release adversary by several accountants. Returns `path`.

    report: one run of `privacy report --json`.
    """
    rows = report["by_round"]
    with _style():
        figure = _figure(9.5, 6)
        above, below = figure.subplots(2, 1, sharex=True)
        names = [name for name in rows[-1]["release"] if any(row["release"][name] is not None for row in rows)]
        for number, name in enumerate(names):
            points = [(row["releases"], row["release"][name]) for row in rows if row["release"][name] is not None]
            label = f"{name} ({KINDS.get(name, '')})" + (f": {epsilon_text(points[-1][1])}" if points else "")
            line = "-" if KINDS.get(name, "").startswith("bound") else "--"
            above.plot(*zip(*points, strict=True), line, color=COLOURS[number], marker=MARKERS[number], label=label)
        points = [(row["releases"], row["server"]) for row in rows if row["server"] is not None]
        if points:
            below.plot(*zip(*points, strict=True), color=COLOURS[3], marker="s", label=f"every round: {epsilon_text(points[-1][1])}")
            below.legend(**OUTSIDE)
            _scale(below, [value for _, value in points])
        else:
            where = {"transform": below.transAxes, "ha": "center", "va": "center"}
            below.text(0.5, 0.5, report["server"]["reason"], color="#666666", **where)
            below.set_yticks([])
        _scale(above, [value for row in rows for value in row["release"].values() if value is not None])
        target = report["target"]
        if target is not None:
            (above if target["adversary"] == "release" else below).axhline(target["epsilon"], color="#888888", linestyle=":", linewidth=1)
        unit, delta = report["release"]["unit"], delta_text(report["release"]["delta"])
        above.set_title(f"Release adversary: privacy of one {unit}, δ = {delta}, by accountant")
        below.set_title(f"Server adversary: {report['server']['relation']}, {report['server']['accountant']}")
        for axis in (above, below):
            axis.set_ylabel("ε spent so far")
        above.legend(**OUTSIDE)
        below.set_xlabel("releases so far (both stages, repeated attempts included)")
        if not report["private"]:
            figure.suptitle(f"not private: {why_text(report['why_not_private'])}", x=0.01, ha="left", color=WARNING)
        return _save(figure, path)


def _scale(axis, values: list[float]) -> None:
    if min(values) > 0 and max(values) / min(values) > LOG_FROM:
        axis.set_yscale("log")
        _plain_ticks(axis)
    else:
        axis.set_ylim(0, 1.15 * max(values) or 1)
