"""Run a grid of configs one after another, and say what came out: mean, paired differences by seed, 95 % intervals.

    python scripts/grid.py configs/grids/evidence.yaml [key=value ...] [--report] [--again] [--json] [--only NAME ...] [--out DIR]

A grid is a YAML file: `config` (a config file), `common` (overrides of every run), `seeds`, `out` (a folder), `reference` (a
variant, for the paired differences) and `variants` (name -> overrides); or, in the place of variants, `axes` and `tune`, see
`grid_axes.py`. Interrupted runs are resumed and finished ones kept: their results.json stands in `results/GRID/` as well, which the
repository carries, so that the tables of the README can be told again at once. `--report` only reads what is there; `--again` trains
everything anew; `--out` writes table.md, table.json and figures. `key=value` is for all runs, over whatever the grid says
(`model.dtype=float32` where a processor knows no bfloat16): another grid then, with a folder of its own, of which `results/` has nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grid_axes import Tuning, chosen, load_grid
from grid_report import markdown, summary, tuning_text, write_report

from fedllm.checkpoint import write_json
from fedllm.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, over the grid's own")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--report", action="store_true", help="run nothing, read what is there")
    parser.add_argument("--again", action="store_true", help="do not take finished runs from results/, train them here")
    parser.add_argument(
        "--only", nargs="+", metavar="VARIANT", default=[], help="run these only (variants or keys of axes): two processes can share a grid"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write table.md, table.json and figures there")
    arguments = parser.parse_args()
    try:
        work(arguments)
    except UserError as error:
        print(f"grid: {error}", file=sys.stderr)
        sys.exit(2)


def work(arguments: argparse.Namespace) -> None:
    """Train what is asked for, tell what is there."""
    grid = overridden(load_grid(arguments.grid), arguments.overrides)
    grid["kept"] = None if arguments.again or arguments.overrides else Path("results") / arguments.grid.stem
    runner = Runner(grid)
    names = chosen(grid, arguments.only)
    if not arguments.report:
        runner.run_all(names)
    rows = [summary(grid, name, runner.read) for name in grid["variants"]]
    tuned = runner.tuning.report() if runner.tuning.plan else None
    if arguments.json:
        print(json.dumps({"grid": arguments.grid.name, "rows": rows} | ({"tuned": tuned} if tuned else {}), indent=2))
    else:
        print(markdown(grid, rows) + (f"\n\n{tuning_text(tuned)}" if tuned else ""))
    if arguments.out:
        for file in write_report(grid, rows, tuned, arguments.out):
            print(f"written: {file}", file=sys.stderr)


def overridden(grid: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The grid with key=value for all its runs, which go to a folder of their own."""
    for override in overrides:
        if not re.fullmatch(r"[a-z0-9_.]+=.*", override, re.DOTALL) or override.split("=")[0] in ("seed", "output_dir"):
            raise UserError(f"{override}: expected key=value, but for seed and output_dir, which are the grid's")
    if not overrides:
        return grid
    return grid | {"overrides": overrides, "out": "-".join([grid["out"], *(re.sub(r"[^\w.=]+", "_", each) for each in overrides)])}


class Runner:
    """Trains what is not finished; the untrained model is evaluated once for each model and task."""

    def __init__(self, grid: dict[str, Any]):
        self.grid = grid
        self.known: dict[str, Any] = {}
        self.tuning = Tuning(grid, self.run, self.read)

    def run_all(self, names: list[str]) -> None:
        """Tuning first, then every variant, one seed after another, so that a grid which is cut has whole seeds."""
        choices = {name: self.tuning.choose(name, train=True) for name in names}
        if self.tuning.plan:
            tuned = self.tuning.write()
            where = f"{self.grid['out']}/tuned.json"
            print(f"grid: tuning took {tuned['runs']} runs, {tuned['seconds']:.0f} s; choices in {where}", file=sys.stderr)
        for seed in self.grid["seeds"]:
            for number, name in enumerate(names):
                print(f"grid: seed {seed}, {number + 1} of {len(names)}: {name}", file=sys.stderr, flush=True)
                settings = [*self.grid["variants"][name], *choices[name]]
                twin = self.tuning.twin(settings, seed)
                if twin is not None and (results := self.read(twin, seed)) is not None:
                    self.take_over(name, seed, results)
                else:
                    self.run(name, settings, seed)

    def run(self, name: str, overrides: list[str], seed: int) -> dict[str, Any] | None:
        """Results of one run: kept, taken up or trained; None for one that ended early, which is said."""
        from fedllm.config import load_config
        from fedllm.errors import RunStopped
        from fedllm.run import resume, train
        from fedllm.training.engine import Evaluation

        where = self.folder(name, seed)
        own = [*self.grid.get("common", []), *overrides, *self.grid.get("overrides", [])]
        settings = [*own, f"seed={seed}", f"output_dir={where}"]
        config = load_config(self.grid["config"], settings)
        model = untrained(config)
        with self.turn(where):
            results = self.read(name, seed)
            try:
                if results is None and (where / "ledger.jsonl").exists():
                    results = resume(where)
                elif results is None:
                    print(f"grid: {where}", file=sys.stderr, flush=True)
                    results = train(config, self.known.get(model))
            except RunStopped as stopped:
                print(f"grid: {where}: {stopped}", file=sys.stderr, flush=True)
                return None
            self.keep(name, seed, results)
        self.known[model] = Evaluation(results["loss_before"], results["accuracy_before"])
        return results

    @contextlib.contextmanager
    def turn(self, where: Path) -> Iterator[None]:
        """Two processes share a grid: what several variants need is trained by one of them, and the other waits for it here."""
        where.parent.mkdir(parents=True, exist_ok=True)
        with open(where.parent / f".{where.name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"grid: {where}: in the hands of another process, waiting for it", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def folder(self, name: str, seed: int) -> Path:
        return Path(self.grid["out"]) / f"{name}-seed{seed}"

    def kept_file(self, name: str, seed: int) -> Path | None:
        return None if self.grid["kept"] is None else self.grid["kept"] / f"{name}-seed{seed}.json"

    def keep(self, name: str, seed: int, results: dict[str, Any]) -> None:
        """Put a finished run's results where the repository carries them."""
        path = self.kept_file(name, seed)
        if path is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, results)

    def take_over(self, name: str, seed: int, results: dict[str, Any]) -> None:
        """The results of a run that was trained under another name, under this one too."""
        where = self.folder(name, seed)
        where.mkdir(parents=True, exist_ok=True)
        with self.turn(where):
            write_json(where / "results.json", results)
            self.keep(name, seed, results)

    def read(self, name: str, seed: int) -> dict[str, Any] | None:
        """A finished run's results, from its folder or from what the repository carries."""
        for path in (self.folder(name, seed) / "results.json", self.kept_file(name, seed)):
            if path is not None and path.exists():
                return json.loads(path.read_text())
        return None


def untrained(config: Any) -> str:
    """What an evaluation of the untrained model depends on: model, task and adapter; the seed where a head starts at random."""
    parts = [dataclasses.asdict(part) for part in (config.model, config.task, config.lora)]
    return json.dumps([*parts, config.seed if config.task.kind == "classify" else None], sort_keys=True)


if __name__ == "__main__":
    main()
