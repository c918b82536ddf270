"""A run from config to results: check, set up, train, write the adapter and results.json; and taking up an interrupted one."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import secrets
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from fedllm import evaluation, parallel
from fedllm.checkpoint import Checkpoints, write_json, write_whole
from fedllm.codec_fit import check_sizes
from fedllm.config import load_config, save_config
from fedllm.errors import UserError
from fedllm.federation import Federation, Progress, public_seed
from fedllm.methods import claim_of
from fedllm.models import resolve_dtype, warn_if_slow
from fedllm.monitor import Monitor, open_display
from fedllm.parallel import build
from fedllm.privacy import adversaries, claims
from fedllm.privacy.calibration import Calibration, calibrate_release, calibrate_server, update_multiplier
from fedllm.privacy.events import sum_multiplier
from fedllm.privacy.groups import clip_groups
from fedllm.privacy.ledger import PART_NAME, Ledger
from fedllm.privacy.noise import default_max_cohort
from fedllm.schema import Config, EngineConfig, ParallelConfig
from fedllm.setting import Setting
from fedllm.stopwatch import Stopwatch
from fedllm.sums import sampling_rate

PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors", "dp-accounting")

COMPUTED = ("engine.", "parallel.")  # the keys that decide how a run is computed, and not what

BEFORE_LEDGER = {"config.yaml", ".config.yaml.part", PART_NAME}  # a run killed before its ledger stood has released nothing


def train(config: Config, before: evaluation.Evaluation | None = None) -> dict[str, Any]:
    """One run into `output_dir`; returns what results.json holds.

    before: the untrained model on the held-out examples where that is known already (several runs of one model and task).

    Raises UserError before anything is written for whatever is wrong with the config, the data, the model or the target.
    """
    run_dir = Path(config.output_dir)
    expect_no_run(run_dir)
    parallel.check(config)
    watch = Stopwatch()
    with watch.phase("setup"):
        config = resolve(config)
        run_id = new_run_id(config)
        with open_display() as display:
            setting = build(config, public_seed(run_id, config), display.phase)
        check_sizes(config, setting.engine.layout.size)
        check_population(config, setting)
        warn_if_slow(config.model.dtype)
        groups = clip_groups(setting.engine.layout, config.privacy.clip.groups)
        calibration = calibrate(config, setting.partition.unit_count, len(groups))
        with claimed(run_dir):
            write_whole(run_dir / "config.yaml", lambda part: save_config(config, part))
            ledger = Ledger.create(run_dir / "ledger.jsonl", ledger_header(config, run_id, setting, calibration))
    return _run(config, run_dir, setting, ledger, watch, before)


def expect_no_run(run_dir: Path) -> None:
    """Raise UserError where the folder holds a run, or is none."""
    if run_dir.exists() and (not run_dir.is_dir() or {path.name for path in run_dir.iterdir()} - BEFORE_LEDGER):
        raise UserError(f"{run_dir}: already holds a run; expected a new output_dir, or `fedllm resume {run_dir}`")


@contextlib.contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """The folder, made where it is missing, for this process alone: of two runs that start at once one writes its files, one is refused."""
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        expect_no_run(run_dir)
        yield
    finally:
        os.close(descriptor)


def resume(run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Continue an interrupted run from its last checkpoint; returns what results.json holds.

    overrides: of engine.* and parallel.* alone, which decide how a run is computed and not what.
    Raises UserError where the folder holds no run, a finished one, or one that another process is working on.
    """
    run_dir = Path(run_dir)
    for override in overrides:
        if not override.startswith(COMPUTED):
            raise UserError(f"{override}: a resumed run keeps its config; expected keys of {' and '.join(COMPUTED)} alone")
    for needed in ("config.yaml", "ledger.jsonl"):
        if not (run_dir / needed).is_file():
            raise UserError(f"{run_dir}: has no {needed}; expected the folder of an interrupted run")
    if (run_dir / "results.json").exists():
        raise UserError(f"{run_dir}: this run is finished; see results.json there, or train into another output_dir")
    config = load_config(run_dir / "config.yaml", list(overrides))
    watch = Stopwatch()
    with watch.phase("setup"):
        ledger = Ledger.open(run_dir / "ledger.jsonl")
        check_same(config, ledger.header, run_dir)
        config = parallel.taken_up(config)
        parallel.check(config)
        with open_display() as display:
            setting = build(config, public_seed(ledger.header["run"], config), display.phase)
        if setting.partition.unit_count != ledger.header["units"]:
            raise UserError(f"{config.task.source}: {setting.partition.unit_count} units, the run began with {ledger.header['units']}")
    return _run(config, run_dir, setting, ledger, watch)


