"""A round's seconds on 1, 8 and 64 ranks with `parallel.mode: clients`, on paper: from bytes that `fedllm plan` counts and stated rates.

python scripts/scaling.py CONFIG [KEY=VALUE ...] --tokens-per-second T [--bandwidth B] [--serial S] [--examples E] [--ranks 1 8 64] [--json]

For R ranks, of which rank 0 alone does what is serial:

    seconds(R) = ceil(x / R) w / T + ceil(p / R) w / T + (R - 1) / R * (up + gradients) / B + (R > 1) (codec + adapter) / B + S
    x, p       private examples of an expected cohort, and public ones of a refit divided by the rounds that keep it; w tokens of a row
    T          tokens a second of one rank, forward and backward: measured or given
    up         messages gathered at rank 0; gradients: 4 n bytes of each public example, gathered there too
    codec, adapter    broadcast, once along a tree or ring of full bandwidth, so that the number of ranks does not count
    B          bytes a second into or out of one rank; latencies are left out
    S          seconds of rank 0 alone: codec fit, decode, noise, server step

The rank with most examples decides; those are taken to be shared out evenly, though real clients come whole.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from fedllm.config import load_config  # noqa: E402
from fedllm.errors import UserError  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Work:
    """One round. examples, public: texts; width: tokens of a text; the rest bytes: gathered at rank 0, and broadcast by it."""

    examples: float
    public: float
    width: int
    messages: float
    gradients: float
    codec: float
    adapter: float


def seconds(work: Work, ranks: int, tokens_per_second: float, bandwidth: float, serial: float) -> dict[str, float]:
    """Seconds of a round by part on `ranks` ranks, by the formula above."""
    local = math.ceil(work.examples / ranks) * work.width / tokens_per_second
    public = math.ceil(work.public / ranks) * work.width / tokens_per_second
    gathered = (ranks - 1) / ranks * (work.messages + work.gradients) / bandwidth
    broadcast = (work.codec + work.adapter) / bandwidth if ranks > 1 else 0.0
    parts = {"local_training": local, "public_gradients": public, "gathered": gathered, "broadcast": broadcast, "serial": serial}
    return parts | {"total": sum(parts.values())}


def work_of(config: Any, planned: dict[str, Any], examples: float) -> Work:
    """What a round is, from `fedllm plan`. examples: of one client."""
    from fedllm.plan import public_rows, refit_count

    share = refit_count(config) / config.federation.rounds
    public = public_rows(config) * share
    sizes, n = planned["bytes"], planned["update_size"]
    return Work(
        planned["expected_cohort"] * examples,
        public,
        config.task.max_length,
        sizes["up_per_round"],
        4 * n * public,
        sizes["codec"] * share,
        4 * n,
    )


@contextlib.contextmanager
def phase(text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """No display."""
    yield lambda count: None


def main() -> int:
    from fedllm.plan import Question, model_folder, plan

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--tokens-per-second", type=float, required=True, help="of one rank, forward and backward")
    parser.add_argument("--bandwidth", type=float, default=12.5e9, help="bytes a second of one rank (12.5e9: 100 Gbit/s)")
    parser.add_argument("--serial", type=float, default=0.0, help="seconds of rank 0 alone in a round")
    parser.add_argument("--examples", type=float, default=1.0, help="of one client in a round")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if min(given.tokens_per_second, given.bandwidth, given.examples, *given.ranks) <= 0 or given.serial < 0:
        parser.error("expected rates, examples and ranks above 0, and --serial of at least 0")
    try:
        config = load_config(given.config, given.overrides)
        planned = plan(config, Question(model_config=model_folder(config, given.config)), phase)
    except UserError as error:
        parser.error(str(error))
    work = work_of(config, planned, given.examples)
    rows = [
        {"ranks": ranks, **seconds(work, ranks, given.tokens_per_second, given.bandwidth, given.serial)} for ranks in given.ranks
    ]
    if given.json:
        print(json.dumps({"work": dataclasses.asdict(work), "rows": rows}, indent=2))
        return 0
    names = list(rows[0])
    print("| " + " | ".join(name.replace("_", " ") for name in names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{row[name]:.3g}" for name in names) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
