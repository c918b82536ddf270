"""What a run shows while it runs: TensorBoard, a progress display on a terminal, plain lines elsewhere.

Only functions of public data and of noisy sums come here; nothing that tells a cohort's size or members.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from fedllm.formats import epsilon_text, percent_text, seconds_text

SCALARS = {
    "public/accuracy": "accuracy",
    "public/loss": "loss",
    "epsilon/release": "epsilon_release",
    "epsilon/server": "epsilon_server",
    "noise/to_signal": "noise_to_signal",
    "noise/aggregate_norm": "aggregate_norm",
    "noise/clip": "clip",
    "bytes/up": "uplink_bytes_per_client",
    "bytes/down": "downlink_bytes_per_client",
    "seconds/round": "seconds",
}
PLAIN_EVERY = 20.0  # seconds between two plain lines of one phase
PLOT_NAME = "rounds.png"

Advance = Callable[[int], None]
Phase = Callable[..., AbstractContextManager[Advance]]  # `Monitor.phase`: (text, total) -> context of advance(count)


class Monitor:
    """The one place that shows a run.

    run_dir: the run's folder; rounds: how many are planned; resume_at: rounds already done (what TensorBoard holds
    beyond is dropped); quiet: write TensorBoard only. Use it as a context manager, or call `close`.
    """

    def __init__(self, run_dir: str | Path, rounds: int, resume_at: int = 0, quiet: bool = False):
        self.run_dir = Path(run_dir)
        self._writer = _open_writer(self.run_dir / "tensorboard", resume_at)
        self._pace = _Pace(rounds, resume_at)
        self._display = Display() if quiet else open_display(rounds, resume_at)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def config(self, yaml_text: str) -> None:
        """Put the resolved config into TensorBoard as text."""
        indented = "\n".join("    " + line for line in yaml_text.splitlines())  # four spaces: Markdown's code block
        self._writer.add_text("config", indented, 0)

    @contextmanager
    def phase(self, text: str, total: int | None = None) -> Iterator[Advance]:
        """Show that `text` is going on; yields `advance(count)`, of which `total` are expected.

        Progress shows as a percentage: a count could tell a realised cohort's size.
        """
        with self._display.phase(text, total) as advance:
            yield advance

    def round(self, record: Mapping[str, Any]) -> None:
        """Write one round's record to TensorBoard and show it.

        record: see SCALARS for its keys, missing or None where there is no figure; `round` is the number of rounds
        done, 0 for the state before training; `epsilon_release_by`: the release's epsilon by other accountants than the quoted one.
        """
        for tag, key in SCALARS.items():
            if record.get(key) is not None:
                self._writer.add_scalar(tag, record[key], record["round"])
        for name, epsilon in record.get("epsilon_release_by", {}).items():
            if epsilon is not None:
                self._writer.add_scalar(f"epsilon/release_by_{name}", epsilon, record["round"])
        self._writer.flush()  # a killed run keeps what it showed
        self._pace.done(record["round"])
        self._display.round(record["round"], self._pace.rounds, describe(record), self._pace.left())

    def say(self, line: str) -> None:
        """Show one line."""
        self._display.say(line)

    def finish(self, results: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Path:
        """Draw the run's figure into the run folder and into TensorBoard; returns the PNG's path."""
        from matplotlib.image import imread

        from fedllm.plots import run_figure

        path = run_figure(history, results, self.run_dir / PLOT_NAME)
        step = max((record["round"] for record in history), default=0)
        self._writer.add_image("rounds", imread(path)[..., :3], step, dataformats="HWC")
        self._writer.flush()
        return path

    def close(self) -> None:
        """Stop the display and close TensorBoard's file; harmless when repeated."""
        self._display.close()
        self._writer.close()


def open_display(rounds: int | None = None, resume_at: int = 0) -> Display:
    """The display that fits standard error: bars on a terminal, plain lines elsewhere; `phase` serves without a run."""
    return _Bars(rounds, resume_at) if sys.stderr.isatty() else _Lines()


def describe(record: Mapping[str, Any]) -> str:
    """What a round's line says: accuracy, loss, epsilon so far."""
    parts = []
    if record.get("accuracy") is not None:
        parts.append(f"accuracy {percent_text(record['accuracy'])}")
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.3f}")
    for adversary in ("release", "server"):
        epsilon = record.get(f"epsilon_{adversary}")
        if epsilon is not None:
            parts.append(f"ε {epsilon_text(epsilon)} {adversary}")
    return ", ".join(parts)


class _Pace:
    """How long the rounds still take, by the mean of those that this process has done."""

    def __init__(self, rounds: int, resume_at: int):
        self.rounds = rounds
        self._at = resume_at
        self._since = time.monotonic()
        self._seen = 0
        self._spent = 0.0

    def done(self, at: int) -> None:
        now = time.monotonic()
        if at > self._at:
            self._seen += at - self._at
            self._spent += now - self._since
        self._at, self._since = at, now

    def left(self) -> str:
        if not self._seen or self._at >= self.rounds:
            return ""
        return f"about {seconds_text(self._spent / self._seen * (self.rounds - self._at))} left"


class Display:
    """Where a run is shown; this one shows nothing."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def phase(self, text: str, total: int | None = None) -> Iterator[Advance]:
        yield lambda count: None

    def round(self, done: int, rounds: int, text: str, left: str) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


class _Lines(Display):
    """Plain lines on standard error, for logs and pipes."""

    @contextmanager
    def phase(self, text: str, total: int | None = None) -> Iterator[Advance]:
        self.say(text)
        started = shown = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            now = time.monotonic()
            if total and now - shown >= PLAIN_EVERY and 0 < done < total:
                shown = now
                left = seconds_text((now - started) / done * (total - done))
                self.say(f"{text}: {100 * done // total} %, about {left} left")

        yield advance

    def round(self, done: int, rounds: int, text: str, left: str) -> None:
        self.say(f"round {done}/{rounds}: {text}" + (f", {left}" if left else ""))

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class _Bars(Display):
    """Progress bars on a terminal: one for the rounds, one for each phase that is going on."""

    def __init__(self, rounds: int | None, resume_at: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(markup=False),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
            transient=True,
        )
        if rounds is not None:
            start = f"round {resume_at}/{rounds}"
            self._rounds = self._progress.add_task(start, total=rounds, completed=resume_at, note="")
        self._progress.start()

    @contextmanager
    def phase(self, text: str, total: int | None = None) -> Iterator[Advance]:
        task = self._progress.add_task(f"  {text}", total=total, note="")
        started = time.monotonic()
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            left = ""
            if total and 0 < done < total:
                left = f"{seconds_text((time.monotonic() - started) / done * (total - done))} left"
            self._progress.update(task, advance=count, note=left)

        try:
            yield advance
        finally:
            self._progress.remove_task(task)

    def round(self, done: int, rounds: int, text: str, left: str) -> None:
        self.say(f"round {done}/{rounds}: {text}")
        self._progress.update(self._rounds, completed=done, description=f"round {done}/{rounds}", note=left)

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def _open_writer(folder: Path, resume_at: int):
    from torch.utils.tensorboard import SummaryWriter

    # A kill between a round's scalars and its checkpoint leaves scalars of a round that is done again: drop them.
    old = folder.is_dir() and any(folder.iterdir())
    return SummaryWriter(str(folder), purge_step=(resume_at + 1 if resume_at else 0) if old else None)