def check_same(config: Config, header: dict[str, Any], run_dir: Path) -> None:
    """Raise UserError where the config is not the one that the ledger was begun with."""
    if fingerprint(config) != header["config"]:
        raise UserError(f"{run_dir / 'config.yaml'}: changed since the run began; expected the config that its ledger was begun with")


def _run(
    config: Config,
    run_dir: Path,
    setting: Setting,
    ledger: Ledger,
    watch: Stopwatch,
    before: evaluation.Evaluation | None = None,
) -> dict[str, Any]:
    checkpoints = Checkpoints(run_dir / "checkpoints")
    found = checkpoints.latest()
    done = found[1]["rounds"] if found else 0
    with ledger, Monitor(run_dir, config.federation.rounds, resume_at=done) as monitor:
        monitor.config((run_dir / "config.yaml").read_text())
        federation = Federation(config, setting, ledger, checkpoints, monitor, watch)
        federation.restore()
        progress = federation.run(before)
        with watch.phase("evaluation"):
            after, _ = evaluation.look(setting, config, monitor.phase, "evaluating the trained model")
        setting.engine.save(run_dir / "adapter")
        results = gather(config, setting, federation, progress, after, watch)
        monitor.finish(results, progress.history)
        write_json(run_dir / "results.json", results)  # last: where it stands, the run is finished
    return results


def resolve(config: Config) -> Config:
    """The config with every automatic choice made, so that it runs again as it ran."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model), federation=dataclasses.replace(config.federation))
    config.model.dtype = resolve_dtype(config.model.dtype, config.task.kind)
    fed = config.federation
    if fed.max_cohort is None and config.privacy.unit == "client":
        rounds = fed.rounds + (config.codec.warmup_rounds if config.codec.prior == "moments" else 0)
        if config.privacy.noise == "local" and claim_of(config):
            # A paper's server averages what its fixed cohort sends, and no further shares of noise; so is its epsilon counted.
            fed.max_cohort = fed.expected_cohort
        else:
            fed.max_cohort = default_max_cohort(fed.clients, sampling_rate(config), rounds, config.privacy.target.delta)
    return config


def new_run_id(config: Config) -> str:
    """16 hex digits: random, or with a fixed seed a function of the config, so that the same run has the same messages."""
    return secrets.token_hex(8) if config.seed is None else fingerprint(config)


def fingerprint(config: Config) -> str:
    """16 hex digits over all of a config but where it writes, and what computes it on how many ranks."""
    how = {"engine": dataclasses.asdict(EngineConfig()), "parallel": dataclasses.asdict(ParallelConfig())}
    values = dataclasses.asdict(config) | {"output_dir": None, **how}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def population(config: Config) -> str:
    """16 hex digits over what makes a unit the same unit in two runs: the split into held-out and private data, and the partition.

    A user or an example is the same one whichever client holds it: the partition then says nothing.
    """
    task = config.task
    partition = dataclasses.asdict(config.federation.partition) if config.privacy.unit == "client" else None
    columns = {name: column for name, column in dataclasses.asdict(task.columns).items() if name != "public"}  # no unit's data
    made_of = [task.test, task.eval_examples, columns, partition]
    if task.train_examples is not None:
        made_of.append(task.train_examples)
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def check_population(config: Config, setting: Setting) -> None:
    """Warn, in the open, of a delta that allows some unit's data to be published whole."""
    units = setting.partition.unit_count
    if config.privacy.enabled and config.privacy.target.delta >= 1 / units:
        print(
            f"warning: privacy.target.delta={config.privacy.target.delta:g} is not below 1/{units}, one over the number of "
            f"{config.privacy.unit}s; such a delta permits publishing one of them whole",
            file=sys.stderr,
        )


