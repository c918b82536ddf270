"""What a grid's runs say together: mean, paired differences by seed, 95 % intervals; as Markdown, JSON and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grid_axes import reference_of
from scipy.special import stdtrit

from fedllm.formats import bytes_text, claim_text, epsilon_text

Read = Callable[[str, int], dict[str, Any] | None]
Row = dict[str, Any]


def summary(grid: dict[str, Any], name: str, read: Read) -> Row:
    """One variant over its seeds; differences are to the reference at the same seed, in points."""
    same = grid.get("stands_for", {})
    runs = {seed: results for seed in grid["seeds"] if (results := read(same.get(name, name), seed)) is not None}
    row: Row = {"variant": name, "seeds": sorted(runs)} | grid.get("cells", {}).get(name, {})
    if name in same:
        row["same_as"] = same[name]
    if not runs:
        return row
    first = next(iter(runs.values()))
    row |= {
        "method": row.get("method", first["method"]),
        "claimed": first["epsilon"].get("claimed"),
        "epsilon_release": first["epsilon"]["release"]["epsilon"],
        "epsilon_server": first["epsilon"]["server"]["epsilon"],
        "uplink_bytes_per_client_round": first["uplink_bytes_per_client_round"],
        "downlink_bytes_per_client_round": first["downlink_bytes_per_client_round"],
        "code_size": first["code_size"],
        "rounds": first["rounds"],
        "accuracy": [run["accuracy"] for run in runs.values()],
        "accuracy_before": first["accuracy_before"],
        "loss": [run["loss"] for run in runs.values()],
        "seconds": sum(run["seconds"]["total"] for run in runs.values()) / len(runs),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs.values()),
        "overhead": sum(overhead(run["seconds"]) for run in runs.values()) / len(runs),
        "gain": interval([100 * (run["accuracy"] - run["accuracy_before"]) for run in runs.values()]),
    }
    if "bench" in grid:
        row["total_error"] = total_error(grid, name, first["code_size"])
    reference = reference_of(grid, name)
    if reference and reference != name:
        others = {seed: read(same.get(reference, reference), seed) for seed in runs}
        paired = [100 * (runs[seed]["accuracy"] - other["accuracy"]) for seed, other in others.items() if other]
        row["difference"] = interval(paired) if paired else None
    return row


def total_error(grid: dict[str, Any], name: str, code_size: int | None) -> float | None:
    """What `codec bench` found for a variant's codec: the share of the signal that projection and noise lose; None for one not in it.

    `bench` of a grid: files with the `parts` that their chain has. Without privacy only codes that have no sum are in them without noise.
    """
    from dr_encoder.codecs import CODECS
    from fedllm.config import load_config

    config = load_config(grid["config"], [*grid.get("common", []), *grid["variants"][name]])
    codec = config.codec
    if not config.privacy.enabled and CODECS[codec.family].summable:
        return None
    wanted = (codec.family, codec.prior, code_size)
    for bench in grid["bench"]:
        if codec.family == "chain" and list(codec.parts) != bench["parts"]:
            continue
        for row in json.loads(Path(bench["file"]).read_text())["rows"]:
            if (row["codec"], row["prior"], row["code_size"]) == wanted and row["total_error"] is not None:
                return row["total_error"]
    return None


def overhead(seconds: dict[str, float]) -> float:
    """Share of codec, privacy, messages and server in all but set-up and evaluation."""
    ours = sum(seconds[phase] for phase in ("codec", "privacy", "messages", "server"))
    return ours / (seconds["total"] - seconds["setup"] - seconds["evaluation"])


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and the half width of its 95 % interval by Student's t over seeds (null for one seed)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": None}
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {"mean": mean, "half_width": float(stdtrit(len(values) - 1, 0.975)) * spread / math.sqrt(len(values))}


def markdown(grid: dict[str, Any], rows: list[Row]) -> str:
    """The table of the README; with axes first accuracy alone, tasks side by side, then everything."""
    if "cells" not in grid:
        return table(*plain_cells(rows, grid.get("reference")))
    reference = grid.get("reference")
    return f"{table(*side_by_side(grid, rows))}\n\n{table(*whole_cells(rows, reference))}"


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def side_by_side(grid: dict[str, Any], rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Mean accuracy, and the paired difference to the reference: a line for each method and budget, a column for each task."""
    tasks, reference = list(grid["axes"]["task"]), grid.get("reference")
    header = ["method", "budget", "claimed ε", "true release ε", *tasks]
    header += [f"tasks where behind {reference} (beyond the interval)"] if reference else []
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["budget"], row["method"]), {})[row["task"]] = row
    found = []
    for (budget, method), by_task in lines.items():
        done = [row for row in by_task.values() if row["seeds"]]
        if not done:
            continue
        known = [row["difference"] for row in done if row.get("difference")]
        behind = sum(found["mean"] < 0 for found in known)
        clearly = sum(found["mean"] < 0 and abs(found["mean"]) > (found["half_width"] or math.inf) for found in known)
        line = [method, budget, claim_text(done[0]["claimed"]), epsilon_text(done[0]["epsilon_release"])]
        line += [accuracy_cell(by_task[task]) if task in by_task else "" for task in tasks]
        found.append(line + ([f"{behind} of {len(done)} ({clearly})" if method != reference else ""] if reference else []))
    return header, sorted(found, key=lambda line: list(grid["axes"]["budget"]).index(line[1]))


