"""`fedllm evaluate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli.output import JsonFlag, expect_run, print_json, print_table, stdout_for_result
from fedllm.formats import percent_text


def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run.")],
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Held-out loss and accuracy again, from the saved adapter, beside what the run wrote down."""
    expect_run(run_dir)
    with stdout_for_result():
        from fedllm.evaluation import evaluate_run
        from fedllm.monitor import open_display

        with open_display() as display:
            found = evaluate_run(run_dir, display.phase)
    if as_json:
        print_json(found)
    else:
        print_table(f"{run_dir}: {found['examples']:,} held-out examples", ("", "now", "in results.json"), rows(found))


def rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Accuracy where there is one, loss, and perplexity where there is no accuracy."""
    losses = [found["loss"], found["loss_saved"]]
    table = [("loss", *(_number(loss) for loss in losses))]
    if found["accuracy"] is None:
        table.append(("perplexity", *("-" if loss is None else f"{math.exp(min(loss, 700)):.4g}" for loss in losses)))
        return table
    return [("accuracy", *(percent_text(found[key], 2) for key in ("accuracy", "accuracy_saved"))), *table]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"
