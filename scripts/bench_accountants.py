"""Accountants side by side, in one process and interleaved: what each answers to one question, and in what time.

    python scripts/bench_accountants.py [--json] [--noise-multiplier 0.8 --sampling-rate 0.01 --steps 10000 --delta 1e-5]

Every question is asked `--repeats` times in turn and the best time of each is kept, with caches of ours emptied before
(cold) or not (warm); imports are not counted. `ratio` is the time over that of the first row of the same block. Libraries
beside dp-accounting come with `pip install -c constraints.txt -e '.[bench]'`; those not installed are named and left out.
"""

import argparse
import functools
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import dp_accounting
from dp_accounting.pld import PLDAccountant

from fedllm.privacy import accountants
from fedllm.privacy.calibration import calibrate
from fedllm.privacy.events import Event, GaussianEvent, PoissonGaussianEvent

TOLERANCE = 1e-3  # relative, of a calibrated noise multiplier


@dataclass(frozen=True)
class Question:
    """Poisson-sampled Gaussian sums, add or remove one, and what a calibration aims at."""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    delta: float
    epsilon: float

    def event(self, noise_multiplier: float | None = None) -> dp_accounting.DpEvent:
        """The same as an event of dp-accounting."""
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier or self.noise_multiplier)
        return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(self.sampling_rate, gaussian), self.steps)


@dataclass(frozen=True)
class Row:
    """One line of the table. answer: an epsilon, or a noise multiplier where `what` calibrates. seconds: the best time.
    ratio: over the block's first row. direction: upper | lower | exact | unknown, bound or estimate."""

    what: str
    answer: float | None
    seconds: float
    ratio: float
    direction: str


Contestant = tuple[str, Callable[[], tuple[float | None, str]]]


def forget() -> None:
    """Empty every cache of the project's accountants."""
    for module in pkgutil.iter_modules(accountants.__path__, "fedllm.privacy.accountants."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


def ours(name: str, question: Question, cold: bool) -> Callable[[], tuple[float | None, str]]:
    """An accountant of the registry."""
    event: Event = PoissonGaussianEvent(question.noise_multiplier, question.sampling_rate)
    if not accountants.create(name).supports(event):
        event = GaussianEvent(question.noise_multiplier)

    def ask() -> tuple[float | None, str]:
        if cold:
            forget()
        answer = accountants.create(name).compose(event, question.steps).epsilon(question.delta)
        unsampled = ", nothing sampled" if isinstance(event, GaussianEvent) else ""
        return answer.epsilon, f"{answer.direction} {answer.kind}{unsampled}"

    return ask


def dp_pld(question: Question) -> tuple[float, str]:
    return PLDAccountant().compose(question.event()).get_epsilon(question.delta), "upper bound"


def dp_calibrate(question: Question) -> tuple[float, str]:
    """To the tolerance, absolute as dp-accounting wants it."""
    root = dp_accounting.calibrate_dp_mechanism(
        PLDAccountant, question.event, question.epsilon, question.delta, tol=TOLERANCE * calibrated(question)[0]
    )
    return root, "upper bound"


@functools.cache
def calibrated(question: Question) -> tuple[float, str]:
    """Ours, once: the scale of dp-accounting's absolute tolerance."""
    return our_calibrate(question)


def our_calibrate(question: Question) -> tuple[float, str]:
    forget()

    def compose(z: float) -> list[tuple[Event, int]]:
        return [(PoissonGaussianEvent(z, question.sampling_rate), question.steps)]

    return calibrate("pld", compose, question.epsilon, question.delta)[0], "upper bound"


def opacus(question: Question) -> list[Contestant]:
    """Opacus' three accountants; the epsilon of its PRV is an upper bound by its own error estimate."""
    from opacus.accountants import create_accountant

    def ask(mechanism: str) -> tuple[float, str]:
        accountant = create_accountant(mechanism)
        accountant.history = [(question.noise_multiplier, question.sampling_rate, question.steps)]
        direction = "unknown estimate" if mechanism == "gdp" else "upper bound"
        return float(accountant.get_epsilon(question.delta)), direction

    return [(f"opacus {name}", functools.partial(ask, name)) for name in ("rdp", "prv", "gdp")]


def prv_accountant(question: Question) -> list[Contestant]:
    """Microsoft's accountant, with an error of 0.01 in epsilon as in its examples."""
    from prv_accountant.dpsgd import DPSGDAccountant

    def ask() -> tuple[float, str]:
        accountant = DPSGDAccountant(
            noise_multiplier=question.noise_multiplier,
            sampling_probability=question.sampling_rate,
            max_steps=question.steps,
            eps_error=0.01,
            delta_error=question.delta / 1000,
        )
        return float(accountant.compute_epsilon(delta=question.delta, num_steps=question.steps)[2]), "upper bound"

    return [("prv-accountant", ask)]


def race(contestants: list[Contestant], repeats: int) -> list[Row]:
    """All contestants in turn, `repeats` times."""
    best: dict[str, float] = {}
    answers: dict[str, tuple[float | None, str]] = {}
    for turn in range(repeats):
        for what, ask in contestants:
            print(f"turn {turn + 1}/{repeats}: {what}", file=sys.stderr)
            start = time.perf_counter()
            try:
                answers[what] = ask()
            except Exception as error:  # of a library under test: a row of the table, not the end of it
                answers[what] = None, f"failed: {type(error).__name__}"
            best[what] = min(best.get(what, float("inf")), time.perf_counter() - start)
    first = best[contestants[0][0]]
    return [Row(what, *answers[what][:1], best[what], best[what] / first, answers[what][1]) for what, _ in contestants]


def epsilon_contestants(question: Question) -> list[Contestant]:
    found: list[Contestant] = [("dp-accounting pld", functools.partial(dp_pld, question))]
    for name in ("pld", "pld_optimistic", "rdp", "rdp_classic", "gdp", "edgeworth_1", "edgeworth_2", "edgeworth_3"):
        if name not in accountants.names():
            print(f"not registered: {name}", file=sys.stderr)
            continue
        found.append((f"{name}, cold", ours(name, question, cold=True)))
        found.append((f"{name}, warm", ours(name, question, cold=False)))
    for package, make in (("opacus", opacus), ("prv_accountant", prv_accountant)):
        try:
            found += make(question)
        except ImportError:
            print(f"not installed, left out: {package}", file=sys.stderr)
    return found


def markdown(rows: list[Row]) -> str:
    lines = ["| what | answer | seconds | ratio | direction |", "|---|---|---|---|---|"]
    for row in rows:
        answer = "-" if row.answer is None else f"{row.answer:.6g}"
        lines.append(f"| {row.what} | {answer} | {row.seconds:.4f} | {row.ratio:.3f} | {row.direction} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise-multiplier", type=float, default=0.8)
    parser.add_argument("--sampling-rate", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--epsilon", type=float, default=3.0, help="target of the calibration")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    given = parser.parse_args()
    question = Question(given.noise_multiplier, given.sampling_rate, given.steps, given.delta, given.epsilon)
    blocks = {
        "epsilon": race(epsilon_contestants(question), given.repeats),
        "calibrate": race(
            [
                ("dp-accounting calibrate", functools.partial(dp_calibrate, question)),
                ("calibrate, cold", functools.partial(our_calibrate, question)),
            ],
            given.repeats,
        ),
    }
    if given.json:
        print(json.dumps({"question": asdict(question), **{name: [asdict(row) for row in rows] for name, rows in blocks.items()}}))
        return
    for name, rows in blocks.items():
        print(f"\n{name}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
