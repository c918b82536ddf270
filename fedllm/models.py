"""Base model and LoRA adapter from a demo asset, a hub id, a folder or a GGUF file."""

import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedllm.data.assets import ASSETS, fetch
from fedllm.errors import UserError
from fedllm.gguf_cache import converted

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

KINDS = ("labels", "classify", "text")
BFLOAT16_GAIN = 1.5  # bfloat16 is taken when its matrix products are this many times faster
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_model(
    name: str,
    kind: str = "labels",
    *,
    labels: int = 2,
    dtype: str = "auto",
    r: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    train: str = "both",
    seed: int = 0,
    device: str = "cpu",
) -> tuple["PeftModel", "PreTrainedTokenizerBase"]:
    """A frozen base model with a fresh float32 LoRA adapter, dropout off, and its tokenizer.

    Args:
        name: demo asset, hub id, folder, or GGUF file.
        kind: 'labels' and 'text' load a causal LM; 'classify' a sequence classifier whose head is trained in full.
        labels: classes of the head, at least 2 (classify only).
        dtype: of the base: auto, float32 or bfloat16.
        r, alpha, targets, train: the adapter; train is 'both', or 'b' (A stays at its random start).
        seed: of the adapter's start, which every party must share. It is no secret.
    Raises: UserError for what cannot be loaded, or targets that the model lacks.
    """
    _check_kind(kind)
    quiet()
    folder = resolve(name)
    base = _load_base(folder, name, kind, labels, resolve_dtype(dtype, kind), device)
    model = add_adapter(base, kind, name=name, r=r, alpha=alpha, targets=targets, train=train, seed=seed)
    return model, _tokenizer(folder, name)


def empty_model(name: str, kind: str = "labels", *, labels: int = 2, **adapter: object) -> "PeftModel":
    """The same model with shapes only (device 'meta', no weights read): for counting. `adapter` as in `load_model`."""
    _check_kind(kind)
    quiet()
    auto = _auto_class(kind)
    config = _config(resolve(name), name, kind, labels)
    with torch.device("meta"):
        base = auto.from_config(config)
        return add_adapter(base, kind, name=name, **adapter)


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
    """Put a fresh LoRA adapter (and for 'classify' a fresh head) onto a base model, in float32."""
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.utils import ModulesToSaveWrapper

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
    base.name_or_path = name  # what the saved adapter names as its base: not the cache folder of this machine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(train == "both" or "lora_A" not in key)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save["default"].register_forward_pre_hook(_cast_input)
    init_adapter(model, seed)
    return model.eval()


def init_adapter(model: nn.Module, seed: int) -> None:
    """LoRA's usual start, from a seed: A uniform in +-1/sqrt(in features), B zero, a head's weights N(0, .02^2).

    The bound is Kaiming's with a = sqrt 5. Draws from a generator of its own, in the order of the parameters' names.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(model.named_parameters()):
        if parameter.is_meta or not ("lora_" in key or ".modules_to_save." in key):
            continue
        if "lora_A" in key:
            bound = 1 / math.sqrt(parameter.shape[1])
            start = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
        elif "lora_B" in key or parameter.ndim < 2:
            start = torch.zeros(parameter.shape)
        else:
            start = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.data.copy_(start)


def save_adapter(model: "PeftModel", path: Path) -> None:
    """Write the adapter so that `PeftModel.from_pretrained(base, path)` loads it; no model card, no network."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    config = model.peft_config["default"]
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(path)
    config.inference_mode = training
    part = path / (ADAPTER_WEIGHTS + ".part")
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, part, metadata={"format": "pt"})
    part.replace(path / ADAPTER_WEIGHTS)


