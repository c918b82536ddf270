"""The `fedllm` command. Heavy imports happen inside the commands, so that `fedllm --help` answers at once."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import typer

from fedllm import ranks
from fedllm.cli import codec, compare, evaluate, plan, privacy, train
from fedllm.errors import RunStopped, UserError

app = typer.Typer(
    name="fedllm",
    help="Federated private fine-tuning of language models with short noisy codes.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train.train)
app.command()(train.resume)
app.command()(plan.plan)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.add_typer(privacy.app, name="privacy")
app.add_typer(codec.app, name="codec")

DEBUG = "FEDLLM_DEBUG"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong use or bad config."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sys.exit(ranks.among(lambda: run(arguments), _worker, _fail) if ranks.launched() else run(arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status. Every failure is one line on standard error."""
    command = typer.main.get_command(app)
    try:
        status = command(args=list(arguments) or ["--help"], prog_name="fedllm", standalone_mode=False)
    except typer.TyperException as error:  # wrong use: an unknown command or option, a missing argument
        return _fail(f"{error.format_message()} (see fedllm --help)", error.exit_code)
    except UserError as error:
        return _fail(str(error), 2)
    except (RunStopped, typer.Abort) as error:
        return _fail(str(error) or "aborted", 1)
    except BrokenPipeError:  # `fedllm ... | head`: nobody reads on, which is no error to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return _fail(f"no space left on the disk{_where(error)}: free some and run the command again", 2)
        what = " ".join(str(error).split()) or "no message"
        return _fail(f"{type(error).__name__}: {what} (a bug or a broken installation; {DEBUG}=1 shows where)", 1)
    if status == 130:  # typer's own answer to Ctrl-C
        return _fail("interrupted", 1)
    return status if isinstance(status, int) else 0


def _fail(line: str, status: int) -> int:
    print("fedllm: error: " + " ".join(line.split()), file=sys.stderr)
    return status


def _worker(team: ranks.Team):
    from fedllm.parallel.worker import Worker

    return Worker(team)


def _where(error: OSError) -> str:
    return f" ({error.filename})" if error.filename else ""
