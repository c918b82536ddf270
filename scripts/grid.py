"""Run a grid of configs one after another, and say what came out: mean, paired differences by seed, 95 % intervals.

    python scripts/grid.py configs/grids/evidence.yaml [--report] [--again] [--json]

A grid is a YAML file: `config` (a config file), `common` (overrides of every run), `seeds`, `out` (a folder), `reference` (a
variant, for the paired differences) and `variants` (name -> overrides). Interrupted runs are resumed
and finished ones kept: their results.json stands in `results/GRID/` as well, which the repository carries, so that the tables of the
README can be told again at once. `--report` only reads what is there; `--again` trains everything anew.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t as student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--report", action="store_true", help="run nothing, read what is there")
    parser.add_argument("--again", action="store_true", help="do not take finished runs from results/, train them here")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these only: two processes can share a grid")
    arguments = parser.parse_args()
    grid = yaml.safe_load(arguments.grid.read_text())
    grid["kept"] = None if arguments.again else Path("results") / arguments.grid.stem
    if not arguments.report:
        run_all(grid, arguments.only or list(grid["variants"]))
    rows = [summary(grid, name) for name in grid["variants"]]
    if arguments.json:
        print(json.dumps({"grid": arguments.grid.name, "rows": rows}, indent=2))
    else:
        print(markdown(rows, grid.get("reference")))


def folder(grid: dict[str, Any], name: str, seed: int) -> Path:
    return Path(grid["out"]) / f"{name}-seed{seed}"


def run_all(grid: dict[str, Any], names: list[str]) -> None:
    """Train what is not finished; the untrained model is evaluated once for each model and task."""
    from fedllm.config import load_config
    from fedllm.run import resume, train
    from fedllm.training.engine import Evaluation

    known: dict[str, Evaluation] = {}
    for seed in grid["seeds"]:
        for name in names:
            overrides = grid["variants"][name]
            where = folder(grid, name, seed)
            results = read(grid, name, seed)
            if results is not None:
                pass
            elif (where / "ledger.jsonl").exists():
                results = resume(where)
            else:
                settings = [*grid.get("common", []), *overrides, f"seed={seed}", f"output_dir={where}"]
                config = load_config(grid["config"], settings)
                print(f"grid: {where}", file=sys.stderr, flush=True)
                results = train(config, known.get(task_of(grid, overrides)))
            keep(grid, name, seed, results)
            known[task_of(grid, overrides)] = Evaluation(results["loss_before"], results["accuracy_before"])


def kept_file(grid: dict[str, Any], name: str, seed: int) -> Path | None:
    return None if grid["kept"] is None else grid["kept"] / f"{name}-seed{seed}.json"


def keep(grid: dict[str, Any], name: str, seed: int, results: dict[str, Any]) -> None:
    """Put a finished run's results where the repository carries them."""
    path = kept_file(grid, name, seed)
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def task_of(grid: dict[str, Any], overrides: list[str]) -> str:
    """What an evaluation of the untrained model depends on: overrides of model and task."""
    return json.dumps([item for item in [*grid.get("common", []), *overrides] if item.startswith(("model.", "task."))])


def summary(grid: dict[str, Any], name: str) -> dict[str, Any]:
    """One variant over its seeds; differences are to the reference at the same seed, in points."""
    runs = {seed: results for seed in grid["seeds"] if (results := read(grid, name, seed)) is not None}
    row: dict[str, Any] = {"variant": name, "seeds": sorted(runs)}
    if not runs:
        return row
    first = next(iter(runs.values()))
    row |= {
        "method": first["method"],
        "epsilon_release": first["epsilon"]["release"]["epsilon"],
        "epsilon_server": first["epsilon"]["server"]["epsilon"],
        "uplink_bytes_per_client_round": first["uplink_bytes_per_client_round"],
        "code_size": first["code_size"],
        "rounds": first["rounds"],
        "accuracy": [run["accuracy"] for run in runs.values()],
        "accuracy_before": first["accuracy_before"],
        "loss": [run["loss"] for run in runs.values()],
        "seconds": sum(run["seconds"]["total"] for run in runs.values()) / len(runs),
        "overhead": sum(overhead(run["seconds"]) for run in runs.values()) / len(runs),
        "gain": interval([100 * (run["accuracy"] - run["accuracy_before"]) for run in runs.values()]),
    }
    reference = grid.get("reference")
    if reference and reference != name:
        others = {seed: read(grid, reference, seed) for seed in runs}
        row["difference"] = interval([100 * (runs[seed]["accuracy"] - other["accuracy"]) for seed, other in others.items() if other])
    return row


def overhead(seconds: dict[str, float]) -> float:
    """Share of codec, privacy, messages and server in all but set-up and evaluation."""
    ours = sum(seconds[phase] for phase in ("codec", "privacy", "messages", "server"))
    return ours / (seconds["total"] - seconds["setup"] - seconds["evaluation"])


def read(grid: dict[str, Any], name: str, seed: int) -> dict[str, Any] | None:
    """A finished run's results, from its folder or from what the repository carries."""
    for path in (folder(grid, name, seed) / "results.json", kept_file(grid, name, seed)):
        if path is not None and path.exists():
            return json.loads(path.read_text())
    return None


def interval(values: list[float]) -> dict[str, Any]:
    """Mean and the half width of its 95 % interval by Student's t over seeds (null for one seed)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return {"mean": mean, "half_width": None}
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {"mean": mean, "half_width": float(student.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))}


def markdown(rows: list[dict[str, Any]], reference: str | None) -> str:
    """The table of the README."""
    columns = ["run", "release ε", "accuracy, mean (each seed)", "gain over untrained, points", f"against {reference}, points"]
    columns += ["loss", "bytes up", "share of time"]
    cells = [columns, ["---"] * len(columns)]
    for row in rows:
        if not row["seeds"]:
            cells.append([row["variant"], "not run"] + [""] * (len(columns) - 2))
            continue
        accuracy, loss = (sum(row[key]) / len(row[key]) for key in ("accuracy", "loss"))
        each = ", ".join(f"{100 * value:.2f}" for value in row["accuracy"])
        cells.append(
            [
                row["variant"],
                "none" if row["epsilon_release"] is None else f"{row['epsilon_release']:.3f}",
                f"{100 * accuracy:.2f} ({each})",
                with_interval(row["gain"]),
                with_interval(row.get("difference")),
                f"{loss:.3f}",
                f"{row['uplink_bytes_per_client_round']:,}",
                f"{100 * row['overhead']:.1f} %",
            ]
        )
    if reference is None:
        cells = [row[:4] + row[5:] for row in cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def with_interval(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:+.2f}" + (f" ± {value['half_width']:.2f}" if value["half_width"] is not None else "")


if __name__ == "__main__":
    main()
