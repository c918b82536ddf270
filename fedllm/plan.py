"""What a run would take, before there are weights or a GPU: parameters, bytes, memory, epsilon by round, expected noise, needed cohort."""

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
from dr_encoder.layout import AdapterLayout
from fedllm import plan_memory as memory
from fedllm.codec_fit import MOST_AUTO, SIGNAL_SHARE
from fedllm.errors import UserError
from fedllm.evaluation import adapter_bytes, message_bytes
from fedllm.federation import sampling_rate
from fedllm.formats import bytes_text
from fedllm.models import empty_model
from fedllm.privacy import adversaries
from fedllm.privacy.calibration import Calibration
from fedllm.release import PrivateSum
from fedllm.run import calibrate, resolve
from fedllm.schema import Config
from fedllm.training.engine import CHUNK_BYTES

Phase = Callable[..., AbstractContextManager[Callable[[int], None]]]
MOST_CLIENTS = 10**9
STEP = 1.02  # how finely needed cohorts and populations are found
POINTS = 20  # of the epsilon by round
BLANK = "0" * 16
SIGNAL = (
    "every unit's code has the clip norm, and a share {share:g} of its energy is the mean update's, the rest cancels like noise; "
    "the default share is the one `codec.code_size: auto` takes, measured on public text"
)
HINTS = {
    "weights": "divide them: ZeRO 3 with parallel.mode=data, or model.dtype=bfloat16",
    "activations": "a smaller engine.batch_tokens, or activation checkpointing",
    "working": "a smaller engine.batch_tokens",
    "codec": "codec.family=kronecker stores little, or a smaller codec.code_size",
    "updates": "a smaller codec.public_examples",
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
    """A codec that is not fitted: numbers sent, bytes kept (file and, with what is derived, memory), bytes on top while it is fitted."""

    size: int
    stored: int
    held: int
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
        calibration = calibrate(config, units)
    sums = planned_sums(config, calibration, units, code.size, 2 * len(layout.factors))
    last = sums[-1]
    with phase("epsilon by round"):
        privacy = privacy_of(config, sums, units, calibration)
    noise = noise_to_signal(last, asked.signal_share)
    with phase("cohort and population for the target"):
        needed = needs(config, asked, code.size) if last.private else None
    held = memory_of(config, asked, shape, base, layout, code, last)
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
        "bytes": bytes_of(sums, layout.size, code),
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
    size = min(MOST_AUTO, n) if settings.code_size == "auto" else settings.code_size
    if size is not None and size > n:
        raise UserError(f"codec.code_size={size}: expected at most {n}, the number of trained parameters")
    rows = settings.public_examples if config.task.public is not None else 0
    factors = [(factor.shape[0], factor.size // factor.shape[0]) for factor in layout.factors]
    diagonal = settings.prior == "moments" and settings.family in ("linear", "kronecker")
    family = "coordinate" if diagonal else settings.family
    derived = 0
    if family == "autoencoder":
        size = required_code_size(n)
        with torch.device("meta"):
            weights = ConvAutoEncoder(image_shape(n), WIDTHS).state_dict().values()
        stored = sum(4 * weight.numel() for weight in weights) + 4 * size + 12 * len(factors)
        derived = 4 * n  # the scale of each coordinate
    elif family in memory.STORED:
        stored = memory.STORED[family](n, size, factors)
    elif not CODECS[family].needs_prior:
        codec = CODECS[family].fit(None, layout, size, 0.0, 0)
        size, stored = codec.code_size, sum(tensor.nbytes for tensor in codec.state()[0].values())
    else:
        raise UserError(f"codec.family={family}: cannot be planned; expected one of {', '.join(sorted(memory.STORED))}")
    working = memory.FITTING.get(family, lambda *_: 0)(stored, n, rows, max(p * q for p, q in factors))
    return Code(size, stored, stored + derived, working)


def planned_sums(config: Config, calibration: Calibration | None, units: int, size: int, moments: int) -> list[PrivateSum]:
    """Every private sum of the run, in order, as the federation would describe it; a clip norm that is found on the way counts as 1.

    moments: numbers of a stage-1 message.
    """
    fed, privacy = config.federation, config.privacy
    rate = sampling_rate(config)
    norm = privacy.clip.norm if privacy.clip.norm != "auto" else 1.0
    warmup = config.codec.warmup_rounds if config.codec.prior == "moments" else 0
    multipliers = (calibration.stage1_multiplier, calibration.stage2_multiplier) if calibration else (0.0, 0.0)

    def one(stage: int, number: int) -> PrivateSum:
        return PrivateSum(
            run=BLANK,
            stage=stage,
            round=number,
            codec="moments" if stage == 1 else BLANK,
            prior="none",
            size=moments if stage == 1 else size,
            clip=float(norm) if privacy.enabled else math.inf,
            noise=privacy.noise,
            noise_in="code" if stage == 1 else privacy.noise_in,
            noise_multiplier=multipliers[stage - 1] or 0.0,
            shares=fed.max_cohort if privacy.unit == "client" else fed.clients,
            sampling_rate=rate,
            max_cohort=fed.max_cohort if privacy.unit == "client" else None,
            expected=rate * units,
            unit=privacy.unit,
            clients=fed.clients,
            bits=config.codec.bits,
            each=stage == 2 and config.codec.decode == "each",
        )

    return [one(1, number) for number in range(warmup)] + [one(2, number) for number in range(fed.rounds)]


def privacy_of(config: Config, sums: list[PrivateSum], units: int, calibration: Calibration | None) -> dict[str, Any]:
    """Both adversaries' epsilon at the end and by round, computed from the ledger that the run would write."""
    reasons = [why for why, holds in {"privacy disabled": not config.privacy.enabled, "fixed seed": config.seed is not None}.items() if holds]
    header = {
        "clients": config.federation.clients,
        "units": units,
        "unit": config.privacy.unit,
        "target": dataclasses.asdict(config.privacy.target),
        "private": not reasons,
        "why_not_private": reasons,
    }
    entries = [{"id": str(number), **each.ledger_entry("os")} for number, each in enumerate(sums)]
    rows = adversaries.epsilon_by_round(header, entries, ("pld",), POINTS) if config.privacy.enabled else []
    return {
        "private": not reasons,
        "why_not_private": reasons,
        "target": header["target"],
        "noise_multiplier": calibration.stage2_multiplier if calibration else None,
        "noise_multiplier_stage1": calibration.stage1_multiplier if calibration else None,
        "sampling_rate": sums[-1].sampling_rate,
        "max_cohort": sums[-1].max_cohort,
        "release": adversaries.epsilon_release(header, entries).as_json(),
        "server": adversaries.epsilon_server(header, entries).as_json(),
        "by_round": [
            {"stage": row["stage"], "round": row["round"] + 1, "release": row["release"]["pld"], "server": row["server"]} for row in rows
        ],
    }


def bytes_of(sums: list[PrivateSum], update_size: int, code: Code) -> dict[str, Any]:
    """What travels: a whole message (its header is that of a clip norm of 1; another is some bytes longer or shorter), the adapter."""
    last = sums[-1]
    message, adapter = message_bytes(last), adapter_bytes(torch.empty(update_size))
    return {
        "message": message,
        "message_stage1": message_bytes(sums[0]) if sums[0].stage == 1 else None,
        "adapter": adapter,
        "codec": code.stored,
        "update": 4 * update_size,
        "compression_ratio": 4 * update_size / message,
        "up_per_round": round(message * (last.expected if last.unit == "client" else last.clients)),
        "down_per_round": round(adapter * (last.expected if last.unit == "client" else last.clients)),
    }


def memory_of(
    config: Config, asked: Question, shape: memory.Geometry, base: int, layout: AdapterLayout, code: Code, last: PrivateSum
) -> dict[str, Any]:
    """Bytes on one rank by part, and their peak: weights and the server's state always, and the largest of a round's three phases."""
    ranks, item, n = asked.ranks, memory.ITEM[config.model.dtype], layout.size
    text = config.task.kind == "text"
    width = config.task.max_length
    tokens = max(1, config.engine.batch_tokens // width) * width
    layer = memory.layer_bytes(shape, config.lora.r, width, item, asked.attention, config.lora.train == "both")
    saved = {
        checkpointing: memory.activation_bytes(shape, tokens, layer, item, checkpointing=checkpointing, next_token=text)
        for checkpointing in (False, True)
    }
    parts = {
        "weights": memory.weight_bytes(base, n, item, ranks),
        "activations": saved[ranks.checkpointing],
        "working": memory.working_bytes(shape, tokens, layer, next_token=text),
        "optimizer": memory.optimizer_bytes(n, config.federation.server.optimizer, ranks),
        "codec": code.held,
        "updates": memory.update_bytes(n, math.ceil(last.expected / (ranks.count if ranks.mode == "clients" else 1)), CHUNK_BYTES),
    }
    rows = memory.public_bytes(n, config.codec.public_examples) if config.task.public is not None else 0
    batch = parts["activations"] + parts["working"]
    phases = {
        "public gradients": batch + rows + min(CHUNK_BYTES, rows),
        "fitting the codec": rows + code.held + code.fitting,
        "local training": batch + parts["updates"] + code.held,
    }
    peak = max(phases, key=phases.get)
    total = parts["weights"] + parts["optimizer"] + phases[peak]
    device = parts["weights"] + batch + 4 * n
    return {
        **parts,
        "public_gradients": rows,
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


def noise_to_signal(spec: PrivateSum, share: float) -> float | None:
    """Expected norm of the noise in a round's mean code over the norm of the rest, as the run reports it; None without noise.

    z C sqrt(k) / m over C sqrt(a + (1 - a) / m): noise multiplier z of the sum, clip norm C, code size k, expected cohort m, and the
    public assumption that a share a of each unit's energy is the mean update's while the rest averages out like noise. C cancels.
    """
    if not spec.private:
        return None
    kept = share + (1 - share) / max(spec.expected, 1.0)
    return spec.mean_std * math.sqrt(spec.size) / (spec.clip * math.sqrt(kept))


def needs(config: Config, asked: Question, code_size: int) -> dict[str, Any]:
    """The smallest expected cohort of these clients, and the smallest population for this cohort, that meet the target at the threshold.

    The noise is calibrated anew for each; `None` where none up to all clients (up to a billion clients) does.
    """
    if config.privacy.unit != "client":
        return {"noise_to_signal": asked.threshold, "cohort": None, "population": None, "reason": "counted for privacy.unit=client alone"}

    def ratio(clients: int, cohort: int) -> float:
        fed = dataclasses.replace(config.federation, clients=clients, expected_cohort=cohort, max_cohort=None)
        other = resolve(dataclasses.replace(config, federation=fed))
        try:
            sums = planned_sums(other, calibrate(other, clients), clients, code_size, 1)
        except UserError:  # no noise reaches the target there
            return math.inf
        return noise_to_signal(sums[-1], asked.signal_share)

    clients, cohort = config.federation.clients, config.federation.expected_cohort
    return {
        "noise_to_signal": asked.threshold,
        "cohort": least(lambda m: ratio(clients, m), 1, clients, asked.threshold),
        "population": least(lambda count: ratio(count, cohort), cohort, MOST_CLIENTS, asked.threshold),
        "reason": None,
    }


def least(ratio: Callable[[int], float], low: int, high: int, threshold: float) -> int | None:
    """The smallest whole number in [low, high], or at most STEP times it, whose ratio is within the threshold; None for none.

    ratio: falls. Interpolates in log-log scale, where it is nearly a line.
    """
    below, above = ratio(low), ratio(high)
    if below <= threshold:
        return low
    if above > threshold:
        return None
    trial = 0
    while high - low > 1 and high > STEP * low:
        share = math.log(below / threshold) / math.log(below / above) if math.isfinite(below) and trial % 3 < 2 else 0.5
        guess = round(math.exp(math.log(low) + min(max(share, 0.02), 0.98) * math.log(high / low)))
        guess, trial = min(max(guess, low + 1), high - 1), trial + 1
        at = ratio(guess)
        if at <= threshold:
            high, above = guess, at
        else:
            low, below = guess, at
    return high


def warnings(config: Config, asked: Question, found: dict[str, Any], units: int) -> list[str]:
    """One line for each thing that will not work."""
    held, lines = found["memory"], []
    if held["fits"] is False:
        largest = max(HINTS, key=lambda part: held[part] + {"updates": held["public_gradients"], "codec": held["codec_fitting"]}.get(part, 0))
        line = f"{bytes_text(held['total'])} on a rank do not fit into {bytes_text(held['limit'])}; most is {largest}: {HINTS[largest]}"
        if held["model_alone"] <= held["limit"]:
            line += f" (weights, activations and gradients alone, {bytes_text(held['model_alone'])}, do fit: the rest may stay in host memory)"
        lines.append(line)
    ranks = asked.ranks
    if ranks.mode == "clients" and ranks.count > found["expected_cohort"]:
        lines.append(f"{ranks.count} ranks for {found['expected_cohort']:g} clients a round: parallel.mode=clients leaves some without work")
    if ranks.mode == "clients" and ranks.stage > 0:
        lines.append(f"ZeRO {ranks.stage} divides nothing with parallel.mode=clients; expected data")
    privacy = config.privacy
    if privacy.enabled and privacy.target.delta >= 1 / units:
        lines.append(f"privacy.target.delta={privacy.target.delta:g} is not below 1/{units}: it permits publishing one {privacy.unit} whole")
    ratio = found["noise_to_signal"]
    if ratio is not None and ratio > asked.threshold:
        lines.append(f"the noise is expected to be {ratio:.3g} times the signal: a shorter code, more clients or a larger epsilon")
    if config.codec.code_size == "auto":
        lines.append(f"codec.code_size=auto is planned as its longest, {found['code_size']:,}")
    return lines