def accuracy_cell(row: Row) -> str:
    if not row["seeds"]:
        return "not run"
    text = f"{100 * sum(row['accuracy']) / len(row['accuracy']):.1f}"
    return f"{text} ({with_interval(row['difference'])})" if row.get("difference") else text


def whole_cells(rows: list[Row], reference: str | None) -> tuple[list[str], list[list[str]]]:
    header = ["task", "method", "budget", "claimed ε", "release ε", "server ε", "accuracy, mean (each seed)"]
    header += [f"against {reference}, points", "loss", "bytes up", "bytes down", "seconds", "memory"]
    lines = []
    for row in rows:
        line = [row["task"], row["method"], row["budget"]]
        if not row["seeds"]:
            lines.append([*line, "not run"] + [""] * (len(header) - 4))
            continue
        accuracy, loss = (sum(row[key]) / len(row[key]) for key in ("accuracy", "loss"))
        lines.append(
            [
                *line,
                claim_text(row["claimed"]),
                epsilon_text(row["epsilon_release"]),
                epsilon_text(row["epsilon_server"]),
                f"{100 * accuracy:.2f} ({', '.join(f'{100 * value:.2f}' for value in row['accuracy'])})",
                with_interval(row.get("difference")),
                f"{loss:.3f}",
                f"{row['uplink_bytes_per_client_round']:,}",
                f"{row['downlink_bytes_per_client_round']:,}",
                f"as {row['same_as']}" if "same_as" in row else f"{row['seconds']:.0f}",
                bytes_text(row["peak_memory_bytes"]),
            ]
        )
    return header, lines


def plain_cells(rows: list[Row], reference: str | None) -> tuple[list[str], list[list[str]]]:
    header = ["run", "release ε", "accuracy, mean (each seed)", "gain over untrained, points", f"against {reference}, points"]
    header += ["loss", "bytes up", "share of time"]
    lines = []
    for row in rows:
        if not row["seeds"]:
            lines.append([row["variant"], "not run"] + [""] * (len(header) - 2))
            continue
        accuracy, loss = (sum(row[key]) / len(row[key]) for key in ("accuracy", "loss"))
        each = ", ".join(f"{100 * value:.2f}" for value in row["accuracy"])
        lines.append(
            [
                row["variant"],
                "none" if row["epsilon_release"] is None else f"{row['epsilon_release']:.3f}",
                f"{100 * accuracy:.2f} ({each})",
                with_interval(row["gain"]),
                with_interval(row.get("difference")),
                f"{loss:.3f}",
                f"{row['uplink_bytes_per_client_round']:,}",
                f"{100 * row['overhead']:.1f} %",
            ]
        )
    if reference is None:
        header, *lines = [line[:4] + line[5:] for line in [header, *lines]]
    more = {}
    if any(row.get("claimed") for row in rows):
        more |= {"claimed ε": lambda row: claim_text(row.get("claimed")), "server ε": lambda row: epsilon_text(row.get("epsilon_server"))}
    if any("total_error" in row for row in rows):
        more["total error"] = lambda row: "-" if row.get("total_error") is None else f"{row['total_error']:.2f}"
    return [*header, *more], [[*line, *(cell(row) for cell in more.values())] for line, row in zip(lines, rows, strict=True)]


def with_interval(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:+.2f}" + (f" ± {value['half_width']:.2f}" if value["half_width"] is not None else "")


