"""`fedllm privacy`: what releases cost. Starts without torch."""

from __future__ import annotations

import typer

from fedllm.cli.privacy import curves, questions, report

app = typer.Typer(no_args_is_help=False, help="What releases cost: every accountant, every answer labelled; reports from ledgers.")


@app.callback()
def privacy() -> None:
    """What releases cost: every accountant, every answer labelled; reports from ledgers."""


app.command()(questions.epsilon)
app.command()(questions.calibrate)
app.command()(curves.tradeoff)
app.command()(curves.variance)
app.command()(report.report)
