"""`fedllm codec bench`: train a little, look at real client updates, and score every codec x prior x code size on them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs import CODECS, Codec
from dr_encoder.layout import AdapterLayout
from dr_encoder.message import Header, pack
from dr_encoder.moments import moments_to_std, unit_moments
from dr_encoder.priors import GaussianPrior, factor_rms, from_moments
from dr_encoder.quantize import dtype_of
from fedllm import priors, public
from fedllm.bench.memory import TensorPeak
from fedllm.bench.scores import Cohorts, Score, add, add_oracle, stored_bytes
from fedllm.client import local_batches
from fedllm.combinations import REAL, ROW_PARTS, ROWS, priors_of
from fedllm.errors import RunStopped, UserError
from fedllm.federation import public_seed
from fedllm.models import warn_if_slow
from fedllm.monitor import Phase
from fedllm.privacy.events import sum_multiplier
from fedllm.privacy.groups import JOINT
from fedllm.run import calibrate, resolve
from fedllm.schema import Config
from fedllm.server import ServerOptimizer
from fedllm.setting import Setting, build

SEED = 0  # of the cohorts and the noise, unless the config has one: nothing here is private
NOT_PRIVATE = "diagnostic: not private"
COSTS = {"moments": "stage 1 (here its private moments, without noise)", "real": priors.REAL_COST}


@dataclass
class Candidate:
    """One codec on one prior at one size, and what it has scored so far."""

    family: str
    prior: str
    size: int | None
    score: Score = field(default_factory=Score)
    past: priors.Past = field(default_factory=priors.Past)
    codec: Codec | None = None
    oracle: Score = field(default_factory=Score)  # at this code's size
    working_bytes: int | None = None
    failed: str | None = None


def bench(
    config: Config,
    phase: Phase,
    *,
    rounds: int = 3,
    families: Sequence[str] | None = None,
    prior_names: Sequence[str] = ("public", "public+released", "moments"),
    sizes: Sequence[int] = (32, 64, 128, 256),
    others: int | None = None,
) -> dict[str, Any]:
    """Rows of the contract, from `rounds` >= 1 rounds trained without noise on the mean of all clients looked at.

    families: None for all. sizes: code sizes; a family that fixes its own has that. others: clients for the oracle and the error's
    reference, next to the cohort of federation.expected_cohort; None: twice as many.
    Raises UserError for what the config lacks, and for updates that are not finite; RunStopped where the server's step is not.
    """
    for name in prior_names:
        check_prior_name(name)
    check_noise(config)
    config = resolve(config)
    warn_if_slow(config.model.dtype)
    setting = build(config, public_seed("0" * 16, config), phase=phase)
    if setting.public is None:
        raise UserError("task.public: expected a source of public text; the priors that cost nothing are made of it")
    half = config.federation.expected_cohort // 2
    others = 2 * config.federation.expected_cohort if others is None else others
    private = 2 * half if any(name.split("+")[0] in COSTS for name in prior_names) else 0
    most = setting.partition.clients - 2 * half - private
    if half < 1 or not 2 <= others <= most:
        beside = "the cohort and as many for priors of private updates" if private else "the cohort"
        raise UserError(f"--others {others}: expected 2 to {most}, the clients beside {beside}")
    noise = noise_of_sum(config, setting)
    per_unit = max(1, round(len(setting.train) / setting.partition.unit_count))
    seed = SEED if config.seed is None else config.seed
    rng = np.random.default_rng([seed, 0])
    if config.federation.warm_start.steps:
        with phase(f"{config.federation.warm_start.steps} steps on public text", total=config.federation.warm_start.steps) as advance:
            try:
                public.warm_start(setting, config, public_seed("0" * 16, config), advance)
            except FloatingPointError as error:
                raise RunStopped(f"federation.warm_start: {error}; expected a smaller lr there") from None
    layout, optimizer = setting.engine.layout, ServerOptimizer(setting.engine.adapter(), config.federation.server)
    candidates = [
        Candidate(family, prior, size)
        for family in (families or sorted(CODECS))
        for prior in (("none",) if not CODECS[family].fits else [name for name in prior_names if usable(family, name)])
        for size in ((None,) if CODECS[family].fixed_size else sizes)
    ]
    if not candidates:
        raise UserError("--codecs, --priors: expected at least one codec with a prior that it can use")
    for number in range(rounds):
        with phase(f"round {number + 1} of {rounds}: updates of {2 * half + others + private} clients and public gradients"):
            cohorts = collect(setting, config, rng, half, others, private)
            rows = public.gradients(setting, config, public_seed("0" * 16, config), number)
        for what, updates in (("clients' updates", cohorts), ("public gradients", rows)):
            expect_finite(f"round {number + 1}: {what}", updates)
        cohorts = dataclasses.replace(cohorts, weights=adam_weights(layout, rows))
        with phase(f"round {number + 1} of {rounds}: {len(candidates)} codecs", total=len(candidates)) as advance:
            for candidate in candidates:
                step(candidate, config, layout, cohorts, rows, noise, per_unit, number, seed)
                advance(1)
        if not any(each.score.rounds for each in candidates):
            first = candidates[0]
            told = f"{first.family}, {first.prior}, {first.size}: {first.failed}"
            raise UserError(f"--codecs, --priors, --sizes: expected at least one code that can be fitted; {told}")
        add_oracle([(each.oracle, each.codec.code_size) for each in candidates if each.failed is None], cohorts)
        mean = torch.cat([cohorts.first, cohorts.second, cohorts.others]).mean(0)
        try:
            setting.engine.load(optimizer.step(mean))
        except FloatingPointError as error:
            raise RunStopped(f"round {number + 1}: {error}; expected a smaller federation.server.lr") from None
    epsilon = config.privacy.target.epsilon if config.privacy.enabled else None
    return {
        "private": False,
        "why_not_private": NOT_PRIVATE,
        "model": config.model.name,
        "task": config.task.source,
        "parameters": layout.size,
        "rounds": rounds,
        "rows": [row(candidate, config, layout, noise, epsilon, others) for candidate in candidates],
        "failed": [
            {"codec": each.family, "prior": each.prior, "code_size": each.size, "reason": each.failed} for each in candidates if each.failed
        ],
    }


def expect_finite(what: str, updates: Cohorts | public.PublicGradients) -> None:
    """Raise UserError where a value is not finite: nothing can be told of such updates."""
    if not all(torch.isfinite(value).all() for value in vars(updates).values() if value is not None):
        raise UserError(f"{what} are not finite; expected a smaller federation.local.lr or federation.server.lr")


def adam_weights(layout: AdapterLayout, rows: public.PublicGradients) -> Tensor | None:
    """[n]: 1 / rms of each coordinate's factor, by public gradients; as `allocation`, which codes in this metric, has it.

    0 for a factor without gradients (A at LoRA's start): no step moves it. None where there are no gradients to fit to, or all are zero.
    """
    if len(rows.fit) == 0:
        return None
    rms = factor_rms(layout, rows.fit)
    alive = rms > 1e-6 * rms.max()
    if not alive.any():
        return None
    return layout.spread(torch.where(alive, rms[alive].min() / rms, 0.0))


def check_noise(config: Config) -> None:
    """Raise UserError for a run whose clip and noise are not those of the error told here: of whole clients' codes, summed."""
    privacy = config.privacy
    if not privacy.enabled:
        return
    for key, value, expected in (
        ("privacy.unit", privacy.unit, "client"),
        ("privacy.noise_in", privacy.noise_in, "code"),
        ("privacy.clip.mode", privacy.clip.mode, "fixed"),
        ("privacy.clip.groups", privacy.clip.groups, JOINT),
        ("privacy.clip.of", privacy.clip.of, "update"),
        ("codec.decode", config.codec.decode, "mean"),
    ):
        if value != expected:
            raise UserError(f"{key}={value}: expected {expected} in codec bench, whose noise is that of a mean of clipped codes")


def check_prior_name(name: str) -> None:
    """Raise UserError for what no codec is fitted on."""
    parts = name.split("+")
    mixture = parts[0] in ("public", REAL) and len(set(parts)) == len(parts) and set(parts[1:]) <= set(ROW_PARTS)
    if name not in ("moments", "none") and not mixture:
        raise UserError(f"--priors {name}: expected {ROWS}, {REAL}, moments or none")


def usable(family: str, prior: str) -> bool:
    """Whether a family may be fitted on a prior."""
    return prior in priors_of(family) or (ROWS in priors_of(family) and prior.split("+")[0] in ROW_PARTS)


def noise_of_sum(config: Config, setting: Setting) -> float:
    """Noise of a sum over its clip norm at the run's own target; 0 without privacy."""
    found = calibrate(config, setting.partition.unit_count, 1)
    return 0.0 if found is None else sum_multiplier(config.privacy.noise, found.stage2_multiplier, config.federation.max_cohort or 1)


def collect(setting: Setting, config: Config, rng: np.random.Generator, half: int, others: int, private: int = 0) -> Cohorts:
    """True updates of different clients at the model as it stands: two halves, others, and some for priors of private updates."""
    clients = rng.choice(setting.partition.clients, 2 * half + others + private, replace=False)
    local = config.federation.local
    updates = torch.empty(len(clients), setting.engine.layout.size)
    records = [local_batches(setting.partition.records(int(client)), local, rng.random) for client in clients]
    for where, some in setting.engine.updates(setting.train, records, local.steps, local.lr, local.prox):
        updates[where] = some
    return Cohorts(*updates.split([half, half, others, private]))


def step(
    candidate: Candidate,
    config: Config,
    layout: AdapterLayout,
    cohorts: Cohorts,
    rows: public.PublicGradients,
    noise: float,
    per_unit: int,
    number: int,
    seed: int,
) -> None:
    """Refit one candidate where it is due, and score it on this round. per_unit: examples of a unit, for the clip norm.

    The noise follows from seed and round alone, so that a candidate's figures are the same whichever others stand beside it.
    """
    refresh = config.codec.refresh
    if candidate.failed is not None:
        return
    expected = 2 * len(cohorts.first)
    if candidate.codec is None or (refresh > 0 and number % refresh == 0 and candidate.prior != "moments"):
        begun = time.perf_counter()
        try:
            prior = prior_of(candidate, config, layout, cohorts, rows, number)
            options = {"steps": config.codec.fit_steps, "learning_rate": config.codec.fit_lr}
            if candidate.family == "chain":
                options["parts"] = tuple(config.codec.parts)
            candidate.codec = CODECS[candidate.family].fit(prior, layout, candidate.size, noise / expected, number, **options)
        except (ValueError, FloatingPointError) as error:
            candidate.failed = str(error)
            return
        candidate.score.fit_seconds += time.perf_counter() - begun
        candidate.score.fits += 1
        if candidate.working_bytes is None:  # counting takes time of its own; what is held follows from no number of steps
            with TensorPeak() as held:
                again = CODECS[candidate.family].fit(prior, layout, candidate.size, noise / expected, number, **(options | {"steps": 2}))
                again.decode(again.encode(cohorts.first[:1])[0], noise / expected if again.summable else 0.0)
            candidate.working_bytes = max(0, held.peak - stored_bytes(candidate.codec))
    codec, clip, noise_std = candidate.codec, None, 0.0
    if noise and codec.summable:
        try:
            clip = public.clip_norm(rows, codec.encode, config, per_unit)
        except UserError as error:  # codes of public gradients that are all zero: of A alone, at LoRA's start
            candidate.failed = str(error)
            return
        noise_std = noise * clip / expected
    noisy = add(candidate.score, codec, cohorts, noise_std, np.random.default_rng([seed, 1, number]), clip, config.codec.shrink)
    if noisy is not None and "released" in candidate.prior:
        candidate.past.add(codec, noisy, noise_std)


def prior_of(candidate: Candidate, config: Config, layout: AdapterLayout, cohorts: Cohorts, rows, number: int) -> GaussianPrior | None:
    """The prior that a candidate names, the config's own with its weights; `moments` lack the noise that stage 1 would put on them."""
    if candidate.prior == "none":
        return None
    if candidate.prior == "moments":
        scale = factor_rms(layout, rows.fit).clamp_min(1e-12)
        return from_moments(layout, *moments_to_std(unit_moments(cohorts.private, layout, scale).mean(0), scale))
    weights = config.codec.weights if candidate.prior == config.codec.prior else None  # they are of its own parts
    found = priors.build(candidate.prior, weights, priors.Given(layout, rows.fit, candidate.past, number, real=cohorts.private))
    candidate.past.keep(rows.fit, config.codec.public_memory)
    return found


def row(candidate: Candidate, config: Config, layout: AdapterLayout, noise: float, epsilon: float | None, others: int) -> dict[str, Any]:
    """One candidate as the contract names its figures; oracle_size: directions of its oracle, which has no more than `others`."""
    codec = None if candidate.failed else candidate.codec
    noised = codec is not None and codec.summable and noise > 0
    size = candidate.size if codec is None else codec.code_size
    sent = None if codec is None else message_bytes(size, config.codec.bits if noised else 32, config.federation.clients)
    known = candidate.oracle.row()
    return {
        "codec": candidate.family,
        "prior": candidate.prior,
        "cost": COSTS.get(candidate.prior, "none"),
        "code_size": size,
        "compression_ratio": None if sent is None else 4 * layout.size / sent,
        **candidate.score.row(),
        **{f"oracle_{key}": known.get(key) for key in ("signal_energy", "signal_energy_adam")},
        "oracle_size": min(size, others) if candidate.oracle.signal else None,
        "epsilon": epsilon if noised else None,
        "noise_multiplier": noise if noised else None,
        "message_bytes": sent,
        "memory_bytes": None if codec is None else stored_bytes(codec),
        "working_bytes": candidate.working_bytes,
    }


def message_bytes(size: int, bits: int, clients: int) -> int:
    """Size of a whole message with a code of `size` numbers."""
    scale = 1.0 if bits == 32 else 1 / 30_000  # a lattice's step has all its digits
    header = Header(run="0" * 16, round=0, client=clients - 1, codec="0" * 16, scale=scale)
    return len(pack(header, np.zeros(size, dtype_of(bits))))
