"""What `fedllm codec bench` draws: signal kept, and signal missed after clip and noise, against the length of the code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.plots import COLOURS, MARKERS, WARNING, _figure, _save, _style


def bench_figure(found: Mapping[str, Any], path: str | Path) -> Path:
    """Rate-distortion curves of every codec and prior, and their error after noise with its minimum marked. Returns `path`."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in found["rows"]:
        if row["code_size"] is not None and (row["signal_energy"], row["total_error"]) != (None, None):
            curves.setdefault(f"{row['codec']}, {row['prior']}", []).append(row)
    with _style():
        figure = _figure(11, 5.5)
        kept, error = figure.subplots(1, 2)
        for number, (name, rows) in enumerate(sorted(curves.items())):
            rows = sorted(rows, key=lambda row: row["code_size"])
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
                "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
            }
            energies = points(rows, "signal_energy")
            if energies[0]:
                kept.plot(*energies, label=name, **look)
            sizes, errors = points(rows, "total_error")  # of other clients' signal: where that is lost in sampling noise there is none
            if sizes:
                error.plot(sizes, errors, **look)
                least = errors.index(min(errors))
                error.plot(sizes[least], errors[least], marker="o", markersize=13, markerfacecolor="none", color=look["color"])
        known = {row["code_size"]: row["oracle_signal_energy"] for row in found["rows"] if row["oracle_signal_energy"] is not None}
        oracle = sorted(known.items())
        if oracle:
            most = max(row["oracle_size"] for row in found["rows"] if row["oracle_size"] is not None)
            label = f"oracle: PCA of other clients' updates, up to {most} directions"
            kept.plot(*zip(*oracle, strict=True), color="#888888", linestyle="-.", label=label)
        kept.set_ylabel("share of the signal's energy kept")
        kept.set_ylim(min(0, kept.get_ylim()[0]), 1.05)
        error.set_ylabel("signal's energy missed after clip and noise (ring: least)")
        for axis in (kept, error):
            if axis.lines:
                axis.set_xscale("log", base=2)
            axis.set_xlabel("numbers in the code")
        figure.suptitle(f"{found['model']} on {found['task']}: {found['why_not_private']}", x=0.01, ha="left", color=WARNING)
        if kept.lines:
            figure.legend(loc="outside lower center", ncols=3)
        return _save(figure, path)


def points(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Code sizes and values of a column, where there is one."""
    known = [row for row in rows if row[key] is not None]
    return [row["code_size"] for row in known], [row[key] for row in known]
