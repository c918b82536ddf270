"""What a run would take, before there are weights or a GPU: parameters, bytes, memory, epsilon by round, expected noise, cohort needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from dr_encoder.codecs import CODECS
from dr_encoder.codecs.autoencoder import WIDTHS, ConvAutoEncoder, image_shape, required_code_size
from dr_encoder.codecs.chain import WIDER
from dr_encoder.layout import AdapterLayout
from fedllm import plan_memory as memory
from fedllm.aggregation import AGGREGATIONS
from fedllm.codec_fit import MOST_AUTO, SIGNAL_SHARE, check_sizes
from fedllm.combinations import held_out_rows
from fedllm.errors import UserError
from fedllm.evaluation import downlink_bytes, message_bytes
from fedllm.formats import bytes_text
from fedllm.models import empty_model
from fedllm.plan_privacy import group_count, needs, noise_to_signal, planned_sums, privacy_of
from fedllm.release import PrivateSum
from fedllm.run import calibrate, resolve
from fedllm.schema import Config
from fedllm.training.engine import CHUNK_BYTES

Phase = Callable[..., AbstractContextManager[Callable[[int], None]]]
SIGNAL = (
    "every unit's code has the clip norm, and a share {share:g} of its energy is the mean update's, the rest cancels like noise; "
    "the default share is the one `codec.code_size: auto` takes, measured on public text"
)
HINTS = {
    "weights": "model.dtype=bfloat16, or ZeRO 3 with parallel.mode=data",
    "activations": "a smaller engine.batch_tokens, or activation checkpointing",
    "working": "a smaller engine.batch_tokens",
    "codec": "codec.family=kronecker stores little, or a smaller codec.code_size",
    "updates": "a smaller codec.public_examples",
    "dense": "fewer lora.targets, or federation.aggregation=mean",
    "optimizer": "a smaller lora.r or fewer lora.targets",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked beside the config.

    model_config: folder whose config.json stands in for model.name. ranks: how memory is divided. attention: fused | eager. limit: bytes
    of a rank, or None. units: privacy units over all clients, where they are no clients. signal_share: in (0, 1], see SIGNAL. threshold:
    noise over signal > 0 that a needed cohort or population must reach.
    """

    model_config: Path | None = None
    ranks: memory.Ranks = dataclasses.field(default_factory=memory.Ranks)
    attention: str = "fused"
    limit: int | None = None
    units: int | None = None
    signal_share: float = SIGNAL_SHARE
    threshold: float = 1.0


@dataclasses.dataclass(frozen=True)
class Code:
    """A codec that is not fitted: numbers sent, bytes kept (in a file and in memory), bytes on top while it is fitted."""

    size: int
    stored: int
    fitting: int


def plan(config: Config, asked: Question, phase: Phase) -> dict[str, Any]:
    """Everything `fedllm plan --json` prints. Raises UserError for what cannot be planned."""
    config = resolve(config)
    units = unit_count(config, asked.units)
    with phase("the model's shapes"):
        model = empty(config, asked.model_config)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    layout = AdapterLayout.of(trained.items())
    base = sum(value.numel() for value in model.parameters()) - layout.size
    shape = memory.geometry(model)
    code = code_of(config, layout)
    with phase("the noise that the target takes"):
        calibration = calibrate(config, units, group_count(config, layout))
    sums = planned_sums(config, calibration, units, code.size, layout)
    last = sums[-1]
    with phase("epsilon by round"):
        privacy = privacy_of(config, sums, units, calibration)
    noise = noise_to_signal(last, asked.signal_share)
    with phase("cohort and population for the target"):
        needed = needs(config, code.size, layout, asked.signal_share, asked.threshold) if last.private else None
    dense = memory.dense_numbers(model) if AGGREGATIONS[config.federation.aggregation].each else 0
    held = memory_of(config, asked, shape, base, layout, code, last, dense)
    found = {
        "method": config.method,
        "model": {
            "name": config.model.name,
            "class": type(model.get_base_model()).__name__,
            "shapes_from": str(asked.model_config) if asked.model_config else config.model.name,
            "dtype": config.model.dtype,
        },
        "parameters": base,
        "trainable_parameters": layout.size,
        "update_size": layout.size,
        "code_size": code.size,
        "clients": config.federation.clients,
        "units": units,
        "expected_cohort": last.expected,
        "rounds": config.federation.rounds,
        "bytes": bytes_of(config, sums, layout.size, code, dense),
        "memory": held,
        "privacy": privacy,
        "noise_to_signal": noise,
        "assumption": SIGNAL.format(share=asked.signal_share),
        "needs": needed,
    }
    return found | {"warnings": warnings(config, asked, found, units)}


