"""Reading a DeepSpeed file: what it says to DeepSpeed, what it says to this project, and where the two disagree.

The file is one that any DeepSpeed job takes, "auto" included. Here a few of its keys mean:

    train_micro_batch_size_per_gpu   the most examples of one forward pass on a rank, beside engine.batch_tokens
    gradient_accumulation_steps      nothing more: a step's gradient is that of all examples of a unit, in as many passes as it takes
    train_batch_size                 their product with the number of ranks, and checked to be that
    bf16.enabled                     that the frozen base is bfloat16 (model.dtype); the adapter stays float32
    activation_checkpointing         where it holds anything: layers are computed again in the backward pass
    optimizer                        of a client's local steps: plain SGD, at federation.local.lr; the server's is federation.server
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import UserError
from fedllm.schema import Config

AUTO = "auto"  # as in Hugging Face's files: left to whoever starts DeepSpeed
STAGES = (0, 1, 2, 3)
OTHERS = {  # what would be done twice, or not at all -> what does it here
    "scheduler": "federation.server.schedule",
    "fp16": "model.dtype float32 or bfloat16",
    "amp": "model.dtype float32 or bfloat16",
    "torch_autocast": "model.dtype float32 or bfloat16",
    "gradient_clipping": "privacy.clip, which clips each unit",
    "pipeline": "ZeRO stages",
    "tensor_parallel": "ZeRO stages",
    "compression_training": "none",
}


@dataclass(frozen=True)
class DeepSpeedFile:
    """settings: for `deepspeed.initialize`. micro_batch: the most examples of a forward pass, None for no such limit."""

    path: Path
    settings: dict[str, Any]
    stage: int
    micro_batch: int | None
    checkpointing: bool


def read(path: Path, config: Config, ranks: int) -> DeepSpeedFile:
    """Read a file for a run on so many ranks. Raises UserError for what is no DeepSpeed file, or contradicts the config."""
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"no JSON ({error})"
        raise UserError(f"engine.deepspeed={path}: {reason}; expected a DeepSpeed file such as configs/deepspeed/zero2.json") from None
    if not isinstance(given, dict) or not all(isinstance(given.get(key) or {}, dict) for key in ("zero_optimization", "bf16", "optimizer")):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed's settings")
    given = _without_auto(given)
    for key, instead in OTHERS.items():
        if _on(given.get(key)):
            raise UserError(f"{path}: {key}: expected none of it; here that is {instead}")
    stage = given.get("zero_optimization", {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in STAGES:
        raise UserError(f"{path}: zero_optimization.stage={stage}: expected 0, 1, 2 or 3")
    _check_precision(path, given, config)
    _check_optimizer(path, given, config, stage)
    micro = _micro_batch(path, given, config, ranks)
    settings = {key: value for key, value in given.items() if key not in ("bf16", "optimizer", "train_batch_size")}
    settings |= {"train_micro_batch_size_per_gpu": micro or 1, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return DeepSpeedFile(path, settings, stage, micro, bool(given.get("activation_checkpointing")))


def _without_auto(given: Any) -> Any:
    if isinstance(given, dict):
        return {key: _without_auto(value) for key, value in given.items() if value != AUTO}
    return given


def _on(value: Any) -> bool:
    return bool(value.get("enabled", True)) if isinstance(value, dict) and value else bool(value)


def _check_precision(path: Path, given: dict[str, Any], config: Config) -> None:
    enabled = given.get("bf16", {}).get("enabled")
    if enabled is not None and bool(enabled) != (config.model.dtype == "bfloat16"):
        right = "bfloat16" if enabled else "float32"
        raise UserError(f"{path}: bf16.enabled={str(enabled).lower()}: expected model.dtype={right} with it, not {config.model.dtype}")


def _check_optimizer(path: Path, given: dict[str, Any], config: Config, stage: int) -> None:
    """The file may name no other optimiser than the one that local steps are."""
    optimizer = given.get("optimizer", {})
    kind, settings = optimizer.get("type", "SGD"), optimizer.get("params") or {}
    if str(kind).lower() != "sgd":
        raise UserError(
            f"{path}: optimizer.type={kind}: expected SGD or no optimizer with ZeRO stage {stage}; a client's local steps are SGD, "
            f"and the server's optimiser is federation.server.optimizer={config.federation.server.optimizer}"
        )
    rate = settings.get("lr", config.federation.local.lr)
    if rate != config.federation.local.lr:
        raise UserError(f"{path}: optimizer.params.lr={rate}: expected federation.local.lr={config.federation.local.lr:g}, or none")
    for key, value in settings.items():
        if key != "lr" and value:
            raise UserError(f"{path}: optimizer.params.{key}={value}: expected plain SGD, which has a learning rate alone")


def _micro_batch(path: Path, given: dict[str, Any], config: Config, ranks: int) -> int | None:
    """Examples of a forward pass at most, from whichever of the three batch sizes are given."""
    micro, steps, whole = (
        given.get(key) for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    )
    for key, value in (
        ("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", steps), ("train_batch_size", whole)
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(f"{path}: {key}={value}: expected a whole number of at least 1, or {AUTO}")
    if whole is not None:
        known = (micro or 1) * (steps or 1) * ranks
        if whole % known or (micro and steps and whole != known):
            parts = f"{micro or 'micro batch'} a rank x {steps or 'accumulation'} steps x {ranks} ranks"
            raise UserError(f"{path}: train_batch_size={whole}: expected {parts}" + (f" = {known}" if micro and steps else ""))
        micro = micro or whole // known
    longest = config.task.max_length
    if micro is not None and micro > 1 and micro * longest > config.engine.batch_tokens:
        raise UserError(
            f"{path}: train_micro_batch_size_per_gpu={micro}: {micro} examples of task.max_length={longest} tokens are more than "
            f"engine.batch_tokens={config.engine.batch_tokens}; expected at least {micro * longest} of these, or a smaller micro batch"
        )
    return micro
