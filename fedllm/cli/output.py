"""What commands print: one JSON object or a table on standard output, all else on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from fedllm.errors import UserError

JsonFlag = typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")


def print_json(value: Any) -> None:
    """Print the one JSON object of `--json`."""
    print(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def print_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str] | None],
    notes: Sequence[str] = (),
    text: Sequence[int] = (0,),
) -> None:
    """Print a table on standard output; a row of None draws a line. Columns named in `text`, and 3 of 3, stand left."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in text else "right", overflow="fold")
    if len(header) == 3:
        table.columns[2].justify = "left"
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*(Text(cell, style="bold red" if cell.startswith("no: ") else "") for cell in row))
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width to fit: keep every row on one line
        console = Console(width=1000)
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def stdout_for_result() -> Iterator[None]:
    """Inside, whatever anything (child processes too) writes to standard output goes to standard error."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def interruptible(run_dir: str | Path) -> Iterator[None]:
    """Ctrl-C inside ends in one line that says how to go on, and exit status 1."""
    try:
        yield
    except KeyboardInterrupt:
        begun = (Path(run_dir) / "ledger.jsonl").exists()
        print(
            f"fedllm: interrupted; continue with: fedllm resume {run_dir}"
            if begun
            else "fedllm: interrupted before the run began; give the same command again",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None


def tensorboard_line(run_dir: str | Path) -> str:
    """The command that starts TensorBoard for a run, from this installation."""
    beside = Path(sys.executable).with_name("tensorboard")
    try:
        command = beside.relative_to(Path.cwd())
    except ValueError:
        command = beside
    return f"{command if beside.exists() else 'tensorboard'} --logdir {run_dir}"


def expect_run(run_dir: Path) -> None:
    """Raise UserError unless the folder holds a run."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: expected a run folder; there is no config.yaml")