def tuning_text(tuned: dict[str, Any]) -> str:
    """What was chosen for whom, and what it cost."""
    keys = [key for key in tuned["values"] if any(entry["key"] == key for entry in tuned["choices"].values())]
    values = [f"{value:g}" for value in sorted({value for key in keys for value in tuned["values"][key]})]
    lines = [
        [name, entry["key"], *(f"{entry['loss'][value]:.3f}" if value in entry["loss"] else "" for value in values), f"{entry['chosen']:g}"]
        for name, entry in tuned["choices"].items()
    ]
    cost = f"{' or '.join(keys)} by held-out loss on another task: {tuned['runs']} runs, {tuned['seconds']:.0f} s in all."
    return f"{table(['tuned', 'by', *values, 'chosen'], lines)}\n\n{cost}"


def write_report(grid: dict[str, Any], rows: list[Row], tuned: dict[str, Any] | None, out: Path) -> list[Path]:
    """table.md and table.json, and with axes accuracy.png; returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    text = markdown(grid, rows) + (f"\n\n{tuning_text(tuned)}" if tuned else "")
    (out / "table.md").write_text(text + "\n")
    (out / "table.json").write_text(json.dumps({"rows": rows, "tuned": tuned}, indent=1) + "\n")
    files = [out / "table.md", out / "table.json"]
    if "cells" in grid and any(row["seeds"] for row in rows):
        files += [accuracy_figure(grid, rows, out / "accuracy.png"), bytes_figure(grid, rows, out / "bytes.png")]
    return files


def accuracy_figure(grid: dict[str, Any], rows: list[Row], path: Path) -> Path:
    """A panel for each task: every method's accuracy, each seed a dot, by budget."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fedllm.plots import COLOURS, MARKERS, STYLE

    axes = grid["axes"]
    methods, budgets, tasks = (list(axes[name]) for name in ("method", "budget", "task"))
    with rc_context(STYLE):
        drawn = Figure(figsize=(3.2 * len(tasks) + 1.6, 0.42 * len(methods) + 1.6), dpi=130, layout="constrained")
        panels = drawn.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for panel, task in zip(panels, tasks, strict=True):
            for number, budget in enumerate(budgets):
                found = [row for row in rows if row["task"] == task and row["budget"] == budget and row["seeds"]]
                look = {"color": COLOURS[number % len(COLOURS)], "linestyle": "none"}
                place = [methods.index(row["method"]) + 0.16 * (number - (len(budgets) - 1) / 2) for row in found]
                mean = [100 * sum(row["accuracy"]) / len(row["accuracy"]) for row in found]
                panel.plot(mean, place, MARKERS[number % len(MARKERS)], label=budget, **look)
                for row, height in zip(found, place, strict=True):
                    panel.plot([100 * value for value in row["accuracy"]], [height] * len(row["accuracy"]), "|", alpha=0.6, **look)
            panel.set_title(task)
            panel.set_xlabel("held-out accuracy, %")
        panels[0].set_yticks(range(len(methods)), methods)
        panels[0].invert_yaxis()
        panels[-1].legend(loc="best")
        drawn.savefig(path, format="png")
    return path


def bytes_figure(grid: dict[str, Any], rows: list[Row], path: Path) -> Path:
    """Accuracy, averaged over tasks, against the bytes that a client sends in a round; a point for each method and budget."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fedllm.plots import COLOURS, MARKERS, STYLE

    methods, budgets = list(grid["axes"]["method"]), list(grid["axes"]["budget"])
    with rc_context(STYLE):
        drawn = Figure(figsize=(7.5, 4.6), dpi=130, layout="constrained")
        panel = drawn.subplots()
        for budget in budgets:
            for number, method in enumerate(methods):
                found = [row for row in rows if row["method"] == method and row["budget"] == budget and row["seeds"]]
                if len(found) < len(grid["axes"]["task"]):
                    continue  # a mean over other tasks than the others' would mislead
                mean = sum(sum(row["accuracy"]) / len(row["accuracy"]) for row in found) / len(found)
                up = found[0]["uplink_bytes_per_client_round"]
                look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[budgets.index(budget) % len(MARKERS)]}
                panel.plot(up, 100 * mean, linestyle="none", label=f"{method}, {budget}", **look)
        panel.set_xscale("log")
        panel.set_xlabel("bytes a client sends in a round")
        panel.set_ylabel("held-out accuracy, mean over tasks, %")
        if panel.lines:
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        drawn.savefig(path, format="png")
    return path
