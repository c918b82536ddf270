"""The LoRA adapter of a model: put on, started from a seed, written so that plain PEFT reads it, and read again."""

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedllm.errors import UserError
from fedllm.lora_layers import CORE, PREFIX, add_cores, check_rank, lora_layers, plain_factors

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRAINED = {  # lora.train -> the endings of LoRA factors that are trained; a head always is
    "both": (".lora_A.default.weight", ".lora_B.default.weight"),
    "b": (".lora_B.default.weight",),
    "core": (CORE,),
}


def add_adapter(
    base: nn.Module,
    kind: str,
    *,
    name: str = "model",
    r: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    train: str = "both",
    seed: int = 0,
) -> "PeftModel":
    """Put a fresh LoRA adapter (and for 'classify' a fresh head) onto a base model, in float32.

    Raises UserError for targets that the model lacks, or a core larger than a target's sides.
    """
    from peft import LoraConfig, TaskType

    check_targets(base, targets, name)
    head = _head_name(base) if kind == "classify" else None
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=0.0,
        task_type=TaskType.SEQ_CLS if kind == "classify" else TaskType.CAUSAL_LM,
        modules_to_save=[head] if head else None,
    )
    model = _attach(base, config, name)
    if train == "core":
        check_rank(model, "lora.train=core")
        add_cores(model)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.requires_grad_(key.endswith(TRAINED[train]))
    init_adapter(model, seed)
    return model.eval()


def open_adapter(base: nn.Module, path: Path, name: str = "model") -> "PeftModel":
    """A base model with a saved adapter, of whatever ranks it has.

    Raises UserError where nothing is saved, or where it does not fit the model.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a saved adapter")
    config = LoraConfig.from_pretrained(str(path))
    config.inference_mode = False
    check_targets(base, sorted(config.target_modules), name)
    model = _attach(base, config, name)
    try:
        loaded = set_peft_model_state_dict(model, load_file(file))
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the model: {str(error).splitlines()[-1].strip()}") from error
    missing = [key for key in loaded.missing_keys if "lora_" in key or ".modules_to_save." in key]
    if missing or loaded.unexpected_keys:
        raise UserError(f"{file} does not fit the model: {(missing + list(loaded.unexpected_keys))[0]}")
    return model.eval()


def _attach(base: nn.Module, config: "LoraConfig", name: str) -> "PeftModel":
    """The PEFT model, its adapter and head in float32."""
    from peft import get_peft_model
    from peft.utils import ModulesToSaveWrapper

    base.name_or_path = name  # what the saved adapter names as its base: not the cache folder of this machine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save["default"].register_forward_pre_hook(_cast_input)
    return model


def init_adapter(model: nn.Module, seed: int) -> None:
    """LoRA's usual start, from a seed: A uniform in +-1/sqrt(in features), B zero, a head's weights N(0, .02^2).

    The bound is Kaiming's with a = sqrt 5. With cores A and B are random orthonormal (rows, columns) and the cores zero.
    Draws from a generator of its own, in the order of the parameters' names.
    """
    generator = torch.Generator().manual_seed(seed)
    own = [(key, value) for key, value in sorted(model.named_parameters()) if "lora_" in key or ".modules_to_save." in key]
    cored = any(key.endswith(CORE) for key, _ in own)
    for key, parameter in own:
        if parameter.is_meta:
            continue
        if cored and ("lora_A.default.weight" in key or "lora_B" in key):
            start = orthonormal(parameter.shape, generator)
        elif "lora_A" in key and not key.endswith(CORE):
            start = usual_a(parameter.shape, generator)
        elif "lora_" in key or parameter.ndim < 2:
            start = torch.zeros(parameter.shape)
        else:
            start = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.data.copy_(start)


def usual_a(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """LoRA's usual start of A [r, in]: uniform in +-1/sqrt(in)."""
    bound = 1 / math.sqrt(shape[1])
    return torch.rand(shape, generator=generator) * 2 * bound - bound


def orthonormal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A random matrix whose shorter side is orthonormal."""
    tall = torch.randn(max(shape), min(shape), generator=generator, dtype=torch.float64)
    found = torch.linalg.qr(tall).Q.float()
    return found if shape[0] >= shape[1] else found.T


def save_adapter(model: "PeftModel", path: Path) -> None:
    """Write the adapter so that `PeftModel.from_pretrained(base, path)` loads it; no model card, no network.

    Cores and dense matrices are written as the plain factors that do the same.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, model.state_dict(), save_embedding_layers=False)
    state = {key: value for key, value in state.items() if not key.endswith(CORE)}
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.rank_pattern, config.alpha_pattern = {}, {}
    for name, layer in lora_layers(model).items():
        a, b, alpha = plain_factors(layer)
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = a, b
        if alpha is not None:
            config.rank_pattern[name.removeprefix(PREFIX)] = len(a)
            config.alpha_pattern[name.removeprefix(PREFIX)] = alpha
    config.save_pretrained(path)
    part = path / (ADAPTER_WEIGHTS + ".part")
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, part, metadata={"format": "pt"})
    part.replace(path / ADAPTER_WEIGHTS)


def check_targets(model: nn.Module, targets: Sequence[str], name: str) -> None:
    """Raise UserError, naming what there is, unless each target is the (end of the) name of a linear module."""
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    missing = [target for target in targets if not any(f".{key}".endswith(f".{target}") for key in linear)]
    if missing or not targets:
        there = ", ".join(sorted({key.rpartition(".")[2] for key in linear}))
        which = ", ".join(missing) or "(none named)"
        raise UserError(f"lora.targets: {name} has no linear module {which}; it has {there}")


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer


def _head_name(model: nn.Module) -> str:
    names = [key for key, _ in model.named_children() if key in ("classifier", "score")]
    if not names:
        raise UserError(f"task.kind=classify: {type(model).__name__} has no head named classifier or score")
    return names[0]


def _cast_input(module: nn.Module, arguments: tuple) -> tuple:
    """The head is float32 whatever the base's dtype."""
    return (arguments[0].to(next(module.parameters()).dtype), *arguments[1:])
