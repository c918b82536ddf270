"""What a run holds in memory, by formulas: no weights are read and nothing is allocated. Every function here is pure.

Activations are what autograd saves between forward and backward of one batch. The base is frozen, so its linear layers save nothing of
their input; what stays, in bytes a token and layer (d hidden, q heads x head size, I intermediate, H heads, S tokens of a row, b bytes of
a number of the base, i_t the input width of LoRA target t; a fresh adapter is float32):

    norms          2 * 4d      RMSNorm works in float32; LayerNorm saves 2 * b d
    attention      3 * b q     queries, and keys and values repeated to all heads
      eager        (4 + b) H S, or 4 H S with b = 4: softmax in float32, and its copy in the base's type
      fused        b q + 4 H   the output and the log-sum-exp instead
    MLP            3 * b I     gate before and after its activation, and up; b I without a gate
    LoRA           sum 4 i_t + 4 r     with b = 4 targets of one input share it; with A frozen (`lora.train: b`) 4 r alone

Each layer checkpointed keeps b d a token instead, and one layer as above while it is computed again. Once a batch come 4 d of the last norm
and, for next-token tasks, 4 V of the log-softmax over a vocabulary of V. The first layer saves a little less than this (its input needs
no gradient).

Working memory is what is alive on top when most is: temporaries, less what backward has let go of by then. It is the largest of

    logits         8 V, and b V with b < 4      end of forward: logits, their float32 copy, and that once more with V last; before any layer
                                                that is checkpointed is computed again
    last norm      5 * 4d for RMSNorm           before any layer lets go
    MLP            3 * b I + b d                of the last layer; 2 * b I without a gate. 4 V and the last norm are gone
    attention      8 H S + b d, less b H S with b < 4      eager: gradients of the softmax; the layer's MLP and second norm are gone too

What an allocator keeps of freed memory is not counted: on Linux MALLOC_MMAP_THRESHOLD_=1048576 has it give back the large blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dr_encoder.codecs.autoencoder import BAND, WINDOW
from dr_encoder.codecs.kronecker import KEPT as KRONECKER_KEPT
from dr_encoder.codecs.kronecker import MAX_COLUMNS as KRONECKER_COLUMNS
from dr_encoder.codecs.linear import PIECE
from fedllm.errors import UserError

FLOAT = 4
ITEM = {"float32": 4, "bfloat16": 2}
ATTENTIONS = ("fused", "eager")
SHARED_INPUTS = {name: "attention" for name in ("q_proj", "k_proj", "v_proj", "query", "key", "value")} | {
    name: "mlp" for name in ("gate_proj", "up_proj")
}
STATES = {"sgd": 0, "fedavg": 0, "momentum": 1, "fedavgm": 1, "adagrad": 1, "fedadagrad": 1}  # numbers kept for each of the adapter's
MOST_STATES = 2  # Adam and its like
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's own stage3_max_live_parameters
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Geometry:
    """What of a transformer decides its activations. `lora`: (name, input width) of each target in one layer."""

    layers: int
    hidden: int
    heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    gated: bool
    rms_norm: bool
    lora: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Ranks:
    """How memory is divided. mode: `clients` (every rank holds all) or `data` (ZeRO `stage` divides).

    offload: whether a stage-3 base stays in host memory; live: parameters gathered at once in stage 3; checkpointing: of activations.
    """

    count: int = 1
    mode: str = "clients"
    stage: int = 0
    offload: bool = False
    live: int = LIVE_PARAMETERS
    checkpointing: bool = False


def geometry(model: Any) -> Geometry:
    """Read the sizes off a PEFT model, one without weights too (`models.empty_model`)."""
    config = model.config
    names = [name for name, _ in model.named_modules()]
    kinds = {type(module).__name__ for module in model.modules()}
    heads = config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    targets = {name.rpartition(".")[2]: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return Geometry(
        config.num_hidden_layers,
        config.hidden_size,
        heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        inner,
        config.vocab_size,
        any(name.endswith("gate_proj") for name in names),
        any("RMSNorm" in kind for kind in kinds),
        tuple((name, module.in_features) for name, module in targets.items()),
    )


def layer_bytes(shape: Geometry, rank: int, width: int, item: int, attention: str = "fused", train_a: bool = True) -> int:
    """Activations that one layer saves for one token; see the module's docstring.

    rank: of LoRA. width: S, tokens of a row. item: b. attention: fused | eager. train_a: whether A is trained, so that its input is kept.
    """
    across = shape.heads * shape.head_size
    norms = 2 * (FLOAT if shape.rms_norm else item) * shape.hidden
    softmax = (FLOAT + (item if item < FLOAT else 0)) * shape.heads * width
    scores = softmax if attention == "eager" else item * across + FLOAT * shape.heads
    mlp = (3 if shape.gated else 1) * item * shape.intermediate
    inputs = {(SHARED_INPUTS.get(name, name) if item == FLOAT else name): size for name, size in shape.lora}
    lora = FLOAT * (rank * len(shape.lora) + (sum(inputs.values()) if train_a else 0))
    return norms + 3 * item * across + scores + mlp + lora


def activation_bytes(shape: Geometry, tokens: int, layer: int, item: int, *, checkpointing: bool = False, next_token: bool = False) -> int:
    """Activations saved for a batch of `tokens`: all layers, or with checkpointing their inputs and one layer. layer: see `layer_bytes`."""
    layers = shape.layers * item * shape.hidden + layer if checkpointing else shape.layers * layer
    last = FLOAT * shape.hidden + (FLOAT * shape.vocabulary if next_token else 0)
    return tokens * (layers + last)


def working_bytes(
    shape: Geometry,
    tokens: int,
    width: int,
    layer: int,
    item: int,
    attention: str = "fused",
    *,
    checkpointing: bool = False,
    next_token: bool = False,
) -> int:
    """What is alive on top of `activation_bytes` when most is, for `tokens`: see the module. Arguments as of `layer_bytes`."""
    narrow = item if item < FLOAT else 0
    scores = shape.heads * width
    norm = (FLOAT if shape.rms_norm else item) * shape.hidden
    logits = FLOAT * shape.vocabulary if next_token else 0
    recomputed = layer if checkpointing else 0  # not there yet
    mlp = (3 if shape.gated else 1) * item * shape.intermediate
    gone = logits + FLOAT * shape.hidden
    moments = [
        2 * logits + (narrow * shape.vocabulary if next_token else 0) - recomputed,
        (5 if shape.rms_norm else 2) * norm - logits - recomputed,
        (3 if shape.gated else 2) * item * shape.intermediate + item * shape.hidden - gone,
    ]
    if attention == "eager":
        moments.append((2 * FLOAT - narrow) * scores + item * shape.hidden - gone - mlp - norm)
    return tokens * max(0, *moments)


def weight_bytes(base: int, trained: int, item: int, ranks: Ranks) -> int:
    """The base's weights and the float32 adapter on one rank. base, trained: numbers in each.

    ZeRO 3 divides the base, and gathers up to `live` parameters at a time; offloaded only these are on the rank.
    """
    if ranks.mode != "data" or ranks.stage < 3:
        return item * base + FLOAT * trained
    share = 0 if ranks.offload else -(-base // ranks.count)
    return item * (share + min(base - share, ranks.live)) + FLOAT * trained


def optimizer_bytes(trained: int, optimizer: str, ranks: Ranks) -> int:
    """Gradients of the adapter, and where the server is: its copy, the update, the optimiser's moments, the new adapter.

    ZeRO divides the gradients from stage 2 on.
    """
    gradients = -(-trained // ranks.count) if ranks.mode == "data" and ranks.stage >= 2 else trained
    return FLOAT * (gradients + trained * (3 + STATES.get(optimizer, MOST_STATES)))


def update_bytes(trained: int, units: int, chunk: int) -> int:
    """Updates of single units held at once: a chunk that is being coded, and the next, where a cohort of `units` has more than one.

    chunk: bytes that the engine gives to one (at least one update).
    """
    rows = max(1, chunk // (FLOAT * trained))
    return FLOAT * trained * min(units, rows if units <= rows else 2 * rows)


def public_bytes(trained: int, examples: int) -> int:
    """Gradients of the public examples that a codec is fitted to."""
    return FLOAT * trained * examples


def dense_numbers(model: Any) -> int:
    """Numbers in a dense matrix beside every LoRA layer of a PEFT model: exact averages of products go there."""
    return sum(module.in_features * module.out_features for module in model.modules() if hasattr(module, "lora_A"))


# Codecs that are fitted to a prior, chains aside: bytes of what is kept. (n, k, factors as (rows, columns)) -> bytes.
Stored = Callable[[int, int, list[tuple[int, int]]], int]
STORED: dict[str, Stored] = {
    "linear": lambda n, k, factors: FLOAT * k * (n + 1),
    "coordinate": lambda n, k, factors: 12 * k,
    "allocation": lambda n, k, factors: 2 * FLOAT * n,
    "kronecker": lambda n, k, factors: _kronecker(k, factors),
}
# The same: bytes on top while it is fitted, beside the rows it is fitted to; measured. (stored, n, rows, factors) -> bytes.
FITTING: dict[str, Callable[[int, int, int, list[tuple[int, int]]], int]] = {
    "linear": lambda stored, n, rows, factors: 2 * FLOAT * min(PIECE, rows * n),
    "kronecker": lambda stored, n, rows, factors: 5 * FLOAT * rows * max(p * q for p, q in factors) + _bases(factors),
    "autoencoder": lambda stored, n, rows, factors: FLOAT * (n + max(11 * min(n, WINDOW), 4 * min(n, BAND * 3 // 2))),
}


def _kronecker(k: int, factors: list[tuple[int, int]]) -> int:
    """At most: the numbers are spread over all factors, and each takes a row and a column of its own where a side has one left."""
    each = -(-k // len(factors))
    columns = sum(p * min(p, each, KRONECKER_COLUMNS) + q * min(q, each, KRONECKER_COLUMNS) for p, q in factors)
    return FLOAT * (columns + 2 * k)


def _bases(factors: list[tuple[int, int]]) -> int:
    """Those of both sides of a factor, which kronecker's fit keeps of all where they are small together, else of one while it is made."""
    sizes = [sum(side * min(side, KRONECKER_COLUMNS) for side in factor) for factor in factors if min(factor) > 1]
    return FLOAT * (sum(sizes) if sum(sizes) <= KRONECKER_KEPT else 2 * max(sizes, default=0))


