"""`fedllm evaluate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli.output import JsonFlag, expect_run, print_json, print_table, stdout_for_result
from fedllm.errors import UserError
from fedllm.formats import percent_text


def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a finished run.")],
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas, such as mmlu,ceval-valid.")] = None,
    task_files: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files of your own.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before each question; default: what the task says.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task; default: all.")] = None,
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Held-out loss and accuracy again, from the saved adapter; with --tasks question benchmarks before and after it, by subject."""
    expect_run(run_dir)
    if tasks is not None:
        found = ask(run_dir, tasks, task_files, shots, limit)
        title, header, table = f"{run_dir}: before and after the adapter", ("task", "questions", "before", "after"), task_rows(found)
    elif (task_files, shots, limit) != (None, None, None):
        raise UserError("--task-files, --shots, --limit: expected --tasks with them")
    else:
        found = held_out(run_dir)
        title, header, table = f"{run_dir}: {found['examples']:,} held-out examples", ("", "now", "in results.json"), rows(found)
    if as_json:
        print_json(found)
    else:
        print_table(title, header, table)


def held_out(run_dir: Path) -> dict[str, Any]:
    """Loss and accuracy on the run's own held-out examples."""
    with stdout_for_result():
        from fedllm.evaluation import evaluate_run
        from fedllm.monitor import open_display

        with open_display() as display:
            return evaluate_run(run_dir, display.phase)


def ask(run_dir: Path, tasks: str, files: Path | None, shots: int | None, limit: int | None) -> dict[str, Any]:
    """Question benchmarks before and after the adapter."""
    from fedllm.harness import evaluate_tasks, expect_lm_eval

    expect_lm_eval()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError(f"--tasks {tasks!r}: expected names, separated by commas")
    if files is not None and not files.is_dir():
        raise UserError(f"--task-files {files}: no such folder")
    for flag, value, least in (("shots", shots, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: expected a whole number >= {least}")
    with stdout_for_result():
        from fedllm.monitor import open_display

        with open_display() as display:
            return evaluate_tasks(run_dir, names, display.phase, files=files, shots=shots, limit=limit)


def task_rows(found: dict[str, Any]) -> list[tuple[str, ...] | None]:
    """Subjects, then the groups they make up."""

    def row(one: dict[str, Any]) -> tuple[str, ...]:
        share = one["metric"].startswith(("acc", "exact_match"))
        shown = (percent_text(one[key], 1) if share else f"{one[key]:.4g}" for key in ("before", "after"))
        return (one.get("subject", one["task"]), f"{one['questions'] or 0:,}", *shown)

    return [*map(row, found["subjects"]), *([None] if found["groups"] else []), *map(row, found["groups"])]


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
