"""One private per-example step (gradients of each example, clip, sum, noise) against the plain step of the same model.

python scripts/bench_per_example.py [--model NAME ...] [--cycles N] [--json] [--quick]      about 15 minutes; --quick: a tiny model, seconds

Four steps on the same batch: plain (mean loss, forward and backward, no optimiser), this library's private one, Opacus' hooks
(GradSampleModule) and Opacus' ghost clipping. All in one process in turn, the order rotating; the ratio to the plain step is taken cycle by
cycle, and its median stands with the 95 % interval of order statistics. LoRA of rank 8 on queries and values (and a classifier's head), B
not zero, half of the examples clipped. Memory is measured apart, each step in a process of its own: how far the peak resident memory of
the second such step lies above the loaded model, malloc giving freed blocks back at once. Our noise is float64 from the operating system's
generator, Opacus' torch.normal: what each does by default.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tiny_model  # noqa: E402

from fedllm.bench.measure import MALLOC_ENVIRONMENT, alternate, peak_bytes, ratios  # noqa: E402

TIME, MEMORY = 1.05, 1.1  # what the lower end of the time ratio's interval, and the memory ratio, may be
NOISE_MULTIPLIER = 1.0


@dataclass(frozen=True)
class Case:
    """A model, its task and the step's batch."""

    kind: str
    targets: tuple[str, ...]
    examples: int
    tokens: int = 40


CASES = {
    "smollm2-135m": Case("labels", ("q_proj", "v_proj"), 16),
    "minilm-l6": Case("classify", ("query", "value"), 48),
    "tiny": Case("labels", ("q_proj", "v_proj"), 8, 12),
}


class Steps:
    """The four steps of one case. `make(name)` loads a model of its own for the step."""

    def __init__(self, name: str, folder: Path, dtype: str):
        import numpy as np
        import torch

        from fedllm.data.batches import make_batches

        self.name, self.case, self.folder, self.dtype = name, CASES[name], folder, dtype
        draw = np.random.default_rng(0)
        low, high = (5, 30) if name == "tiny" else (1000, 20_000)
        self.tokens = draw.integers(low, high, (self.case.examples, self.case.tokens)).tolist()
        self.targets = draw.integers(0, 2, self.case.examples)
        self.batch = next(make_batches(self.tokens, batch_tokens=10**9))
        self.labels = torch.from_numpy(self.targets)

    def make(self, step: str) -> Callable[[], Any]:
        return MAKERS[step](self)

    def engine(self):
        """A freshly loaded model in its engine, all examples in one batch, B moved away from zero."""
        import torch

        from fedllm.models import load_model
        from fedllm.training.engine import TorchEngine
        from fedllm.training.objectives import ClassHead, LabelWords

        source = str(self.folder / "tiny") if self.name == "tiny" else self.name
        model, _ = load_model(source, self.case.kind, dtype=self.dtype, r=8, targets=self.case.targets)
        objective = ClassHead() if self.case.kind == "classify" else LabelWords([5, 6] if self.name == "tiny" else [2000, 3000])
        engine = TorchEngine(model, objective, 0, 10**9, "right" if self.case.kind == "classify" else "left")
        away = torch.randn(engine.layout.size, generator=torch.Generator().manual_seed(1))
        engine.load(engine.adapter() + 0.01 * away)
        return engine

    def losses(self, engine):
        return engine.objective(engine.model, self.batch, self.labels)[0]

    def plain(self) -> Callable[[], Any]:
        engine = self.engine()

        def step():
            self.losses(engine).mean().backward()
            return taken(engine)

        return step

    def ours(self) -> Callable[[], Any]:
        """What a client of unit `example` does, without codec and message."""
        import numpy as np
        import torch

        from fedllm.client import add_rows, unit_vectors
        from fedllm.privacy.noise import Noise
        from fedllm.release import PrivateSum
        from fedllm.training.engine import Encoded

        engine, data = self.engine(), Encoded(self.tokens, self.targets)
        units, noise = [np.array([i]) for i in range(len(data))], Noise()
        spec = PrivateSum(
            run="", stage=2, round=0, codec="", prior="none", size=engine.layout.size, clip=self.clip, noise="central",
            noise_in="code", noise_multiplier=NOISE_MULTIPLIER, shares=1, sampling_rate=0.1, max_cohort=None, expected=len(units),
            unit="example", clients=1, bits=32,
        )  # fmt: skip

        def step():
            total = torch.zeros(1, spec.size, dtype=torch.float64)
            for where, updates in engine.updates(data, units):
                places = torch.zeros(where.stop - where.start, dtype=torch.int64)
                add_rows(total, places, unit_vectors(updates, lambda rows: rows, spec))
            total += torch.from_numpy(noise.gaussian((spec.size,), spec.sum_std, purpose="server", stage=2, round=0))
            return [total / spec.expected]

        return step

    def opacus(self) -> Callable[[], Any]:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        engine = self.hookable()
        GradSampleModule(engine.model, strict=False, loss_reduction="mean")
        optimizer = self.optimizer(DPOptimizer, engine)

        def step():
            self.losses(engine).mean().backward()
            optimizer.pre_step()
            gradients = taken(engine)
            optimizer.zero_grad(set_to_none=True)
            return gradients

        return step

    def ghost(self) -> Callable[[], Any]:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        engine = self.hookable()
        wrapped = GradSampleModuleFastGradientClipping(engine.model, strict=False, loss_reduction="mean", max_grad_norm=self.clip)
        optimizer = self.optimizer(DPOptimizerFastGradientClipping, engine)

        def step():
            DPTensorFastGradientClipping(wrapped, optimizer, self.losses(engine), "mean").backward()
            optimizer.pre_step()
            gradients = taken(engine)
            optimizer.zero_grad(set_to_none=True)
            return gradients

        return step

    @cached_property
    def clip(self) -> float:
        """The median norm of the examples' gradients."""
        import numpy as np
        import torch

        from fedllm.training.engine import Encoded

        units = [np.array([i]) for i in range(len(self.tokens))]
        rows = [updates for _, updates in self.engine().updates(Encoded(self.tokens, self.targets), units)]
        return float(torch.cat(rows).norm(dim=1).median())

    def hookable(self):
        """Opacus' hooks look at modules in training mode only: the trained layers alone are put into it, dropout stays off."""
        engine = self.engine()
        for module in engine.model.modules():
            if any(value.requires_grad for value in module.parameters(recurse=False)):
                del module.forward  # the plain layer
                module.training = True
        return engine

    def optimizer(self, kind, engine):
        import torch

        return kind(
            torch.optim.SGD(list(engine.parameters.values()), lr=0.1),
            noise_multiplier=NOISE_MULTIPLIER,
            max_grad_norm=self.clip,
            expected_batch_size=self.case.examples,
        )


