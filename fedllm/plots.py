"""Figures of runs, as PNG files: accuracy and epsilon by round, and accuracy against bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.formats import delta_text, epsilon_text, why_text

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
WARNING = "#B00020"
LOG_FROM = 10  # epsilons further apart than this factor share a logarithmic axis


def run_figure(history: Sequence[Mapping[str, Any]], results: Mapping[str, Any], path: str | Path) -> Path:
    """Accuracy (loss, where there is no accuracy) and both adversaries' epsilon by round.

    history: the monitor's records in order; results: as in results.json. Returns `path`.
    """
    epsilons = [name for name in ("release", "server") if _points(history, f"epsilon_{name}")[1]]
    with _style():
        figure = _figure(8, 6.2 if epsilons else 3.9)
        axes = figure.subplots(2 if epsilons else 1, 1, sharex=True, squeeze=False)[:, 0]
        private = results["epsilon"]["private"]
        figure.suptitle(_headline(results), fontsize=12, x=0.01, ha="left", color=None if private else WARNING)
        _quality_panel(axes[0], history, results)
        if epsilons:
            _epsilon_panel(axes[1], history, results["epsilon"], epsilons)
        _round_axis(axes[-1], [history], 0.13)
        return _save(figure, path)


def rounds_figure(runs: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Accuracy and both adversaries' epsilon by round for several runs (name -> results.json). Returns `path`."""
    key, label = _quality(runs)
    with _style():
        figure = _figure(9, 6.8)
        axes = figure.subplot_mosaic([["quality", "quality"], ["release", "server"]])
        for number, ((name, results), colour, marker) in enumerate(_looks(runs)):
            under = len(runs) - 1 - number
            history = results["history"]
            x, y = _points(history, key)
            scale = 100 if key == "accuracy" else 1
            note = " (not private)" if not results["epsilon"]["private"] else ""
            axes["quality"].plot(x, [scale * value for value in y], color=colour, marker=marker, label=name + note)
            for adversary in ("release", "server"):
                x, y = _points(history, f"epsilon_{adversary}")
                axes[adversary].plot(x, y, color=colour, marker=marker, **_size(under))
        axes["quality"].set_ylabel(label)
        axes["quality"].set_title("After each round, monitoring sample of the held-out examples")
        for adversary in ("release", "server"):
            _comparison_epsilon(axes[adversary], adversary, runs)
        for axis in axes.values():
            _round_axis(axis, [results["history"] for results in runs.values()])
        figure.legend(loc="outside lower center", ncols=min(len(runs), 3))
        return _save(figure, path)


