"""`fedllm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import JsonFlag, print_json, print_table, stdout_for_result


def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Folders of finished runs.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for table.md, table.json and the figures.")],
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Several runs side by side: table.md, table.json, and figures of accuracy, epsilon and bytes."""
    with stdout_for_result():
        from fedllm import compare as comparison

        table = comparison.compare(run_dirs, out)
    if as_json:
        print_json(table)
        return
    runs = comparison.load_runs(run_dirs)
    header, *body = comparison.rows(runs)
    print_table("", header, body, [*comparison.notes(runs), "files: " + ", ".join(table["files"])])
