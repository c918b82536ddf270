"""Looking at a model with public held-out examples, during a run and after it; sizes of what travels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save
from torch import Tensor

from dr_encoder.message import pack
from fedllm.config import load_config
from fedllm.errors import UserError
from fedllm.monitor import Phase
from fedllm.release import PrivateSum
from fedllm.schema import Config
from fedllm.setting import Setting, build
from fedllm.training.engine import Encoded, Evaluation


def parts(setting: Setting, config: Config) -> tuple[Encoded, Encoded | None]:
    """The held-out examples looked at after each round, and the others (None where there are none)."""
    count = config.task.monitor_examples
    return setting.test[:count], setting.test[count:] if len(setting.test) > count else None


def look(setting: Setting, config: Config, phase: Phase, text: str) -> tuple[Evaluation, Evaluation]:
    """All held-out examples, and the monitored part of them."""
    first, others = parts(setting, config)
    with phase(text, total=len(setting.test)) as advance:
        part = setting.engine.evaluate(first, advance)
        whole = part if others is None else merge(part, len(first), setting.engine.evaluate(others, advance), len(others))
    if not finite(whole):
        raise UserError(f"{text}: the loss on held-out examples is not finite; expected a model that gives numbers in model.dtype")
    return whole, part


def look_part(setting: Setting, config: Config) -> Evaluation:
    """The monitored part of the held-out examples."""
    return setting.engine.evaluate(parts(setting, config)[0])


def merge(one: Evaluation, one_count: int, other: Evaluation, other_count: int) -> Evaluation:
    """Evaluation of both sets of examples together."""
    total = one_count + other_count

    def mean(a: float, b: float) -> float:
        return (a * one_count + b * other_count) / total

    accuracy = None if one.accuracy is None else mean(one.accuracy, other.accuracy)
    return Evaluation(mean(one.loss, other.loss), accuracy)


def finite(evaluation: Evaluation) -> bool:
    """Whether the loss is a number."""
    return math.isfinite(evaluation.loss)


def message_bytes(spec: PrivateSum) -> int:
    """Size of a whole message of this round: public, the same for every client but for the digits of its number."""
    dtype = spec.expects().dtype
    return len(pack(spec.header(spec.clients - 1), np.zeros(spec.size, dtype)))


def downlink_bytes(model: dict[str, Tensor], codec_bytes: int, unit: str, refitted: bool) -> int:
    """What a client that takes part in a round downloads: the new model (safetensors, float32), and the codec it has not got.

    model: the adapter and what else of the model is new to the client; codec_bytes: of the codec's file where clients take the server's
    copy, else 0; refitted: whether it is new in this round.
    """
    # Convention. A client that is the unit takes part rarely (rate x refresh << 1), so every participation fetches the codec in force;
    # with units inside the clients every client takes part in every round, and fetches it once.
    return len(save({name: value.contiguous() for name, value in model.items()})) + (codec_bytes if unit == "client" or refitted else 0)


def evaluate_run(run_dir: str | Path, phase: Phase) -> dict[str, Any]:
    """Held-out loss and accuracy again, from the saved adapter; beside them what the run itself wrote.

    Raises UserError where the folder holds no finished run.
    """
    run_dir = Path(run_dir)
    for needed in ("config.yaml", "results.json", "adapter"):
        if not (run_dir / needed).exists():
            raise UserError(f"{run_dir}: has no {needed}; expected the folder of a finished run (`fedllm resume` finishes one)")
    config = load_config(run_dir / "config.yaml")
    saved = json.loads((run_dir / "results.json").read_text())
    setting = build(config, 0, adapter=run_dir / "adapter", phase=phase)
    whole, _ = look(setting, config, phase, "evaluating the saved adapter")
    return {
        "loss": whole.loss,
        "perplexity": perplexity(config, whole.loss),
        "accuracy": whole.accuracy,
        "loss_saved": saved["loss"],
        "accuracy_saved": saved["accuracy"],
        "examples": len(setting.test),
    }


def perplexity(config: Config, loss: float) -> float | None:
    """exp(loss) for next-token tasks, None elsewhere."""
    return math.exp(min(loss, 700.0)) if config.task.kind == "text" else None