def bytes_figure(runs: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Final accuracy against the bytes a client sends in a round, one point a run. Returns `path`."""
    key, label = _quality(runs)
    scale = 100 if key == "accuracy" else 1
    with _style():
        figure = _figure(7.5, 4.6)
        axis = figure.subplots()
        for (name, results), colour, marker in _looks(runs):
            epsilon = results["epsilon"]["release"]["epsilon"]
            notes = ["no ε" if epsilon is None else f"ε {epsilon_text(epsilon)}"]
            notes += [] if results["epsilon"]["private"] else ["not private"]
            if results["uplink_bytes_per_client_round"] is None:  # the budget allowed no round
                continue
            axis.plot(
                results["uplink_bytes_per_client_round"],
                scale * results[key],
                color=colour,
                marker=marker,
                markersize=10,
                linestyle="none",
                label=f"{name} ({', '.join(notes)})",
            )
        before = sorted({round(scale * results[f"{key}_before"], 6) for results in runs.values()})
        for number, value in enumerate(before):
            label_once = None if number else "before training"
            axis.axhline(value, color="#888888", linestyle="--", linewidth=1, label=label_once)
        axis.set_xscale("log")
        _byte_ticks(axis)
        axis.margins(0.12)
        axis.set_xlabel("bytes a client sends in a round (whole message)")
        axis.set_ylabel(label)
        axis.set_title("After the last round, all held-out examples")
        figure.legend(loc="outside lower center", ncols=2)
        return _save(figure, path)


def _quality_panel(axis, history, results) -> None:
    key, label = _quality({"run": results})
    scale = 100 if key == "accuracy" else 1
    x, y = _points(history, key)
    y = [scale * value for value in y]
    axis.plot(x, y, color=COLOURS[0], marker="o", label="after each round, monitoring sample")
    last = max((record["round"] for record in history), default=0)
    start = results.get(f"{key}_start")  # after the warm start, where there was one: what the rounds began with
    ends = [(0, results.get(f"{key}_before") if start is None else start), (last, results.get(key))]
    ends = [(round_, scale * value) for round_, value in ends if value is not None]
    axis.plot(
        [end[0] for end in ends],
        [end[1] for end in ends],
        linestyle="none",
        marker="D",
        markersize=8,
        markerfacecolor="none",
        markeredgewidth=1.8,
        color=COLOURS[1],
        label="before and after, all held-out examples",
    )
    for round_, value in ends:
        text = f"{value:.1f}" if key == "accuracy" else f"{value:.3f}"
        _label(axis, text, (round_, value), COLOURS[1], "right" if round_ == 0 else "left")
    axis.set_ylabel(label)
    axis.margins(y=0.15)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def _epsilon_panel(axis, history, epsilon, adversaries) -> None:
    tops = []
    for adversary, colour, marker in zip(("release", "server"), COLOURS[2:], ("o", "s"), strict=False):
        answer = epsilon[adversary]
        if adversary not in adversaries:
            axis.plot([], [], color="none", label=f"{adversary}: {answer.get('reason') or 'no figure'}")
            continue
        x, y = _points(history, f"epsilon_{adversary}")
        tops.append(max(y))
        axis.plot(x, y, color=colour, marker=marker, label=f"{adversary}: {_meaning(answer)}")
        _label(axis, epsilon_text(y[-1]), (x[-1], y[-1]), colour, "left")
    if min(tops) > 0 and max(tops) / min(tops) > LOG_FROM:
        axis.set_yscale("log")
        _plain_ticks(axis)
        axis.margins(y=0.18)
    else:
        axis.set_ylim(0, 1.25 * max(tops) or 1)
    axis.set_ylabel("ε spent so far")
    axis.set_title(f"Privacy of one {epsilon['unit']}, δ = {delta_text(epsilon['delta'])}")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1, alignment="left")


def _comparison_epsilon(axis, adversary, runs) -> None:
    tops = [value for results in runs.values() for value in _points(results["history"], f"epsilon_{adversary}")[1]]
    ends = [results["epsilon"][adversary].get("epsilon") for results in runs.values()]
    ends = [end for end in ends if end]
    if not tops:
        where = {"transform": axis.transAxes, "ha": "center", "va": "center"}
        axis.text(0.5, 0.5, "no figure for these runs", color="#666666", **where)
        axis.set_yticks([])
    elif ends and max(ends) / min(ends) > LOG_FROM:
        axis.set_yscale("log")
        _plain_ticks(axis)
    else:
        axis.set_ylim(0, 1.1 * max(tops) or 1)
    units = {results["epsilon"]["unit"] for results in runs.values()}
    axis.set_title(f"Privacy of one {' or '.join(sorted(units))} against the {adversary} adversary", fontsize=10)
    axis.set_ylabel("ε spent so far")


def _label(axis, text: str, point: tuple[float, float], colour: str, side: str) -> None:
    style = {"color": colour, "fontweight": "bold", "ha": side, "va": "center"}
    axis.annotate(text, point, textcoords="offset points", xytext=(9 if side == "left" else -9, 0), **style)


def _size(under: int) -> dict[str, float]:
    """Wider the more lines come on top, so that equal lines all stay visible."""
    return {"linewidth": 1.8 + 1.5 * min(under, 4), "markersize": 5 + 3 * min(under, 4)}


def _meaning(answer: Mapping[str, Any]) -> str:
    return ", ".join(str(answer[key]) for key in ("relation", "accountant", "kind") if answer.get(key))


def _headline(results: Mapping[str, Any]) -> str:
    names = " · ".join(str(results[key]) for key in ("method", "model", "task") if isinstance(results.get(key), str))
    why = why_text(results["epsilon"].get("why_not_private"))
    return names if results["epsilon"]["private"] else f"{names}\nnot private: {why or 'no epsilon'}"


def _quality(runs: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Key and axis label: accuracy, or loss where some run has no accuracy."""
    if all(results.get("accuracy") is not None for results in runs.values()):
        return "accuracy", "accuracy (%)"
    return "loss", "loss (nats)"


def _points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    known = [(record["round"], record[key]) for record in history if record.get(key) is not None]
    return [round_ for round_, _ in known], [value for _, value in known]


def _looks(runs: Mapping[str, Mapping[str, Any]]) -> list:
    return [
        (item, COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)])
        for number, item in enumerate(runs.items())
    ]


def _round_axis(axis, histories, margin: float = 0.03) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max((record["round"] for history in histories for record in history), default=1)
    axis.set_xlim(-margin * last, (1 + margin) * last)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=15, integer=True))
    axis.set_xlabel("round")


def _plain_ticks(axis) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _byte_ticks(axis) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from fedllm.formats import bytes_text

    low, high = axis.get_xlim()
    if high / low < 100:  # a log axis without two decades in view would show a single tick
        axis.set_xlim(low / 3, high * 3)
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: bytes_text(value).replace(".00", "").replace(".0", ""))
    )
    axis.xaxis.set_minor_formatter(NullFormatter())


def _style():
    from matplotlib import rc_context

    return rc_context(STYLE)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(figure, path: str | Path) -> Path:
    # Drawn in memory first: a figure that fails leaves no half file behind.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path = Path(path)
    path.write_bytes(buffer.getvalue())
    return path