def unit_count(config: Config, given: int | None) -> int:
    """Privacy units over all clients: the clients, or what `--units` says. Raises UserError where it must say and does not."""
    unit = config.privacy.unit
    if unit == "client":
        return config.federation.clients
    if given is None or given < 1:
        raise UserError(f"--units: expected the number of {unit}s over all clients with privacy.unit={unit}; the data is not read")
    return given


def model_folder(config: Config, config_file: Path) -> Path | None:
    """`models/NAME/config.json` beside the config file, where it stands in for a hub id OWNER/NAME that cannot be reached."""
    folder = config_file.parent / "models" / config.model.name.rpartition("/")[2]
    return folder if (folder / "config.json").is_file() and not Path(config.model.name).exists() else None


def empty(config: Config, folder: Path | None) -> Any:
    """The model with its adapter, shapes only. A head's classes are those of task.words, two where it names none."""
    if folder is not None and not (folder / "config.json").is_file():
        raise UserError(f"--model-config {folder}: expected a folder with config.json")
    lora = {name: getattr(config.lora, name) for name in ("r", "alpha", "targets", "train")}
    name = config.model.name if folder is None else str(folder)
    try:
        return empty_model(name, config.task.kind, labels=max(2, len(config.task.words or [])), **lora)
    except UserError as error:
        if folder is None and "cannot be loaded" in str(error):
            raise UserError(f"{error}; `--model-config FOLDER` plans from a config.json alone") from None
        raise


