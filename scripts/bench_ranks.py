"""Throughput of 2 ranks of one thread each (`parallel.mode: clients`) against one process of two threads: the same run, the same cores.

python scripts/bench_ranks.py [--cycles N] [--json] [--quick]      SmolLM2, about 20 minutes; --quick: a tiny random model, one cycle

Each cycle runs both, in turn first, with the same seed: the same cohorts, the same held-out examples. Ratios are taken round by round,
2 ranks over 1 process, below 1 where ranks are faster; the first round, with the public gradients and the codec's fit, stands apart. Their
median stands with the 95 % interval of order statistics. Time outside the model: codec, privacy, messages and server, as a share of all
but setup and evaluation, on rank 0; what it waits for the other rank counts as local training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tiny_model  # noqa: E402
from ranks import train  # noqa: E402

from fedllm.bench.measure import median_interval  # noqa: E402

CASES = {"1 process": (1, 2, []), "2 ranks": (2, 1, ["parallel.mode=clients"])}  # ranks, threads of each, config
COMMON = ["codec.refresh=0", "federation.rounds=6", "task.eval_examples=200", "task.monitor_examples=50"]
OUTSIDE = ("codec", "privacy", "messages", "server")


def rounds_of(results: dict[str, Any]) -> list[float]:
    """Seconds of each round."""
    return [record["seconds"] for record in results["history"][1:]]


def outside(results: dict[str, Any]) -> float:
    """The share of time that is spent outside the model."""
    seconds = results["seconds"]
    return sum(seconds[phase] for phase in OUTSIDE) / (seconds["total"] - seconds["setup"] - seconds["evaluation"])


def bench(config: Path, overrides: list[str], cycles: int, folder: Path) -> dict[str, Any]:
    """The whole answer."""
    taken: list[dict[str, dict[str, Any]]] = []
    for cycle in range(cycles):
        names = list(CASES)[:: 1 if cycle % 2 == 0 else -1]
        found = {}
        for name in names:
            ranks, threads, parts = CASES[name]
            place = folder / f"{name.replace(' ', '-')}-{cycle}"
            found[name] = train(config, place, ranks, threads, [*COMMON, *overrides, *parts, f"seed={cycle}"])
        taken.append(found)
        print(f"bench_ranks: cycle {cycle + 1} of {cycles}", file=sys.stderr, flush=True)
    pairs = [
        [two / one for two, one in zip(rounds_of(found["2 ranks"]), rounds_of(found["1 process"]), strict=True)] for found in taken
    ]
    rows = [
        {
            "case": name,
            "ranks": CASES[name][0],
            "threads": CASES[name][1],
            "round_seconds": statistics.median(seconds for found in taken for seconds in rounds_of(found[name])[1:]),
            "first_round_seconds": statistics.median(rounds_of(found[name])[0] for found in taken),
            "outside_model": statistics.median(outside(found[name]) for found in taken),
        }
        for name in CASES
    ]
    reference = taken[0]["1 process"]
    return {
        "rows": rows,
        "round_ratio": median_interval([ratio for cycle in pairs for ratio in cycle[1:]]),
        "first_round_ratio": median_interval([cycle[0] for cycle in pairs]),
        "model": reference["model"],
        "expected_cohort": reference["expected_cohort"],
        "rounds": reference["rounds"],
        "cycles": cycles,
        "cores": len(os.sched_getaffinity(0)),
    }


def table(answer: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{answer['model']}, cohort {answer['expected_cohort']:g}, {answer['rounds']} rounds, {answer['cycles']} cycles, "
        f"{answer['cores']} cores",
        "",
        "| | a round, s | first round, with public gradients and the codec, s | outside the model |",
        "|---|---:|---:|---:|",
    ]
    for row in answer["rows"]:
        name = f"{row['case']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''} each"
        lines.append(f"| {name} | {row['round_seconds']:.2f} | {row['first_round_seconds']:.2f} | {row['outside_model']:.1%} |")
    shown = ["{median:.3f} ({low:.3f} - {high:.3f})".format(**answer[key]) for key in ("round_ratio", "first_round_ratio")]
    return "\n".join([*lines, f"| 2 ranks / 1 process | {shown[0]} | {shown[1]} | |"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, one cycle: shows that all runs, measures nothing")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.quick:
            tiny_model.write(folder / "tiny")
            answer = bench(folder / "tiny" / "config.yaml", ["task.eval_examples=40", "task.monitor_examples=20"], 1, folder)
        else:
            answer = bench(ROOT / "configs" / "quickstart.yaml", [], given.cycles, folder)
    print(json.dumps(answer, indent=2) if given.json else table(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
