"""What test_deepspeed.py has two ranks do, in one launch of the `deepspeed` launcher: engines, whole runs, and the death of a rank.

deepspeed --no_local_rank --num_gpus 2 tests/fedllm/deepspeed_ranks.py FOLDER CONFIG

Rank 0 writes what it found into FOLDER; CONFIG is of a tiny run, and FOLDER/begun holds one that was interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from fedllm import ranks, run
from fedllm.adapters import ADAPTER_WEIGHTS, add_adapter
from fedllm.config import load_config
from fedllm.data.batches import make_batches
from fedllm.parallel.worker import DataWorker, Worker
from fedllm.schema import Config
from fedllm.training.deepspeed_engine import DeepSpeedEngine, _Asked, start
from fedllm.training.deepspeed_file import read
from fedllm.training.engine import Encoded, TorchEngine
from fedllm.training.objectives import ClassHead, LabelWords, NextToken
from tests.fedllm.tiny_models import tiny_bert, tiny_llama

FILES = Path("configs/deepspeed")
STAGES = {path.stem: json.loads(path.read_text()) for path in sorted(FILES.glob("*.json"))}
DIVIDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}  # the smallest factors too
PASSES = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "zero_optimization": {"stage": 2}}
KINDS = {
    "labels": (tiny_llama, ["q_proj", "v_proj"], LabelWords([7, 9, 4]), "left"),
    "text": (tiny_llama, ["q_proj", "down_proj"], NextToken(), "left"),
    "classify": (tiny_bert, ["query", "value"], ClassHead(), "right"),
    "unused": (tiny_llama, ["q_proj", "lm_head"], LabelWords([7, 9, 4]), "left"),  # label words are read off the head's weight itself
}
CASES = {name: (settings, "labels", {}) for name, settings in STAGES.items()} | {
    "passes": (PASSES, "labels", {}),
    "text": (DIVIDED, "text", {}),
    "classify": (DIVIDED, "classify", {}),
    "unused parameters": (DIVIDED, "unused", {}),
    "empty group": (STAGES["zero1"], "labels", {"train": "core", "r": 1, "targets": ["o_proj"]}),  # 2 numbers, each a parameter
    "empty share": (DIVIDED, "labels", {"train": "core", "r": 1, "targets": ["o_proj"]}),
}
RUNS = ("zero0", "zero1", "zero2", "zero3")
SETTINGS = ["seed=5", "federation.server.optimizer=sgd", "federation.server.lr=0.02", "codec.refresh=1", "federation.local.steps=2"]
SETTINGS += ["federation.local.lr=0.5", "federation.local.prox=0.1", "codec.public_labels=model"]
BATCH_TOKENS = 40
UNITS = [np.array(unit, dtype=np.int64) for unit in ([0], [1, 2, 3], [], [4, 5], [6, 7, 8, 9, 10], [11, 0], [12])]
EVERYTHING = [np.arange(13)]


def examples() -> Encoded:
    draw = np.random.default_rng(2)
    return Encoded([draw.integers(1, 50, draw.integers(2, 15)).tolist() for _ in range(13)], draw.integers(0, 3, 13))


def model_of(kind: str, adapter: dict[str, Any]) -> Any:
    """A tiny model whose adapter has left its start: B is zero no longer."""
    base, targets, *_ = KINDS[kind]
    model = add_adapter(base(), "classify" if kind == "classify" else "labels", **{"r": 2, "alpha": 4, "targets": targets, **adapter})
    generator = torch.Generator().manual_seed(1)
    for value in model.parameters():
        if value.requires_grad:
            value.data += 0.1 * torch.randn(value.shape, generator=generator)
    return model


class Ranks(Worker):
    """One of the ranks; methods are called on all of them at once."""

    def __init__(self, team: ranks.Team, folder: Path):
        super().__init__(team)
        self.team, self.folder = team, folder

    def all(self, name: str, *arguments: Any) -> Any:
        self.team.tell(name, *arguments)
        result = getattr(self, name)(*arguments)
        list(self.team.replies())
        return result

    def make(self, case: str) -> None:
        settings, kind, adapter = CASES[case]
        path = self.folder / f"{self.team.rank}.json"
        path.write_text(json.dumps(settings))
        self.file, (_, _, objective, side) = read(path, Config(), self.team.size), KINDS[kind]
        engine = DeepSpeedEngine(model_of(kind, adapter), objective, 0, BATCH_TOKENS, side, team=self.team, file=self.file)
        self.mode = DataWorker(SimpleNamespace(engine=engine), Config(), 0)

    def mortal(self) -> None:
        """Rank 1 will die amid the work."""
        if self.team.rank == 1:
            self.engine._backward = lambda loss: os._exit(0)  # 0: the launcher then leaves rank 0 alone

    def native(self, case: str) -> list[float] | None:
        """DeepSpeed's own gradient of the mean loss over all examples, no hook of ours in sight."""
        from deepspeed.utils import safe_get_full_grad

        _, kind, adapter = CASES[case]
        model, (_, _, objective, side) = model_of(kind, adapter), KINDS[kind]
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        engine = start(_Asked(model, objective), list(trained.values()), self.file, torch.optim.SGD(trained.values(), lr=1.0))
        data = examples()
        batch = list(make_batches(data.tokens, most=7, batch_tokens=1000, side=side))[self.team.rank]
        losses, _ = engine(batch, torch.from_numpy(data.targets[batch.index]))
        engine.backward(losses.sum() * self.team.size / len(data), scale_wrt_gas=False)  # DeepSpeed takes the mean over ranks
        found = [safe_get_full_grad(value) for value in trained.values()]
        return torch.cat([value.flatten() for value in found]).tolist() if self.team.rank == 0 else None


