"""What a plan says of privacy: the sums that a run would release, their epsilons, expected noise, and the cohort that a target needs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from fedllm.errors import UserError
from fedllm.federation import sampling_rate
from fedllm.privacy import adversaries
from fedllm.privacy.accountants.gdp import gdp_mu
from fedllm.privacy.calibration import Calibration
from fedllm.privacy.events import sum_multiplier
from fedllm.release import PrivateSum
from fedllm.run import calibrate, resolve
from fedllm.schema import Config

MOST_CLIENTS = 10**9
STEP = 1.05  # how closely a needed cohort or population meets its threshold
TRIALS = 4  # exact calibrations before the search goes up in steps
POINTS = 10  # of the epsilon by round
BLANK = "0" * 16


def planned_sums(config: Config, calibration: Calibration | None, units: int, size: int, moments: int) -> list[PrivateSum]:
    """Every private sum of the run, in order, as the federation would describe it; a clip norm that is found on the way counts as 1.

    moments: numbers of a stage-1 message.
    """
    fed, privacy = config.federation, config.privacy
    rate = sampling_rate(config)
    norm = privacy.clip.norm if privacy.clip.norm != "auto" else 1.0
    warmup = config.codec.warmup_rounds if config.codec.prior == "moments" else 0
    adaptive = privacy.enabled and privacy.clip.mode == "adaptive"  # the clip's bit
    multipliers = (calibration.stage1_multiplier, calibration.stage2_multiplier) if calibration else (0.0, 0.0)

    def one(stage: int, number: int) -> PrivateSum:
        return PrivateSum(
            run=BLANK,
            stage=stage,
            round=number,
            codec="moments" if stage == 1 else BLANK,
            prior="none",
            size=moments if stage == 1 else size + adaptive,
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
    marks = {"privacy disabled": not config.privacy.enabled, "fixed seed": config.seed is not None}
    reasons = [why for why, holds in marks.items() if holds]
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


def noise_to_signal(spec: PrivateSum, share: float) -> float | None:
    """Expected norm of the noise in a round's mean code over the norm of the rest, as the run reports it; None without noise.

    z C sqrt(k) / m over C sqrt(a + (1 - a) / m): noise multiplier z of the sum, clip norm C, code size k, expected cohort m, and the
    public assumption that a share a of each unit's energy is the mean update's while the rest averages out like noise. C cancels.
    """
    if not spec.private:
        return None
    kept = share + (1 - share) / max(spec.expected, 1.0)
    return spec.mean_std * math.sqrt(spec.size) / (spec.clip * math.sqrt(kept))


def needs(config: Config, code_size: int, share: float, threshold: float) -> dict[str, Any]:
    """The smallest expected cohort of these clients, and the smallest population for this cohort, that meet the target at the threshold.

    The noise is calibrated anew for each; `None` where none up to all clients (up to a billion clients) does. share: see `noise_to_signal`.
    """
    if config.privacy.unit != "client":
        return {"noise_to_signal": threshold, "cohort": None, "population": None, "reason": "counted for privacy.unit=client alone"}

    def ratio(clients: int, cohort: int, find: Callable[[Config, int], Calibration]) -> float:
        fed = dataclasses.replace(config.federation, clients=clients, expected_cohort=cohort, max_cohort=None)
        other = resolve(dataclasses.replace(config, federation=fed))
        try:
            return noise_to_signal(planned_sums(other, find(other, clients), clients, code_size, 1)[-1], share)
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


def guess(config: Config, units: int) -> Calibration:
    """Roughly what `calibrate` finds, at no cost: by the central limit theorem. A start for a search, never an answer."""
    privacy, fed = config.privacy, config.federation
    if privacy.target.adversary == "server":
        return calibrate(config, units)  # a closed form
    one = sum_multiplier("distributed" if config.codec.decode == "each" else privacy.noise, 1.0, fed.max_cohort)
    mu = gdp_mu(privacy.target.epsilon, privacy.target.delta)
    return Calibration(None, math.log1p(mu**2 / (fed.rounds * sampling_rate(config) ** 2)) ** -0.5 / one, math.nan)


def least(exact: Callable[[int], float], rough: Callable[[int], float], low: int, high: int, threshold: float) -> int | None:
    """The smallest whole number in [low, high], to within STEP, whose exact ratio is within the threshold; None for none.

    Both ratios fall. The rough one is searched, scaled until it agrees with the exact one where it leads.
    """
    scale = 1.0
    for _ in range(TRIALS):
        found = bisect(lambda count, scale=scale: scale * rough(count) <= threshold, low, high)
        at = exact(found)
        if at <= threshold and (found == low or at * STEP > threshold):
            return found
        if not math.isfinite(at) or (found == high and at > threshold):
            return None
        scale = at / rough(found)
    while at > threshold and found < high:
        found = min(high, math.ceil(found * STEP))
        at = exact(found)
    return found if at <= threshold else None


def bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest whole number of [low, high] that holds, by halving the ratio; `high` where none does."""
    if holds(low):
        return low
    while high - low > 1:
        middle = min(max(round(math.sqrt(low * high)), low + 1), high - 1)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
