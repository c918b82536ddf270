"""Users protected as whole users, or example by example with more noise: accuracy at the same epsilon for one user.

    python scripts/user_or_example.py [--epsilon E ...] [--report] [--again] [--json] [--quick]

About ten minutes for 12 runs; --quick: seconds, on a random model.

Movie reviews in the hands of ten clients whose users have MOST snippets each (the users are made here: snippets dealt out at random).
`user_level` clips a user's gradient and noises for one user. `example_level` clips each snippet's gradient; its noise is what PLD asks for
where a group of MOST snippets, each sampled on its own, has the target's epsilon (Ganesh 2024, theorem 3.1), so that both promise a user
the same (the question of arXiv 2407.07737). Both see as many snippets in a round, in expectation. Finished runs are kept, interrupted
ones continued, as in grid.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from grid import Runner
from grid_report import interval, markdown, summary

from fedllm.errors import UserError

MOST = 4  # snippets of a user
OUT = Path("runs/user-or-example")
DELTA = 1e-4
SETTINGS = {
    "config": "configs/classify_chain.yaml",
    "common": ["model.dtype=bfloat16", "task.eval_examples=1000", "task.monitor_examples=20", "task.max_length=40", "federation.clients=10",
               "federation.rounds=8", "federation.warm_start.steps=30", "federation.server.lr=0.02"],
    "rounds": 8, "rate": 0.0418, "seeds": [1, 2, 3],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[3.0, 1.0], help="for one user")
    parser.add_argument("--report", action="store_true", help="run nothing, read what is there")
    parser.add_argument("--again", action="store_true", help="do not take finished runs from results/, train them here")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="a random model of seconds, for a look at the steps")
    given = parser.parse_args()
    try:
        settings = tiny() if given.quick else SETTINGS | {"common": [*SETTINGS["common"], *dealt("movie-reviews", OUT, 1000)]}
        print(work(settings, given.epsilon, given))
    except UserError as error:
        sys.exit(f"user_or_example: {error}")


def work(settings: dict[str, Any], epsilons: list[float], given: argparse.Namespace) -> str:
    """Train what is missing; a table, or JSON."""
    kept = None if given.again or given.quick else Path("results/user_or_example")
    grid = {key: settings[key] for key in ("config", "seeds")} | {"out": str(settings.get("out", OUT)), "kept": kept, "variants": {}}
    grid["common"] = [*settings["common"], f"federation.unit_sampling_rate={settings['rate']}", f"privacy.target.delta={DELTA}"]
    promises = {}
    for epsilon in epsilons:
        noise, one = noise_for_user(epsilon, settings["rounds"], settings["rate"])
        user, example = f"user-level-eps{epsilon:g}", f"example-level-eps{epsilon:g}"
        grid["variants"][user] = ["method=user_level", "task.columns.user=user", f"privacy.target.epsilon={epsilon}"]
        grid["variants"][example] = ["method=example_level", f"privacy.target.epsilon={one}"]
        promises |= {user: {"user": epsilon, "example": None}, example: {"user": epsilon, "example": one, "noise_multiplier": noise}}
    runner = Runner(grid)
    if not given.report:
        for seed in grid["seeds"]:
            for name, overrides in grid["variants"].items():
                runner.run(name, overrides, seed)
    rows = [summary(grid, name, runner.read) | {"promise": promises[name]} for name in grid["variants"]]
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        one["difference"] = two["difference"] = None
        if one["seeds"] and one["seeds"] == two["seeds"]:
            two["difference"] = interval([100 * (b - a) for a, b in zip(one["accuracy"], two["accuracy"], strict=True)])
    if given.json:
        return json.dumps({"rows": rows, "snippets_of_a_user": MOST}, indent=2)
    told = "; ".join(
        f"{name}: noise multiplier {answer['noise_multiplier']:g}, "
        f"epsilon {answer['example']:.3f} for a snippet, {answer['user']:g} for a user"
        for name, answer in promises.items()
        if answer["example"] is not None
    )
    label = f"Bounds by PLD, add or remove, delta {DELTA:g}, against whoever sees the model; a user is {MOST} snippets"
    return f"{markdown(grid | {'reference': 'user-level, same epsilon of a user'}, rows)}\n\n{label}. {told}."


def noise_for_user(epsilon: float, rounds: int, rate: float, most: int = MOST) -> tuple[float, float]:
    """The least noise multiplier at which `most` examples at once have this epsilon, and the epsilon of one example at it.

    By PLD, add/remove; the second is rounded down, so that noise calibrated for it is no less. Raises UserError for impossible targets.
    """
    from fedllm.privacy import accountants
    from fedllm.privacy.calibration import calibrate
    from fedllm.privacy.events import PoissonGaussianEvent

    noise, _ = calibrate("pld", lambda z: [(PoissonGaussianEvent(z, rate, most), rounds)], epsilon, DELTA)
    one = accountants.create("pld").compose(PoissonGaussianEvent(noise, rate), rounds).epsilon(DELTA).epsilon
    return noise, math.floor(1e6 * one) / 1e6


def dealt(source: str, folder: Path, held_out: int) -> list[str]:
    """A source as two CSV files, its snippets dealt out to users of MOST each; overrides that name them."""
    from fedllm.data import sources

    data = sources.load(source, eval_examples=held_out)
    order = np.random.default_rng(0).permutation(len(data.train.texts))
    order = order[: len(order) // MOST * MOST]
    folder.mkdir(parents=True, exist_ok=True)
    for name, table, rows in (("train", data.train, order), ("test", data.test, range(len(data.test.texts)))):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["text", "label", "user"])
            lines.writerows([table.texts[row], table.label_names[table.labels[row]], f"user{i // MOST}"] for i, row in enumerate(rows))
    return [f"task.source={folder / 'train.csv'}", f"task.test={folder / 'test.csv'}"]


def tiny() -> dict[str, Any]:
    """The same on a tiny random model."""
    import tiny_model

    folder = OUT.with_name("user-or-example-quick")
    if not (folder / "config.yaml").exists():
        tiny_model.write(folder)
    common = ["federation.clients=4", *dealt(str(folder / "train.csv"), folder / "dealt", 40)]
    return {"config": str(folder / "config.yaml"), "common": common, "rounds": 2, "rate": 0.2, "seeds": [1], "out": folder / "runs"}


if __name__ == "__main__":
    main()
