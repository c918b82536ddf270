"""From a target epsilon to the least noise, rounded up, whose whole composition is confirmed to stay within it."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedllm.errors import UserError
from fedllm.privacy import accountants
from fedllm.privacy.answers import PrivacyAnswer
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    Event,
    FreeEvent,
    GaussianEvent,
    flatten,
    message_multiplier,
    relation_factor,
    sampled_event,
    sum_multiplier,
)

DIGITS = 4  # multipliers are rounded up to so many significant digits
MIN_MULTIPLIER = 0.1  # less noise than this is never calibrated: a looser target is met with room to spare
MAX_MULTIPLIER = 1e6


@dataclass(frozen=True)
class Calibration:
    """Multipliers as the config and the ledger write them (of the sum; of one message for `local`), and the epsilon
    they give together.

    stage1_multiplier: None where there is no stage 1.
    """

    stage1_multiplier: float | None
    stage2_multiplier: float
    epsilon: float


def round_up(value: float, digits: int = DIGITS) -> float:
    """The smallest number of `digits` significant digits that is >= value > 0."""
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded < value:
        rounded = float(f"{rounded + 10.0 ** (math.floor(math.log10(value)) - digits + 1):.{digits - 1}e}")
    return rounded


def round_down(value: float, digits: int = DIGITS) -> float:
    """The largest number of `digits` significant digits that is < value, itself such a number > 0; infinity stays."""
    if math.isinf(value):
        return value
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    whole, power = int(mantissa.replace(".", "")) - 1, int(exponent) - digits + 1
    if whole < 10 ** (digits - 1):
        whole, power = 10**digits - 1, power - 1
    return float(f"{whole}e{power}")


def update_multiplier(noise_multiplier: float, sigma_bit: float) -> float:
    """Multiplier left for the update when a clip bit shares the event: (z^-2 - (2 sigma_b)^-2)^(-1/2).

    The bit is centred to +-1/2, so its sensitivity is 1/2 and noise of standard deviation sigma_bit on the sum of bits
    has multiplier 2 sigma_bit (Andrew et al. 2021, theorem 1). Both together are one Gaussian event of multiplier
    `noise_multiplier`.
    """
    if not 0 < noise_multiplier < 2 * sigma_bit:
        raise UserError(
            f"privacy.clip.bit_multiplier={sigma_bit}: expected more than half the noise multiplier {noise_multiplier:.4g}"
        )
    return (noise_multiplier**-2 - (2 * sigma_bit) ** -2) ** -0.5


def calibrate_release(
    target_epsilon: float,
    delta: float,
    stage1_rounds: int,
    rounds: int,
    sampling_rate: float,
    population: int,
    max_cohort: int | None,
    stage1_share: float,
    *,
    noise: str = "distributed",
    shares: int | None = None,
) -> Calibration:
    """The least noise for which W stage-1 and T stage-2 sums together meet the target against the release adversary.

    Add/remove one unit, Poisson sampling at `sampling_rate`, cut at `max_cohort`, by PLD. Stage 1 gets `stage1_share`
    of the target's mu^2 by the CLT (a heuristic for the split, never for the total); stage 2 is then solved with the
    whole composition.

    stage1_rounds: W >= 0. rounds: T >= 1. sampling_rate: (0, 1]. population: units, >= 1. max_cohort: >= 1, or None for
    no cut.
    stage1_share: in (0, 1) where W > 0. noise: distributed | local | central. shares: noise shares that make up every
    sum; `max_cohort` if None (needed for `local`, where the multiplier is that of one message).
    Raises UserError for impossible targets.
    """
    shares = shares if shares is not None else (max_cohort or 1)
    _check_target(target_epsilon, delta, stage1_rounds, rounds, stage1_share)
    if not 0 < sampling_rate <= 1:
        raise UserError(f"sampling rate {sampling_rate} must lie in (0, 1]: lower expected_cohort or raise clients")
    if population < 1 or shares < 1 or (max_cohort is not None and max_cohort < 1):
        raise UserError(f"population {population}, max_cohort {max_cohort} and shares {shares} must be at least 1")

    def total(multipliers: dict[float, int]) -> float:
        accountant = accountants.create("pld", ADD_REMOVE)
        for z, count in multipliers.items():
            accountant.compose(
                sampled_event(sum_multiplier(noise, z, shares), sampling_rate, population, max_cohort), count
            )
        epsilon = accountant.epsilon(delta).epsilon
        return math.inf if epsilon is None else epsilon

    per_configured = sum_multiplier(noise, 1.0, shares)
    first = None
    if stage1_rounds:
        mu1_squared = stage1_share * _mu(target_epsilon, delta) ** 2
        guess = math.log1p(mu1_squared / (stage1_rounds * sampling_rate**2)) ** -0.5 / per_configured
        first = round_up(max(guess, MIN_MULTIPLIER / per_configured))
        while total({first: stage1_rounds}) > 0.9 * target_epsilon and first < MAX_MULTIPLIER:
            first = round_up(1.25 * first)

    def epsilon_at(z: float) -> float:
        counts = {first: stage1_rounds} if first else {}
        counts[z] = counts.get(z, 0) + rounds
        return total(counts)

    share_left = 1 - (stage1_share if stage1_rounds else 0.0)
    mu2_squared = share_left * _mu(target_epsilon, delta) ** 2
    guess = math.log1p(mu2_squared / (rounds * sampling_rate**2)) ** -0.5 / per_configured
    second = _least(epsilon_at, target_epsilon, guess, MIN_MULTIPLIER / per_configured)
    return Calibration(first, second, epsilon_at(second))


def calibrate_server(
    target_epsilon: float,
    delta: float,
    stage1_rounds: int,
    rounds: int,
    noise: str,
    shares: int,
    stage1_share: float,
) -> Calibration:
    """The least noise for which one client's messages in all rounds of both stages meet the target against the server.

    Replace-one (sensitivity 2C), no amplification, exact GDP: mu^2 = 4 (W / m1^2 + T / m2^2) with message multipliers
    m1, m2, of which stage 1 gets the fraction `stage1_share` exactly. `shares` >= 1 noise shares make up a sum: a
    message carries z / sqrt(shares) of a `distributed` multiplier z and all of a `local` one. Raises UserError for
    impossible targets and for `central`.
    """
    _check_target(target_epsilon, delta, stage1_rounds, rounds, stage1_share)
    if shares < 1:
        raise UserError(f"max_cohort (noise shares) is {shares}: it must be at least 1")
    per_configured = message_multiplier(noise, 1.0, shares)
    if per_configured is None:
        raise UserError(
            "privacy.target.adversary=server needs noise=distributed or local: with central the server is trusted"
        )
    mu = _mu(target_epsilon, delta)

    def multiplier(count: int, share: float) -> float:
        return round_up(2 * math.sqrt(count / share) / (mu * per_configured))

    first = multiplier(stage1_rounds, stage1_share) if stage1_rounds else None
    second = multiplier(rounds, 1 - stage1_share if stage1_rounds else 1.0)
    accountant = accountants.create("gdp", REPLACE_ONE)
    for z, count in ((first, stage1_rounds), (second, rounds)):
        if z is not None:
            accountant.compose(GaussianEvent(message_multiplier(noise, z, shares)), count)
    return Calibration(first, second, accountant.epsilon(delta).epsilon)


def _check_target(target_epsilon: float, delta: float, stage1_rounds: int, rounds: int, stage1_share: float) -> None:
    if not 0 < target_epsilon < math.inf:
        raise UserError(f"target epsilon is {target_epsilon}: it must be finite and greater than 0")
    if not 0 < delta < 1:
        raise UserError(f"target delta is {delta}: it must lie strictly between 0 and 1")
    if stage1_rounds < 0 or rounds < 1:
        raise UserError(f"stage-1 rounds {stage1_rounds} must be >= 0 and rounds {rounds} >= 1")
    if stage1_rounds and not 0 < stage1_share < 1:
        raise UserError(f"stage1_share is {stage1_share}: with stage-1 rounds it must lie strictly between 0 and 1")


def _mu(epsilon: float, delta: float) -> float:
    from fedllm.privacy.accountants.gdp import gdp_mu

    return gdp_mu(epsilon, delta)


def calibrate(
    accountant: str,
    compose: Callable[[float], Sequence[tuple[Event, int]]],
    epsilon: float,
    delta: float,
    relation: str = ADD_REMOVE,
) -> tuple[float, PrivacyAnswer]:
    """The least noise multiplier, of DIGITS digits, with which an accountant's epsilon stays within the target.

    accountant: any registered name; one that estimates calibrates to its estimate. compose: from a noise multiplier > 0 to
    the (event, count) pairs that it would give; their epsilon must fall as it grows. epsilon: finite and > 0. delta: in
    (0, 1). relation: see events.py.
    Returns the multiplier, at least MIN_MULTIPLIER, and the answer that confirms it. Raises UserError for impossible
    targets, UnsupportedEvent for events that the accountant has no theorem for.
    """
    _check_target(epsilon, delta, 0, 1, 0.0)
    answers: dict[float, PrivacyAnswer] = {}

    def epsilon_at(z: float) -> float:
        composed = accountants.create(accountant, relation)
        for event, count in compose(z):
            composed.compose(event, count)
        answers[z] = composed.epsilon(delta)
        found = answers[z].epsilon
        return math.inf if found is None else found

    guess = _guess(compose, epsilon, delta, relation)
    z = _least(epsilon_at, epsilon, guess, MIN_MULTIPLIER)
    return z, answers[z]


def _guess(compose: Callable[[float], Sequence[tuple[Event, int]]], epsilon: float, delta: float, relation: str) -> float:
    """The multiplier that the CLT would give for the same events: a start for the search, never an answer."""
    target = _mu(epsilon, delta) / relation_factor(relation)

    def mu(z: float) -> float:
        total = 0.0
        for outer, times in compose(z):
            for event, count in flatten(outer, times):
                if isinstance(event, FreeEvent):
                    continue
                cohort = getattr(event, "cohort", 0) / getattr(event, "population", 1)
                rate = getattr(event, "sampling_rate", cohort or 1.0)
                exponent = min((getattr(event, "sensitivity", 1.0) / event.noise_multiplier) ** 2, 600.0)
                total += count * (getattr(event, "group", 1) * rate) ** 2 * math.expm1(exponent) if rate < 1 else count * exponent
        return math.sqrt(total)

    low, high = math.log(MIN_MULTIPLIER), math.log(MAX_MULTIPLIER)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mu(math.exp(middle)) > target else (low, middle)
    return math.exp(high)


def _least(epsilon_at: Callable[[float], float], target: float, guess: float, floor: float) -> float:
    """The least multiplier >= floor of DIGITS digits with epsilon_at(z) <= target; epsilon_at falls as z grows.

    Secants in log-log scale, where the curve is nearly a line, over the multipliers of so many digits: it ends when the
    one below has been refused. Each epsilon is that of the quoted grid, so what is returned is confirmed.
    """
    low, high, last = 0.0, math.inf, None  # refused, enough, and the point before with its gap
    slope, z, floor = -1.5, max(round_up(guess), round_up(floor)), round_up(floor)
    for trial in itertools.count(1):
        gap = _log_ratio(epsilon_at(z), target)
        low, high = (max(low, z), high) if gap > 0 else (low, min(high, z))
        if high <= floor or low >= round_down(high):
            return high
        if z > MAX_MULTIPLIER:
            raise UserError(
                f"no noise multiplier up to {MAX_MULTIPLIER:g} reaches epsilon {target}: raise epsilon, delta or max_cohort, or cut rounds"
            )
        if last and math.isfinite(gap) and math.isfinite(last[1]):
            slope = min((gap - last[1]) / math.log(z / last[0]), -0.05)
        last = z, gap
        # Infinitely far, or so far that the line says little: a bounded stride.
        z = round_up(z * math.exp(min(max(gap / -slope, -0.7), 0.7)))
        first = max(round_up(low * (1 + 10.0**-DIGITS)), floor) if low else floor
        final = round_down(high)
        if low and high < math.inf and trial % 4 == 0:
            z = round_up(math.sqrt(low * high))
        z = min(max(z, first), final)


def _log_ratio(epsilon: float, target: float) -> float:
    """log(epsilon / target), where an epsilon of 0 counts as a billionth of the target."""
    return math.log(epsilon / target) if epsilon > 1e-9 * target else math.log(1e-9)