def taken(engine) -> list:
    """The parameters' gradients, which they have no longer."""
    gradients = [value.grad for value in engine.parameters.values()]
    for value in engine.parameters.values():
        value.grad = None
    return gradients


MAKERS = {"plain": Steps.plain, "ours": Steps.ours, "opacus": Steps.opacus, "ghost": Steps.ghost}


def memory(name: str, step: str, folder: Path, dtype: str) -> dict[str, int]:
    """Peak memory of a step in this process, after a first one that fills caches and thread pools."""
    call = Steps(name, folder, dtype).make(step)
    call()
    above, whole = peak_bytes(call)
    return {"step_bytes": above, "peak_bytes": whole}


def memory_apart(name: str, step: str, folder: Path, dtype: str) -> dict[str, int]:
    """The same, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory", json.dumps([name, step, str(folder), dtype])]
    ended = subprocess.run(command, env=os.environ | MALLOC_ENVIRONMENT, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{name} {step} failed: {ended.stderr.strip().splitlines()[-1]}")
    return json.loads(ended.stdout)


def bench(name: str, cycles: int, folder: Path, dtype: str) -> list[dict[str, Any]]:
    """One row a step."""
    from fedllm.models import resolve_dtype

    dtype = resolve_dtype(dtype, CASES[name].kind)
    names = [step for step in MAKERS if step in ("plain", "ours") or have_opacus()]
    making = Steps(name, folder, dtype)
    steps = {step: making.make(step) for step in names}
    taken = []
    for cycle, seconds in enumerate(alternate(steps, cycles), 1):
        taken.append(seconds)
        print(f"{name}: cycle {cycle} of {cycles}, " + ", ".join(f"{step} {seconds[step].wall:.2f} s" for step in names), file=sys.stderr)
    del making, steps
    rows = []
    for step in names:
        print(f"{name}: memory of {step}", file=sys.stderr)
        rows.append(
            {"model": name, "dtype": dtype, "step": step, "examples": CASES[name].examples, "tokens": CASES[name].tokens}
            | {"seconds": statistics.median(seconds[step].wall for seconds in taken)}
            | {f"{kind}_ratio": found for kind, found in ratios(taken, step, "plain").items()}
            | (memory if name == "tiny" else memory_apart)(name, step, folder, dtype)
        )
    for row in rows:
        row["memory_ratio"] = row["step_bytes"] / rows[0]["step_bytes"] if name != "tiny" else None  # a tiny step takes no page
    return rows


def have_opacus() -> bool:
    return importlib.util.find_spec("opacus") is not None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the ratios with their intervals."""
    lines = [
        "| model | step | seconds | time ratio (95 %) | processor time ratio (95 %) | memory MB | memory ratio |",
        "|---|---|---:|---|---|---:|---:|",
    ]
    for row in rows:
        shown = ("{median:.3f} ({low:.3f} - {high:.3f})".format(**row[f"{kind}_ratio"]) for kind in ("wall", "processor"))
        more = "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}"
        lines.append(
            f"| {row['model']} {row['dtype']} | {row['step']} | {row['seconds']:.3f} | {' | '.join(shown)} "
            f"| {row['step_bytes'] / 1e6:.0f} | {more} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=[name for name in CASES if name != "tiny"], help="both where it is left out")
    parser.add_argument("--cycles", type=int, default=15)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the frozen model")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, 3 cycles: shows that all runs, measures nothing")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    if given.memory is not None:
        name, step, folder, dtype = json.loads(given.memory)
        print(json.dumps(memory(name, step, Path(folder), dtype)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if given.quick:
            tiny_model.write_model(folder / "tiny")
        names = ["tiny"] if given.quick else given.model or [name for name in CASES if name != "tiny"]
        rows = [row for name in names for row in bench(name, 3 if given.quick else given.cycles, folder, given.dtype)]
    held = None
    if not given.quick:
        held = all(row["wall_ratio"]["low"] <= TIME and row["memory_ratio"] <= MEMORY for row in rows if row["step"] == "ours")
    answer = {
        "rows": rows,
        "limits": {"time_ratio_low": TIME, "memory_ratio": MEMORY},
        "held": held,
        "threads": threads(),
        "opacus": version("opacus") if have_opacus() else None,
    }
    print(json.dumps(answer, indent=2) if given.json else table(rows))
    return 1 if held is False else 0


def threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    sys.exit(main())
