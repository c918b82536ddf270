"""Grids with axes: their cells, and the public tuning that every cell gets before it is trained."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fedllm.errors import UserError

Results = dict[str, Any]


def load_grid(path: Path) -> dict[str, Any]:
    """A grid from its file; with `extends` on top of another file beside it, axis by axis. Axes become variants."""
    grid = read_yaml(path)
    if "axes" in grid:
        drop_unknown_methods(grid)
        expand(grid)
    return grid


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such grid; expected a file such as configs/grids/evidence.yaml")
    grid = yaml.safe_load(path.read_text())
    if "extends" in grid:
        below = read_yaml(path.parent / grid.pop("extends"))
        grid["axes"] = below.get("axes", {}) | grid.get("axes", {})
        grid = below | grid
    return grid


def drop_unknown_methods(grid: dict[str, Any]) -> None:
    """Leave out, in the open, methods that this version has not registered."""
    from fedllm.methods import METHODS

    methods = grid["axes"].get("method", {})
    for name in [name for name in methods if name not in METHODS]:
        print(f"grid: no method {name} here; left out", file=sys.stderr)
        del methods[name]


def expand(grid: dict[str, Any]) -> None:
    """`axes` (axis -> key -> overrides) to `variants`: one for each combination, but for those that `skip` names.

    `cells`: variant -> {axis: key}. `same`: a combination that is the same computation as another, trained once.
    Both write a combination as keys with / between them, which leaves the other axes open: dp_lora/inf.
    """
    axes, grid["variants"], grid["cells"], grid["stands_for"] = grid["axes"], {}, {}, {}
    for keys in itertools.product(*axes.values()):
        cell = dict(zip(axes, keys, strict=True))
        if any(within(pattern, cell) for pattern in grid.get("skip", [])):
            continue
        name = name_of(keys)
        grid["variants"][name] = [item for axis, key in cell.items() for item in axes[axis][key] or []]
        grid["cells"][name] = cell
        for pattern, other in grid.get("same", {}).items():
            if within(pattern, cell):
                grid["stands_for"][name] = name_of(moved(axes, cell, other).values())


def name_of(keys: Any) -> str:
    return "-".join(keys).replace(":", "-")


def within(pattern: str, cell: dict[str, str]) -> bool:
    """Whether every key of a combination is the cell's."""
    return set(pattern.split("/")) <= set(cell.values())


def moved(axes: dict[str, Any], cell: dict[str, str], pattern: str) -> dict[str, str]:
    """The cell with the keys of a combination in the place of its own."""
    changed = {axis: key for key in pattern.split("/") for axis in axes if key in axes[axis]}
    if len(changed) != len(pattern.split("/")):
        sys.exit(f"grid: {pattern} under same: expected keys of the axes {', '.join(axes)}, / between them")
    return cell | changed


def reference_of(grid: dict[str, Any], name: str) -> str | None:
    """The variant that a variant is compared with: with axes the cell whose keys `reference` replaces."""
    reference = grid.get("reference")
    if reference is None or "cells" not in grid:
        return reference
    other = name_of(moved(grid["axes"], grid["cells"][name], reference).values())
    return other if other in grid["variants"] else None


def chosen(grid: dict[str, Any], wanted: list[str]) -> list[str]:
    """The variants that `--only` names, by their own names or by keys of axes; each that is the same as another becomes it.

    Raises UserError for what names none.
    """
    cells = grid.get("cells", {})
    keys = dict.fromkeys(key for cell in cells.values() for key in cell.values())
    unknown = [name for name in wanted if name not in grid["variants"] and name not in keys]
    if unknown:
        raise UserError(f"--only {' '.join(unknown)}: expected {', '.join(keys or grid['variants'])}{', or a variant' if keys else ''}")
    names = [name for name in grid["variants"] if not wanted or name in wanted or set(wanted) & set(cells.get(name, {}).values())]
    return list(dict.fromkeys(grid.get("stands_for", {}).get(name, name) for name in names))


def fixes(overrides: list[str], key: str) -> bool:
    """Whether the method among the overrides leaves no choice of a config key."""
    from fedllm.methods import METHODS

    named = [item.partition("=")[2] for item in overrides if item.startswith("method=")]
    return bool(named) and key in METHODS[named[-1]].parts | METHODS[named[-1]].defaults


# -- tuning --------------------------------------------------------------------------------------------------------------------------


