"""The table of one run's results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedllm.compare import epsilon_meaning, overhead
from fedllm.formats import bytes_text, claim_meaning, claim_text, epsilon_text, percent_text, seconds_text, times_text, why_text

Row = tuple[str, str, str]

PHASE_NAMES = {
    "setup": "setup",
    "stage1": "stage 1",
    "local_training": "local training",
    "codec": "codec",
    "privacy": "privacy",
    "messages": "messages",
    "server": "server",
    "evaluation": "evaluation",
    "total": "total",
}


def result_rows(results: Mapping[str, Any]) -> list[Row | None]:
    """(quantity, value, what it means) of everything a user asks first; None between the sections."""
    sections = (_quality(results), _privacy(results), _traffic(results), _cost(results))
    rows: list[Row | None] = []
    for section in sections:
        rows += [None, *section] if rows else section
    return rows


def title(results: Mapping[str, Any]) -> str:
    """Method, model, task, clients and rounds in one line."""
    names = " · ".join(str(results[key]) for key in ("method", "model", "task"))
    cohort = f"{results['clients']:,} clients, {results['expected_cohort']:g} expected a round"
    return f"{names} · {cohort} · {results['rounds']} rounds" + (
        f" ({results['stopped']})" if results.get("stopped") else ""
    )


def _quality(results: Mapping[str, Any]) -> list[Row]:
    rows = []
    before, after = results["accuracy_before"], results["accuracy"]
    if after is not None:
        rows.append(("accuracy before", percent_text(before), "untrained model, held-out public examples"))
        if results.get("accuracy_start") is not None:
            rows.append(("after public text", percent_text(results["accuracy_start"]), "before the first round, at no privacy cost"))
        rows.append(("accuracy after", percent_text(after), f"{100 * (after - before):+.1f} points"))
    rows.append(("loss before", f"{results['loss_before']:.4f}", _perplexity(results["loss_before"], after)))
    if results.get("loss_start") is not None:
        rows.append(("after public text", f"{results['loss_start']:.4f}", _perplexity(results["loss_start"], after)))
    rows.append(("loss after", f"{results['loss']:.4f}", _perplexity(results["loss"], after)))
    return rows


def _perplexity(loss: float, accuracy: float | None) -> str:
    return f"perplexity {math.exp(min(loss, 700)):.3g}" if accuracy is None else ""


def _privacy(results: Mapping[str, Any]) -> list[Row]:
    epsilon = results["epsilon"]
    rows = []
    for adversary in ("release", "server"):
        answer = epsilon[adversary]
        meaning = epsilon_meaning(epsilon, adversary) if answer["epsilon"] is not None else answer["reason"]
        rows.append((f"ε, {adversary} adversary", epsilon_text(answer["epsilon"]), meaning))
    if epsilon.get("claimed") is not None:
        rows.append(("ε, claimed", claim_text(epsilon["claimed"]), claim_meaning(epsilon["claimed"])))
    if not epsilon["private"]:
        rows.append(("private", f"no: {why_text(epsilon['why_not_private'])}", "no epsilon of this run is a promise"))
    return rows


def _traffic(results: Mapping[str, Any]) -> list[Row]:
    numbers = f"{results['code_size'] or 0:,} of {results['parameters']:,} numbers"
    return [
        (
            "bytes up",
            bytes_text(results["uplink_bytes_per_client_round"]),
            f"per client and round, whole message, {numbers}",
        ),
        (
            "bytes down",
            bytes_text(results["downlink_bytes_per_client_round"]),
            "per client and round, the adapter, and the codec where its copy travels",
        ),
        ("raw update", bytes_text(results["update_bytes"]), "the same update as float32"),
        ("compression", times_text(results["compression_ratio"]), "raw update / message"),
        ("codec", bytes_text(results.get("codec_bytes")), "the server's copy; clients can fit their own: codec.fit_at"),
    ]


def _cost(results: Mapping[str, Any]) -> list[Row]:
    seconds = results["seconds"]
    rows = [(f"time, {PHASE_NAMES.get(phase, phase)}", seconds_text(spent), "") for phase, spent in seconds.items()]
    share = "codec, privacy, messages, server: " + percent_text(overhead(seconds)) + " of all but setup and evaluation"
    rows = [(name, value, share if name == "time, total" else note) for name, value, note in rows]
    return [*rows, ("peak memory", bytes_text(results["peak_memory_bytes"]), "")]
