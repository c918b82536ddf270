"""A base model from a demo asset, a hub id, a folder or a GGUF file, with its adapter and its tokenizer."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedllm.adapters import add_adapter, open_adapter
from fedllm.data.assets import ASSETS, fetch
from fedllm.errors import UserError
from fedllm.gguf_cache import converted

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("labels", "classify", "text")
SLOW = 3.0  # times as long as in float32, beyond what a busy machine does to a measurement
MEASURED = 0.3  # seconds after which no other product is timed
BFLOAT16_GAIN = 1.5  # bfloat16 is taken when its matrix products are this many times faster


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
    adapter: Path | None = None,
    device: str = "cpu",
) -> tuple["PeftModel", "PreTrainedTokenizerBase"]:
    """A frozen base model with a fresh float32 LoRA adapter, dropout off, and its tokenizer.

    Args:
        name: demo asset, hub id, folder, or GGUF file.
        kind: 'labels' and 'text' load a causal LM; 'classify' a sequence classifier whose head is trained in full.
        labels: classes of the head, at least 2 (classify only).
        dtype: of the base: auto, float32 or bfloat16.
        r, alpha, targets, train: the adapter; train is 'both', 'b' (A stays at its start) or 'core' (a core between fixed A and B).
        seed: of the adapter's start, which every party must share. It is no secret.
        adapter: folder of a saved adapter, which takes the place of the fresh one.
    Raises: UserError for what cannot be loaded, or targets that the model lacks.
    """
    _check_kind(kind)
    quiet()
    folder = resolve(name)
    base = _load_base(folder, name, kind, labels, resolve_dtype(dtype, kind), device)
    if adapter is not None:
        model = open_adapter(base, adapter, name)
    else:
        model = add_adapter(base, kind, name=name, r=r, alpha=alpha, targets=targets, train=train, seed=seed)
    return model, _tokenizer(folder, name)


def load_writer(name: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A causal LM as it is, without an adapter, and its tokenizer: it writes public text. name, and what is raised, as in `load_model`."""
    quiet()
    folder = resolve(name)
    return _load_base(folder, name, "text", 2, resolve_dtype("auto"), "cpu"), _tokenizer(folder, name)


def empty_model(name: str, kind: str = "labels", *, labels: int = 2, **adapter: object) -> "PeftModel":
    """The same model with shapes only (device 'meta', no weights read): for counting. `adapter` as in `load_model`."""
    _check_kind(kind)
    quiet()
    auto = _auto_class(kind)
    config = _config(resolve(name), name, kind, labels)
    with torch.device("meta"):
        base = auto.from_config(config)
        return add_adapter(base, kind, name=name, **adapter)


def default_device() -> str:
    """Where a model is trained: a rank's own GPU, or the CPU where there is none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(name: str, kind: str = "labels") -> str:
    """'float32' or 'bfloat16': as named, or for 'auto' the faster by a short measurement (a head needs float32)."""
    if name != "auto":
        if name not in ("float32", "bfloat16"):
            raise UserError(f"model.dtype={name}: expected auto, float32 or bfloat16")
        return name
    if kind == "classify":
        return "float32"
    return "bfloat16" if _matmul_seconds("float32") >= BFLOAT16_GAIN * _matmul_seconds("bfloat16") else "float32"


def warn_if_slow(dtype: str) -> None:
    """Say in the open where a dtype that was asked for takes far longer than float32; a GPU is not measured."""
    if dtype == "float32" or default_device() != "cpu":
        return
    times = _matmul_seconds(dtype) / _matmul_seconds("float32")
    if times > SLOW:
        print(
            f"warning: model.dtype={dtype}: a matrix product takes {times:.0f} times as long as with float32 on this processor; "
            "model.dtype=auto takes the faster",
            file=sys.stderr,
        )


def _matmul_seconds(dtype: str) -> float:
    """Best of a few products of the size that a small LLM makes. Processors without bfloat16 take seconds for one: two have to do there."""
    left, right = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((512, 576), (1536, 576)))
    best, begun = math.inf, time.perf_counter()
    for count in range(8):
        start = time.perf_counter()
        nn.functional.linear(left, right)
        best = min(best, time.perf_counter() - start)
        if count and time.perf_counter() - begun > MEASURED:
            break
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


def quiet() -> None:
    """No progress bars and no advice from transformers: standard output and error belong to the command line."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


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
    attention = "eager" if default_device() == "cpu" else None
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
