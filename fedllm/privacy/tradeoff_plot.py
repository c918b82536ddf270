"""The figure of trade-off curves: type I against type II error, linear and with the small rates drawn out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedllm.plots import COLOURS, _figure, _save, _style
from fedllm.privacy.answers import ESTIMATE
from fedllm.privacy.tradeoff import TradeoffCurve

LOW_RATE = 0.01


def tradeoff_figure(curves: Sequence[TradeoffCurve], path: str | Path, title: str = "") -> Path:
    """Draw the curves as a PNG; estimates are dashed and called so. Returns `path`. Raises ValueError without curves."""
    if not curves:
        raise ValueError("Expected at least one trade-off curve")
    with _style():
        figure = _figure(9, 5)
        if title:
            figure.suptitle(title, fontsize=12, x=0.01, ha="left")
        whole, low = figure.subplots(1, 2)
        for number, curve in enumerate(curves):
            estimate = curve.kind == ESTIMATE
            look = {"color": COLOURS[number % len(COLOURS)], "linestyle": "--" if estimate else "-" if number < len(COLOURS) else "-."}
            side = "" if curve.direction in ("exact", "unknown") else f", true curve {_OTHER_SIDE[curve.direction]}"
            whole.plot(curve.alphas, curve.betas, label=f"{curve.name} ({curve.kind}{side})", **look)
            low.plot(curve.alphas[1:], curve.betas[1:], **look)
        for axis in (whole, low):
            axis.set_xlabel("type I error α (false positives)")
            axis.set_ylabel("type II error β (false negatives)")
            axis.set_ylim(0, 1)
        whole.plot([0, 1], [1, 0], color="#888888", linestyle=":", linewidth=1.2, label="perfect privacy")
        low.plot(curves[0].alphas[1:], [1 - alpha for alpha in curves[0].alphas[1:]], color="#888888", linestyle=":", linewidth=1.2)
        whole.set_xlim(0, 1)
        whole.set_title("All errors")
        low.set_xscale("log")
        low.set_xlim(1e-4, 1)
        low.axvline(LOW_RATE, color="#bbbbbb", linewidth=1)
        low.set_title("Small false-positive rates (line: 1 %)")
        figure.legend(loc="outside lower center", ncols=min(len(curves) + 1, 3))
        return _save(figure, path)


_OTHER_SIDE = {"lower": "above", "upper": "below"}
