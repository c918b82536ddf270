"""`fedllm train` and `fedllm resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli.output import (
    JsonFlag,
    expect_run,
    interruptible,
    print_json,
    print_table,
    stdout_for_result,
    tensorboard_line,
)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Config keys to change: federation.rounds=20 seed=1."),
    ] = None,
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """One run: stage 1, then the rounds. Writes its folder, output_dir, and prints the result table."""
    from fedllm.config import load_config

    resolved = load_config(config, overrides or [])
    with interruptible(resolved.output_dir), stdout_for_result():
        from fedllm import run

        results = run.train(resolved)
    show(results, resolved.output_dir, as_json)


def resume(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of an interrupted run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of engine and parallel to change: parallel.mode=clients."),
    ] = None,
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Continue an interrupted run from its last round, within the same privacy target."""
    expect_run(run_dir)
    with interruptible(run_dir), stdout_for_result():
        from fedllm import run

        results = run.resume(run_dir, overrides or [])
    show(results, run_dir, as_json)


def show(results: dict[str, Any], run_dir: str | Path, as_json: bool) -> None:
    """Print a run's results: the JSON object, or the table, the plot's path and the line that starts TensorBoard."""
    if as_json:
        print_json(results)
        return
    from fedllm.cli.results import result_rows, title
    from fedllm.monitor import PLOT_NAME

    places = [f"plot: {Path(run_dir) / PLOT_NAME}", f"TensorBoard: {tensorboard_line(run_dir)}"]
    print_table(title(results), ("", "value", "meaning"), result_rows(results), places)
