"""What a plan says of privacy: the sums that a run would release, their epsilons, expected noise, and the cohort that a target needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from dr_encoder.layout import AdapterLayout
from fedllm.errors import UserError
from fedllm.methods import claim_of
from fedllm.privacy import adversaries
from fedllm.privacy.accountants.gdp import gdp_mu
from fedllm.privacy.calibration import Calibration
from fedllm.privacy.claims import CLASSIC
from fedllm.privacy.events import sum_multiplier
from fedllm.privacy.groups import JOINT, clip_groups
from fedllm.release import PrivateSum
from fedllm.run import calibrate, resolve
from fedllm.schema import Config
from fedllm.sums import sampling_rate

MOST_CLIENTS = 10**9
STEP = 1.05  # how closely a needed cohort or population is found
TRIALS = 3  # exact calibrations that the rough ratio leads to before the bracket is halved
POINTS = 10  # of the epsilon by round
BLANK = "0" * 16


def planned_sums(config: Config, calibration: Calibration | None, units: int, size: int, layout: AdapterLayout) -> list[PrivateSum]:
    """Every release of the run, in order, as the federation would describe it.

    units: privacy units over all clients. size: of a code. What only the data tell is assumed: a clip norm that is found on the way
    counts as 1, and clients weigh alike.
    """
    fed, privacy, codec = config.federation, config.privacy, config.codec
    by_client = privacy.unit == "client"
    rate = sampling_rate(config)
    norm = privacy.clip.norm if privacy.clip.norm != "auto" else 1.0
    bit = privacy.enabled and privacy.clip.mode == "adaptive"
    multipliers = (calibration.stage1_multiplier, calibration.stage2_multiplier) if calibration else (0.0, 0.0)

    def one(stage: int, number: int, length: int, raw: str = "") -> PrivateSum:
        return PrivateSum(
            run=BLANK,
            stage=stage,
            round=number,
            codec="moments" if stage == 1 else BLANK,
            prior="none",
            size=length,
            clip=float(norm) if privacy.enabled else math.inf,
            noise=privacy.noise,
            noise_in="code" if stage == 1 else privacy.noise_in,
            noise_multiplier=multipliers[stage - 1] or 0.0,
            shares=fed.max_cohort if by_client else fed.clients,
            sampling_rate=rate,
            max_cohort=fed.max_cohort if by_client else None,
            expected=rate * units,
            unit=privacy.unit,
            clients=fed.clients,
            bits=codec.bits,
            each=stage == 2 and codec.decode == "each",
            groups=clip_groups(layout, privacy.clip.groups) if stage == 2 and group_count(config, layout) > 1 else (),
            raw=raw,
        )

    raw_moments = adversaries.RAW_MOMENTS if privacy.enabled and privacy.stage1_share == 0 else ""
    warmup = range(codec.warmup_rounds if codec.prior == "moments" else 0)
    sums = [one(1, number, 2 * len(layout.factors), raw_moments) for number in warmup]
    for number in range(fed.rounds):
        if codec.prior == "real" and (number == 0 or (codec.refresh > 0 and number % codec.refresh == 0)):
            sums.append(one(1, number, 0, adversaries.RAW_GRADIENTS))
        sums.append(one(2, number, size + bit))
    return sums


def group_count(config: Config, layout: AdapterLayout) -> int:
    """How many groups of coordinates are clipped apart; 1 where all are clipped together, or nothing is."""
    groups = config.privacy.clip.groups
    return len(clip_groups(layout, groups)) if config.privacy.enabled and groups != JOINT else 1


def privacy_of(config: Config, sums: list[PrivateSum], units: int, calibration: Calibration | None) -> dict[str, Any]:
    """Both adversaries' epsilon at the end and by round, computed from the ledger that the run would write."""
    marks = {
        "privacy disabled": not config.privacy.enabled,
        adversaries.PUBLISHED: claim_of(config) is not None,
        "fixed seed": config.seed is not None,
    }
    reasons = [why for why, holds in marks.items() if holds]
    header = {
        "clients": config.federation.clients,
        "units": units,
        "unit": config.privacy.unit,
        "target": dataclasses.asdict(config.privacy.target),
        "claimed": claim_of(config),
        "private": not reasons,
        "why_not_private": reasons,
    }
    entries = [{"id": str(number), **each.ledger_entry("os")} for number, each in enumerate(sums)]
    rows = adversaries.epsilon_by_round(header, entries, ("pld",), POINTS) if config.privacy.enabled else []
    private, why = adversaries.privacy_marks(header, entries)
    return {
        "private": private,
        "why_not_private": why,
        "target": header["target"],
        "claimed": header["claimed"],
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


def noise_to_signal(spec: PrivateSum, share: float) -> float | None:
    """Expected norm of the noise in a round's mean code over the norm of the rest, as the run reports it; None without noise.

    z C sqrt(k) / m over C sqrt(a + (1 - a) / m): noise multiplier z of the sum, C the clip norm (of all clip groups together), code size
    k, expected cohort m, and the public assumption that a share a of each unit's energy is the mean update's while the rest averages out
    like noise. C cancels.
    """
    if not spec.private:
        return None
    kept = share + (1 - share) / max(spec.expected, 1.0)
    return spec.mean_std * math.sqrt(spec.size) / (spec.clip * math.sqrt(max(1, len(spec.groups)) * kept))


def needs(config: Config, code_size: int, layout: AdapterLayout, share: float, threshold: float) -> dict[str, Any]:
    """The smallest expected cohort of these clients, and the smallest population for this cohort, that meet the target at the threshold.

    The noise is calibrated anew for each; `None` where none up to all clients (up to a billion clients) does. share: see `noise_to_signal`.
    """
    if config.privacy.unit != "client":
        return {"noise_to_signal": threshold, "cohort": None, "population": None, "reason": "counted for privacy.unit=client alone"}

    groups = group_count(config, layout)

    def ratio(clients: int, cohort: int, find: Callable[[Config, int, int], Calibration]) -> float:
        fed = dataclasses.replace(config.federation, clients=clients, expected_cohort=cohort, max_cohort=None)
        other = resolve(dataclasses.replace(config, federation=fed))
        try:
            return noise_to_signal(planned_sums(other, find(other, clients, groups), clients, code_size, layout)[-1], share)
        except UserError:  # no noise reaches the target there
            return math.inf

    def needed(arguments: Callable[[int], tuple[int, int]], low: int, high: int) -> int | None:
        exact, rough = (lambda count, find=find: ratio(*arguments(count), find) for find in (calibrate, guess))
        return least(exact, rough, low, high, threshold)

    clients, cohort = config.federation.clients, config.federation.expected_cohort
    return {
        "noise_to_signal": threshold,
        "cohort": needed(lambda count: (clients, count), 1, clients),
        "population": needed(lambda count: (count, cohort), cohort, MOST_CLIENTS),
        "reason": None,
    }


def guess(config: Config, units: int, groups: int) -> Calibration:
    """Roughly what `calibrate` finds, at no cost: by the central limit theorem. A start for a search, never an answer."""
    privacy, fed = config.privacy, config.federation
    if privacy.target.adversary == "server" or privacy.calibration == CLASSIC:
        return calibrate(config, units, groups)  # a closed form
    one = sum_multiplier("distributed" if config.codec.decode == "each" else privacy.noise, 1.0, fed.max_cohort)
    mu = gdp_mu(privacy.target.epsilon, privacy.target.delta)
    return Calibration(None, math.log1p(mu**2 / (fed.rounds * sampling_rate(config) ** 2)) ** -0.5 / one, math.nan)


def least(exact: Callable[[int], float], rough: Callable[[int], float], low: int, high: int, threshold: float) -> int | None:
    """The smallest whole number in [low, high], to within STEP, whose exact ratio is within the threshold; None for none.

    Both ratios fall. What is returned holds; STEP times less, or one less, was refused or lies below `low`. An exact ratio takes seconds:
    the rough one, scaled to the exact one where that was last asked, leads to the first TRIALS, and a dozen at most are left after these.
    """
    refused, holding, scale, calls, stride = 0, high + 1, 1.0, 0, STEP
    while holding > (first := max(refused + 1, low)) and (holding > high or holding > refused * STEP):
        led = calls < TRIALS and math.isfinite(scale)
        likely = bisect(lambda count, scale=scale: scale * rough(count) <= threshold, low, high) if led else 0
        if first <= likely <= holding:  # no nearer to an end than STEP: if the guess is right, the next call ends the search
            count = max(min(likely, math.ceil(holding / STEP)), math.floor(refused * STEP), first)
        elif holding > high:
            count, stride = math.ceil(refused * stride), min(stride, high) ** 16
        else:  # the middle; `first` where nothing is refused yet
            count = max(round(math.sqrt(refused * holding)), first)
        count = min(count, holding - 1)
        at, calls = exact(count), calls + 1
        refused, holding = (refused, count) if at <= threshold else (count, holding)
        scale = at / rough(count)
    return holding if holding <= high else None


def bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest whole number of [low, high] that holds, by halving the ratio; `high` where none does."""
    if holds(low):
        return low
    while high - low > 1:
        middle = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