def code_of(config: Config, layout: AdapterLayout) -> Code:
    """The config's codec for updates of this layout. `code_size: auto` counts as the longest code that it considers.

    Raises UserError for a code longer than the update, or a family that says nothing of its size.
    """
    settings, n = config.codec, layout.size
    check_sizes(config, n)
    size = min(MOST_AUTO, n) if settings.code_size == "auto" else settings.code_size
    factors = [(factor.shape[0], factor.size // factor.shape[0]) for factor in layout.factors]
    diagonal = settings.prior == "moments" and settings.family in ("linear", "kronecker")
    family = "coordinate" if diagonal else settings.family
    if family == "autoencoder":
        size = required_code_size(n)
        with torch.device("meta"):
            weights = ConvAutoEncoder(image_shape(n), WIDTHS).state_dict().values()
        stored = sum(4 * weight.numel() for weight in weights) + 4 * size + 12 * len(factors)
    elif family == "chain":
        outer, inner = settings.parts
        between = n if outer == "allocation" else min(WIDER * size, n)
        stored = memory.STORED[outer](n, between, factors) + memory.STORED[inner](between, size, factors)
    elif family in memory.STORED:
        size = n if size is None else size
        stored = memory.STORED[family](n, size, factors)
    elif not CODECS[family].fits:
        try:
            codec = CODECS[family].fit(None, layout, size, 0.0, 0)
        except ValueError as error:  # fewer numbers than the family needs
            raise UserError(f"codec.family={family}: {error}") from None
        size, stored = codec.code_size, sum(tensor.nbytes for tensor in codec.state()[0].values())
    else:
        raise UserError(f"codec.family={family}: cannot be planned; expected one of {', '.join(sorted(memory.STORED))}")
    working = memory.FITTING.get(family, lambda *_: 0)(stored, n, public_rows(config), factors)
    if family == "chain":  # the rows as the first part encodes them (which scales by pieces for a subspace), and what the second takes
        copied = 0 if (outer, inner) == ("allocation", "linear") else public_rows(config)
        working = memory.FLOAT * copied * between + memory.FITTING[inner](stored, between, public_rows(config), factors)
    return Code(size, stored, working)


def bytes_of(config: Config, sums: list[PrivateSum], update_size: int, code: Code, dense: int = 0) -> dict[str, Any]:
    """What travels: a whole message (its header is that of a clip norm of 1; another is some bytes longer or shorter), and the downlink.

    `down` is the mean over the rounds: the adapter, dense matrices of `dense` numbers, and the codec where clients take the server's copy.
    """
    last, message = sums[-1], message_bytes(sums[-1])
    fetched = code.stored if config.codec.fit_at == "server" else 0
    same, new = (
        4 * dense + downlink_bytes({"adapter": torch.empty(update_size)}, fetched, last.unit, refitted) for refitted in (False, True)
    )
    refits = refit_count(config)
    down = round((new * refits + same * (config.federation.rounds - refits)) / config.federation.rounds)
    senders = last.expected if last.unit == "client" else last.clients
    return {
        "message": message,
        "message_stage1": message_bytes(sums[0]) if config.codec.prior == "moments" else None,
        "down": down,
        "codec": code.stored,
        "update": 4 * update_size,
        "compression_ratio": 4 * update_size / message,
        "up_per_round": round(message * senders),
        "down_per_round": round(down * senders),
    }


def refit_count(config: Config) -> int:
    """In how many rounds there is a new codec."""
    codec, rounds = config.codec, config.federation.rounds
    return 1 if codec.prior == "moments" or codec.refresh == 0 else -(-rounds // codec.refresh)


def public_rows(config: Config) -> int:
    """Public gradients held at once: all, or those for the clip norm where there is no prior to fit; those of a step of the warm start."""
    if config.task.public is None:
        return 0
    held = held_out_rows(config.codec.public_examples) if config.codec.prior == "none" else config.codec.public_examples
    return max(held, config.federation.warm_start.examples if config.federation.warm_start.steps else 0)


def memory_of(
    config: Config, asked: Question, shape: memory.Geometry, base: int, layout: AdapterLayout, code: Code, last: PrivateSum, dense: int = 0
) -> dict[str, Any]:
    """Bytes on one rank by part, and their peak: what is always there, and the largest of a round's phases.

    dense: numbers in the dense matrices that exact averages of products go into.
    """
    ranks, item, n = asked.ranks, memory.ITEM[config.model.dtype], layout.size
    text = config.task.kind == "text"
    width = config.task.max_length
    rows = max(1, config.engine.batch_tokens // width)
    tokens = rows * width
    layer = memory.layer_bytes(shape, config.lora.r, width, item, asked.attention, config.lora.train == "both")
    saved = {
        checkpointing: memory.activation_bytes(shape, tokens, layer, item, checkpointing=checkpointing, next_token=text)
        for checkpointing in (False, True)
    }
    units = last.expected / (ranks.count if ranks.mode == "clients" else 1)
    given = public_rows(config)
    parts = {
        "weights": memory.weight_bytes(base, n, item, ranks),
        "dense": 4 * dense,
        "activations": saved[ranks.checkpointing],
        "working": memory.working_bytes(
            shape, tokens, width, layer, item, asked.attention, checkpointing=ranks.checkpointing, next_token=text
        ),
        "optimizer": memory.optimizer_bytes(n, config.federation.server.optimizer, ranks),
        "codec": code.stored * (2 if config.codec.fit_at == "client" else 1),
        "updates": memory.update_bytes(n, math.ceil(units), CHUNK_BYTES if config.federation.local.steps == 1 else 0),
        "public_gradients": memory.public_bytes(n, given),
        "remembered": memory.public_bytes(n, given * min(config.codec.public_memory, refit_count(config) - 1)),
    }
    phases = phases_of(config, parts, code, memory.public_bytes(n, min(given, rows)))
    peak = max(phases, key=phases.get)
    total = parts["weights"] + parts["dense"] + parts["optimizer"] + parts["remembered"] + phases[peak]
    device = parts["weights"] + parts["dense"] + parts["activations"] + parts["working"] + 4 * n
    return {
        **parts,
        "codec_fitting": code.fitting,
        "activations_checkpointed": saved[True],
        "activations_of_layer_and_token": layer,
        "tokens": tokens,
        "attention": asked.attention,
        "ranks": ranks.count,
        "parallel": ranks.mode,
        "zero_stage": ranks.stage,
        "offload": ranks.offload,
        "checkpointing": ranks.checkpointing,
        "peak_in": peak,
        "total": total,
        "model_alone": device,
        "limit": asked.limit,
        "fits": None if asked.limit is None else total <= asked.limit,
    }


def phases_of(config: Config, parts: dict[str, int], code: Code, batch_rows: int) -> dict[str, int]:
    """Bytes of a round's phases, on top of what is always there. batch_rows: of the public gradients of one batch.

    A row of gradients takes memory when it is written, after its batch's peak. Earlier chunks stay while the next one is made; the codec
    in force stays while the next one is fitted. A mixture of priors copies their rows twice over, and its own stay while a codec is fitted.
    """
    refits, memory_rows, rows = refit_count(config), parts["remembered"], parts["public_gradients"]
    batch = parts["activations"] + parts["working"]
    old = parts["codec"] if refits > 1 else 0
    mixed = memory_rows + rows if memory_rows or "+" in config.codec.prior else 0
    fitting = max(code.stored + code.fitting, mixed)
    remembers = rows if config.codec.public_memory else 0  # these are remembered from now on
    return {
        "public gradients": batch + old + max(0, rows - batch_rows) + (CHUNK_BYTES if rows > CHUNK_BYTES else 0),
        "fitting the codec": old + rows + mixed + fitting,
        "local training": batch + parts["updates"] + parts["codec"] + remembers + 2 * parts["dense"],  # sums of products, float64
        "averaging products": parts["codec"] + remembers + 5 * parts["dense"],  # sums, their mean, the new matrices
    }


def warnings(config: Config, asked: Question, found: dict[str, Any], units: int) -> list[str]:
    """One line for each thing that will not work."""
    ranks, privacy, ratio = asked.ranks, config.privacy, found["noise_to_signal"]
    alone = ranks.mode == "clients" and ranks.count > found["expected_cohort"]
    checks = {
        f"{ranks.count} ranks for {found['expected_cohort']:g} clients a round: parallel.mode=clients leaves some without work": alone,
        f"ZeRO {ranks.stage} divides nothing with parallel.mode=clients; expected data": ranks.mode == "clients" and ranks.stage > 0,
        f"privacy.target.delta={privacy.target.delta:g} is not below 1/{units}: it permits publishing one {privacy.unit} whole": (
            privacy.enabled and privacy.target.delta >= 1 / units
        ),
        f"the noise is expected to be {ratio or 0:.3g} times the signal: a shorter code, more clients or a larger epsilon": (
            ratio is not None and ratio > asked.threshold
        ),
        "codec.prior=real: the clients' gradients that the codec is fitted to are not counted in memory": config.codec.prior == "real",
        "federation.weights=examples is planned with equal weights; the heaviest client's epsilon is larger": (
            config.federation.weights == "examples"
        ),
        f"codec.code_size=auto is planned as its longest, {found['code_size']:,}": config.codec.code_size == "auto",
    }
    return [*too_large(found["memory"]), *(line for line, holds in checks.items() if holds)]


def too_large(held: dict[str, Any]) -> list[str]:
    """Why the run does not fit into the limit, and what would help; nothing where it fits."""
    if held["fits"] is not False:
        return []
    more = {"updates": held["public_gradients"] + held["remembered"], "codec": held["codec_fitting"], "dense": 4 * held["dense"]}
    sizes = {part: held[part] + more.get(part, 0) for part in HINTS}
    first, second = sorted(HINTS, key=sizes.get, reverse=True)[:2]
    named = "; ".join(f"{part} {bytes_text(sizes[part])} ({HINTS[part]})" for part in (first, second))
    line = f"{bytes_text(held['total'])} on a rank do not fit into {bytes_text(held['limit'])}; most are {named}"
    if held["model_alone"] <= held["limit"]:
        line += f"; weights, activations and gradients alone, {bytes_text(held['model_alone'])}, do fit: the rest may stay in host memory"
    return [line]