def parse_bytes(text: str) -> int:
    """'24GiB', '80 GB', '512MiB' or a number of bytes. Raises UserError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS or not float(found[1]) > 0:
        raise UserError(f"--memory {text}: expected a size such as 24GiB, 80GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def read_deepspeed(path: Path, count: int, mode: str) -> Ranks:
    """What a DeepSpeed file says of memory: ZeRO stage, parameter offload, live parameters, activation checkpointing.

    mode: parallel.mode; `none` means data where a stage divides something, clients where not. Raises UserError for what is no such file.
    """
    try:
        given = json.loads(path.read_text())
        zero = given.get("zero_optimization") or {}
        stage = zero.get("stage", 0)
        live = zero.get("stage3_max_live_parameters", LIVE_PARAMETERS)
        offload = (zero.get("offload_param") or {}).get("device", "none") not in ("none", None)
        checkpointing = bool(given.get("activation_checkpointing"))
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or "no JSON object of DeepSpeed's settings"
        raise UserError(f"{path}: {reason}; expected a DeepSpeed file") from None
    if stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage={stage}: expected 0, 1, 2 or 3")
    chosen = mode if mode != "none" else "data" if stage else "clients"
    numeric = isinstance(live, int | float) and not isinstance(live, bool)  # "auto" leaves it to DeepSpeed
    return Ranks(count, chosen, stage, offload, int(live) if numeric else LIVE_PARAMETERS, checkpointing)
