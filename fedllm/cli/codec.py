"""`fedllm codec bench`: which codec keeps the signal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli.output import JsonFlag, print_json, print_table, stdout_for_result
from fedllm.errors import UserError
from fedllm.formats import bytes_text, percent_text, seconds_text, times_text

app = typer.Typer(no_args_is_help=False, help="Codecs on real client updates: a diagnostic, not private.")
PLOT_NAME = "codecs.png"
ERROR_NOTE = (
    "error: share of the signal's energy that the decoded mean code misses, clipped and noisy as in a run (codes without a sum: neither), "
    "times the best factor: an optimiser such as Adam does not mind the length"
)


@app.callback()
def codec() -> None:
    """Codecs on real client updates: a diagnostic, not private."""


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(help="A run's config: model, task, federation, target.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds that are trained and looked at.")] = 3,
    codecs: Annotated[str | None, typer.Option(help="Families, separated by commas; default: all.")] = None,
    priors: Annotated[str, typer.Option(help="Priors, separated by commas.")] = "public,public+released,moments",
    sizes: Annotated[str, typer.Option(help="Code sizes, separated by commas.")] = "32,64,128,256",
    others: Annotated[int | None, typer.Option(help="Clients for the oracle; default: twice the cohort.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for codecs.png.")] = Path("codec-bench"),
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Signal energy, error after noise, bytes and seconds of every codec x prior x size on real updates (not private)."""
    with stdout_for_result():
        from fedllm.bench.codecs import bench as run
        from fedllm.bench.plots import bench_figure
        from fedllm.config import load_config
        from fedllm.monitor import open_display

        chosen, numbers = _families(codecs), _sizes(sizes)
        if rounds < 1:
            raise UserError(f"--rounds {rounds}: expected a whole number >= 1")
        settings = load_config(config, overrides or [])
        with open_display() as display:
            found = run(
                settings, display.phase, rounds=rounds, families=chosen, prior_names=priors.split(","), sizes=numbers, others=others
            )
        try:
            out.mkdir(parents=True, exist_ok=True)
            found["plot"] = str(bench_figure(found, out / PLOT_NAME))
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}; expected a folder that can be written") from None
    if as_json:
        print_json(found)
        return
    header = ("codec", "prior", "numbers", "signal, oracle's", "for Adam", "of a mean, single", "error, for Adam", "message")
    header += ("stored, working", "fit", "en + decode")
    rows = [row for row in found["rows"] if row["encode_seconds"] is not None]
    failed = [f"{each['codec']}, {each['prior']}, {each['code_size']}: {each['reason']}" for each in found["failed"]]
    title = f"{found['model']} on {found['task']}, {found['rounds']} rounds ({found['why_not_private']})"
    print_table(title, header, [_cells(row) for row in rows], [ERROR_NOTE, *_oracle_note(rows), *failed, f"{found['plot']}"], (0, 1))


def _families(text: str | None) -> list[str] | None:
    if text is None:
        return None
    from dr_encoder.codecs import CODECS

    unknown = [name for name in text.split(",") if name not in CODECS]
    if unknown:
        raise UserError(f"--codecs {','.join(unknown)}: expected some of {', '.join(sorted(CODECS))}")
    return text.split(",")


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1:
        raise UserError(f"--sizes {text}: expected whole numbers >= 1, separated by commas")
    return sizes


def _oracle_note(rows: list[dict[str, Any]]) -> list[str]:
    """Where the oracle has fewer directions than a code has numbers: how many."""
    short = {row["oracle_size"] for row in rows if row["oracle_size"] is not None and row["oracle_size"] < row["code_size"]}
    return [f"oracle: {most} directions where a code has more numbers, one a client of --others" for most in short]


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["codec"],
        row["prior"],
        f"{row['code_size']:,} ({times_text(row['compression_ratio'])})",
        f"{percent_text(row['signal_energy'])}, {percent_text(row['oracle_signal_energy'])}",
        f"{percent_text(row['signal_energy_adam'])}, {percent_text(row['oracle_signal_energy_adam'])}",
        f"{percent_text(row['kept_energy_mean'])}, {percent_text(row['kept_energy_single'])}",
        ", ".join("-" if error is None else f"{error:.3f}" for error in (row["total_error"], row["total_error_adam"])),
        bytes_text(row["message_bytes"]),
        f"{bytes_text(row['memory_bytes'])}, {bytes_text(row['working_bytes'])}",
        seconds_text(row["fit_seconds"]),
        seconds_text(row["encode_seconds"] + row["decode_seconds"]),
    ]