class Tuning:
    """One number for each cell, by the same procedure: the value of the stated grid with the least held-out loss on another task.

    `tune` of a grid: `keys`, config key -> {values, beyond}, of which a variant is tuned by the first that its method leaves open;
    `seed`, `axis` (of tasks) and `tasks`, name -> {for: keys of that axis, overrides}: what stands in for those tasks, of neither whose
    text it contains; without overrides the axis' own task of that name. `beyond`: larger values, each tried only where the largest before
    it is the best, so that no choice is the upper edge of what was stated. By loss, since a task on which every value ends at the
    commonest label says nothing by accuracy. Choices stand in OUT/tuned.json; finished runs are kept like others.
    """

    def __init__(
        self,
        grid: dict[str, Any],
        run: Callable[[str, list[str], int], Results | None],
        read: Callable[[str, int], Results | None],
    ):
        self.grid, self.run, self.read = grid, run, read
        self.plan = grid.get("tune")

    def key(self, name: str) -> str | None:
        """The config key that variant `name` is tuned by; None where its method fixes them all."""
        return next((key for key in self.plan["keys"] if not fixes(self.grid["variants"][name], key)), None)

    def trials(self, name: str) -> dict[Any, tuple[str, list[str]]]:
        """value -> (name, overrides) of the tuning runs that choose for variant `name`; none where its method fixes every key."""
        cell, plan, axes = self.grid["cells"][name], self.plan, self.grid["axes"]
        if (key := self.key(name)) is None:
            return {}
        stand_in = next((task for task, entry in plan["tasks"].items() if cell[plan["axis"]] in entry["for"]), None)
        if stand_in is None:
            sys.exit(f"grid: tune.tasks: none is for {cell[plan['axis']]}; expected each of the axis {plan['axis']} once")
        others = {axis: key for axis, key in cell.items() if axis != plan["axis"]}
        task = plan["tasks"][stand_in].get("overrides") or axes[plan["axis"]][stand_in]
        overrides = [*task, *(item for axis, key in others.items() for item in axes[axis][key] or [])]
        return {
            value: (name_of(["tune", stand_in, *others.values(), f"{value:g}"]), [*overrides, f"{key}={value}"])
            for value in every(plan["keys"][key])
        }

    def twin(self, settings: list[str], seed: int) -> str | None:
        """The tuning run that is the same computation as a variant with its choice, if there is one: it need not be trained twice."""
        if self.plan is None or seed != self.plan["seed"]:
            return None
        trials = (trial for name in chosen(self.grid, []) for trial in self.trials(name).values())
        return next((trial for trial, overrides in trials if sorted(overrides) == sorted(settings)), None)

    def choose(self, name: str, train: bool) -> list[str]:
        """The override that was chosen for a variant, trained for first where that is missing; none where nothing is tuned."""
        if self.plan is None:
            return []
        found = self.tried(name, train)
        return [f"{self.key(name)}={best_of(found)}"] if found else []

    def tried(self, name: str, train: bool) -> dict[Any, Results]:
        """value -> results of a variant's tuning runs; of the values beyond the stated ones, those that the procedure comes to."""
        found: dict[Any, Results] = {}
        beyond = self.plan["keys"].get(self.key(name), {}).get("beyond", [])
        for value, (trial, overrides) in self.trials(name).items():
            if value in beyond and (not found or best_of(found) != max(found)):
                break
            results = self.run(trial, overrides, self.plan["seed"]) if train else self.read(trial, self.plan["seed"])
            if results is not None:
                found[value] = results
        return found

    def report(self) -> dict[str, Any]:
        """What was chosen and what it cost: {values by key, choices: {tuned: {for, key, loss, chosen, seconds}}, runs, seconds}."""
        choices: dict[str, Any] = {}
        for name in chosen(self.grid, []):
            trials = self.trials(name)
            if found := self.tried(name, train=False):
                entry = choices.setdefault(next(iter(trials.values()))[0].rpartition("-")[0], {"for": []})
                entry["for"].append(name)
                entry |= {
                    "key": self.key(name),
                    "loss": {f"{value:g}": results["loss"] for value, results in found.items()},
                    "chosen": best_of(found),
                    "seconds": sum(results["seconds"]["total"] for results in found.values()),
                }
        return {
            "values": {key: every(ladder) for key, ladder in self.plan["keys"].items()},
            "choices": choices,
            "runs": sum(len(entry["loss"]) for entry in choices.values()),
            "seconds": sum(entry["seconds"] for entry in choices.values()),
        }

    def write(self) -> dict[str, Any]:
        """The report, in OUT/tuned.json."""
        report, path = self.report(), Path(self.grid["out"]) / "tuned.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        return report


def best_of(found: dict[Any, Results]) -> Any:
    """The value whose run has the least loss; of two with the same, the one of higher accuracy."""
    return min(found, key=lambda value: (found[value]["loss"], -found[value]["accuracy"]))


def every(ladder: dict[str, Any]) -> list[Any]:
    """The values of a key, those beyond the stated ones last."""
    return [*ladder["values"], *ladder.get("beyond", [])]