def compare(party: Ranks, case: str) -> dict[str, Any]:
    """One case against a torch engine of one process."""
    _, kind, adapter = CASES[case]
    data, (_, _, objective, side) = examples(), KINDS[kind]
    party.all("make", case)
    engine, plain = party.engine, TorchEngine(model_of(kind, adapter), objective, 0, BATCH_TOKENS, side)
    start_at = engine.adapter()
    found = {"start": difference(start_at, plain.adapter())}
    found["rows"] = difference(*(rows(each, UNITS) for each in (engine, plain)))
    found["empty unit"] = float(rows(engine, UNITS)[2].abs().max())
    found["nothing"] = float(rows(engine, [UNITS[2]] * 2).abs().max())
    found["path"] = difference(*(rows(each, UNITS[3:6], 3, 0.1, 0.5) for each in (engine, plain)))
    found["after path"] = difference(engine.adapter(), start_at)
    found["evaluation"] = difference(*(torch.tensor(figures(each.evaluate(data))) for each in (engine, plain)))
    if kind in ("labels", "classify"):
        found["probabilities"] = difference(*(each.probabilities(data) for each in (engine, plain)))
    moved = start_at + torch.linspace(0.5, 1, len(start_at))
    engine.load(moved)
    found["loaded"] = difference(engine.adapter(), moved)
    plain.load(moved)
    found["evaluation after"] = difference(*(torch.tensor(figures(each.evaluate(data))) for each in (engine, plain)))
    saved = []
    for name, each in (("sharded", engine), ("plain", plain)):
        each.save(party.folder / name)
        saved.append(load_file(party.folder / name / ADAPTER_WEIGHTS))
    found["saved names"] = sorted(saved[0]) == sorted(saved[1])
    found["saved"] = max(difference(saved[0][name], saved[1][name]) for name in saved[1])
    found["saved zero"] = [name for name, value in saved[0].items() if not value.any()]
    if case in STAGES and "offload" not in case:
        whole = rows(plain_again(kind, adapter), EVERYTHING)[0]
        found["native"] = difference(torch.tensor(party.all("native", case)), whole)
    return found


def plain_again(kind: str, adapter: dict[str, Any]) -> TorchEngine:
    _, _, objective, side = KINDS[kind]
    return TorchEngine(model_of(kind, adapter), objective, 0, BATCH_TOKENS, side)


def rows(engine: TorchEngine, units: list[np.ndarray], *local: float) -> torch.Tensor:
    return torch.cat([updates for _, updates in engine.updates(examples(), units, *local)])


def figures(evaluation: Any) -> list[float]:
    return [evaluation.loss, evaluation.accuracy or 0.0]


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference beside the largest number wanted; infinite where shapes are not the same."""
    if found.shape != wanted.shape:
        return float("inf")
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(1e-12))


def runs(folder: Path, config: str) -> None:
    """Whole runs, and one taken up, with all ranks on the same clients."""
    for name in RUNS:
        run.train(load_config(config, [*SETTINGS, *data_parallel(name), f"output_dir={folder / name}"]))
    run.resume(folder / "begun", data_parallel("zero3"))


def data_parallel(file: str) -> list[str]:
    return ["parallel.mode=data", "engine.name=deepspeed", f"engine.deepspeed={FILES / file}.json"]


def death(party: Ranks) -> dict[str, Any]:
    """What rank 0 makes of it."""
    party.all("make", "zero3")
    party.all("mortal")
    began = time.monotonic()
    try:
        rows(party.engine, UNITS)
    except ranks.RankLost as error:
        return {"line": str(error), "seconds": time.monotonic() - began}
    return {"line": "rank 0 noticed nothing"}


def main(folder: Path, config: str) -> None:
    team = ranks.join()
    party = Ranks(team, folder)
    if team.rank > 0:
        team.serve(party)
        return
    runs(folder, config)
    (folder / "found.json").write_text(json.dumps({case: compare(party, case) for case in CASES}))
    (folder / "death.json").write_text(json.dumps(death(party)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