def calibrate(config: Config, units: int, groups: int) -> Calibration | None:
    """Noise multipliers of both stages for the target, or None without privacy.

    units: privacy units over all clients. groups: of coordinates that are clipped apart, 1 where all are clipped together.
    """
    privacy, fed = config.privacy, config.federation
    if not privacy.enabled:
        return None
    by_client = privacy.unit == "client"
    warmup = config.codec.warmup_rounds if config.codec.prior == "moments" else 0
    shares = fed.max_cohort if by_client else fed.clients
    target = privacy.target
    # Where every message is decoded on its own, only its own noise counts: as if one share were the whole sum's.
    noise = "distributed" if config.codec.decode == "each" else privacy.noise
    if privacy.calibration == claims.CLASSIC:
        found = Calibration(None, claims.classic_multiplier(target.epsilon, target.delta, groups), target.epsilon)
    elif privacy.calibration != claims.EXACT:
        cut = fed.max_cohort if by_client else None
        rate = sampling_rate(config)
        of_sum = claims.accountant_multiplier(privacy.calibration, target.epsilon, target.delta, fed.rounds, rate, units, cut)
        found = Calibration(None, of_sum / sum_multiplier(noise, 1.0, shares), target.epsilon)
    elif target.adversary == "server":
        found = calibrate_server(target.epsilon, target.delta, warmup, fed.rounds, privacy.noise, shares, privacy.stage1_share)
    else:
        found = calibrate_release(
            target.epsilon,
            target.delta,
            warmup,
            fed.rounds,
            sampling_rate(config),
            units,
            fed.max_cohort if by_client else None,
            privacy.stage1_share,
            noise=noise,
            shares=shares,
        )
    if privacy.clip.mode == "adaptive":
        update_multiplier(sum_multiplier(privacy.noise, found.stage2_multiplier, shares), privacy.clip.bit_multiplier)  # refuses in time
    return found


def why_not_private(config: Config, setting: Setting) -> list[str]:
    """Everything that makes the run's epsilon no promise."""
    reasons = {
        "privacy disabled": not config.privacy.enabled,
        adversaries.PUBLISHED: claim_of(config) is not None,
        "fixed seed": config.seed is not None,
        "records shared": setting.partition.shared,
    }
    return [reason for reason, holds in reasons.items() if holds]


def ledger_header(config: Config, run_id: str, setting: Setting, calibration: Calibration | None) -> dict[str, Any]:
    """First line of the ledger: what report and guard need besides the entries."""
    reasons = why_not_private(config, setting)
    return {
        "run": run_id,
        "data": config.task.source,
        "population": population(config),
        "config": fingerprint(config),
        "clients": config.federation.clients,
        "units": setting.partition.unit_count,
        "unit": config.privacy.unit,
        "target": dataclasses.asdict(config.privacy.target),
        "claimed": claim_of(config),
        "planned_rounds": config.federation.rounds,
        "noise_multipliers": {
            "stage1": calibration.stage1_multiplier if calibration else None,
            "stage2": calibration.stage2_multiplier if calibration else None,
        },
        "private": not reasons,
        "why_not_private": reasons,
    }


def gather(
    config: Config,
    setting: Setting,
    federation: Federation,
    progress: Progress,
    after: evaluation.Evaluation,
    watch: Stopwatch,
) -> dict[str, Any]:
    """What results.json holds: see the contract in the README."""
    header, entries = federation.ledger.header, federation.ledger.entries
    update_bytes = 4 * setting.engine.layout.size
    rounds = progress.history[1:]
    message = progress.history[-1].get("uplink_bytes_per_client")
    codec_file = federation.checkpoints.codec_path(progress.codec or "")
    return {
        "method": config.method,
        "task": config.task.source,
        "model": config.model.name,
        "rounds": progress.rounds,
        "stopped": progress.stopped,
        "accuracy": after.accuracy,
        "loss": after.loss,
        "perplexity": evaluation.perplexity(config, after.loss),
        "accuracy_before": progress.before["accuracy"],
        "loss_before": progress.before["loss"],
        "accuracy_start": progress.start.get("accuracy"),  # after federation.warm_start
        "loss_start": progress.start.get("loss"),
        "epsilon": {
            "delta": config.privacy.target.delta,
            "unit": config.privacy.unit,
            "private": header["private"],
            "why_not_private": adversaries.privacy_marks(header, entries)[1],
            "claimed": header.get("claimed"),
            "release": adversaries.epsilon_release(header, entries).as_json(),
            "server": adversaries.epsilon_server(header, entries).as_json(),
        },
        "uplink_bytes_per_client_round": message,
        "downlink_bytes_per_client_round": round(fmean(each["downlink_bytes_per_client"] for each in rounds)) if rounds else None,
        "update_bytes": update_bytes,
        "compression_ratio": update_bytes / message if message else None,
        "codec_bytes": codec_file.stat().st_size if codec_file.exists() else 0,
        "parameters": setting.engine.layout.size,
        "code_size": federation.codec.code_size if federation.codec is not None else None,
        "clients": config.federation.clients,
        "expected_cohort": round(federation.sums.expected, 6),  # units; their number is public
        "diagnostics": None,
        "history": progress.history,
        "seconds": watch.total(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seed": config.seed,
        "versions": {name: version(name) for name in PACKAGES},
    }