def load_adapter(model: "PeftModel", path: Path) -> None:
    """Put a saved adapter's weights into a model of the same shape. Raises UserError where they do not fit."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected a saved adapter")
    try:
        loaded = set_peft_model_state_dict(model, load_file(file))
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the model: {str(error).splitlines()[-1].strip()}") from error
    missing = [key for key in loaded.missing_keys if "lora_" in key or ".modules_to_save." in key]
    if missing or loaded.unexpected_keys:
        raise UserError(f"{file} does not fit the model: {(missing + list(loaded.unexpected_keys))[0]}")


def resolve_dtype(name: str, kind: str = "labels") -> str:
    """'float32' or 'bfloat16': as named, or for 'auto' the faster by a short measurement (a head needs float32)."""
    if name != "auto":
        if name not in ("float32", "bfloat16"):
            raise UserError(f"model.dtype={name}: expected auto, float32 or bfloat16")
        return name
    if kind == "classify":
        return "float32"
    return "bfloat16" if _matmul_seconds("float32") >= BFLOAT16_GAIN * _matmul_seconds("bfloat16") else "float32"


def _matmul_seconds(dtype: str) -> float:
    """Best of a few products of the size that a small LLM makes."""
    left, right = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((512, 576), (1536, 576)))
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        nn.functional.linear(left, right)
        best = min(best, time.perf_counter() - start)
    return best


def resolve(name: str) -> str:
    """What transformers can load: an asset's folder, a folder with its GGUF file converted, or a hub id unchanged."""
    if name in ASSETS:
        if ASSETS[name].kind != "model":
            models = ", ".join(key for key, asset in ASSETS.items() if asset.kind == "model")
            raise UserError(f"model.name={name} is a data source; expected a model such as {models}")
        path = fetch(name)
    else:
        path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"{path}: expected config.json or one .gguf file there, found {len(files)} of these")
        path = files[0]
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model.name={name}: no such file")
        return str(converted(path))
    if path.is_dir():
        return str(path)
    if path.exists():
        raise UserError(f"model.name={name}: expected a folder, a .gguf file, a demo asset or a hub id")
    return name


def check_targets(model: nn.Module, targets: Sequence[str], name: str) -> None:
    """Raise UserError, naming what there is, unless each target is the (end of the) name of a linear module."""
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    missing = [target for target in targets if not any(f".{key}".endswith(f".{target}") for key in linear)]
    if missing or not targets:
        there = ", ".join(sorted({key.rpartition(".")[2] for key in linear}))
        which = ", ".join(missing) or "(none named)"
        raise UserError(f"lora.targets: {name} has no linear module {which}; it has {there}")


def quiet() -> None:
    """No progress bars and no advice from transformers: standard output and error belong to the command line."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's linear layer


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"task.kind={kind}: expected one of {', '.join(KINDS)}")


def _auto_class(kind: str) -> type:
    import transformers

    return transformers.AutoModelForSequenceClassification if kind == "classify" else transformers.AutoModelForCausalLM


def _config(source: str, name: str, kind: str, labels: int) -> "PretrainedConfig":
    from transformers import AutoConfig

    more = {"num_labels": labels} if kind == "classify" else {}
    try:
        return AutoConfig.from_pretrained(source, **more)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error


def _load_base(source: str, name: str, kind: str, labels: int, dtype: str, device: str) -> nn.Module:
    auto = _auto_class(kind)
    config = _config(source, name, kind, labels)
    # For short texts on a CPU eager attention is 1.3 times as fast as the fused kernel.
    attention = "eager" if device == "cpu" else None
    try:
        model = auto.from_pretrained(
            source, config=config, dtype=getattr(torch, dtype), attn_implementation=attention
        ).to(device)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    if kind == "classify" and model.config.pad_token_id is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model


def _tokenizer(source: str, name: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    if not tokenizer.is_fast:
        raise UserError(f"model.name={name}: expected a model with a fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _cannot_load(name: str, error: Exception) -> UserError:
    models = ", ".join(key for key, asset in ASSETS.items() if asset.kind == "model")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"model.name={name}: cannot be loaded ({reason}); expected {models}, a hub id, a folder or a GGUF file"
    )


def _head_name(model: nn.Module) -> str:
    names = [key for key, _ in model.named_children() if key in ("classifier", "score")]
    if not names:
        raise UserError(f"task.kind=classify: {type(model).__name__} has no head named classifier or score")
    return names[0]


def _cast_input(module: nn.Module, arguments: tuple) -> tuple:
    """The head is float32 whatever the base's dtype."""
    return (arguments[0].to(next(module.parameters()).dtype), *arguments[1:])
