"""From a target epsilon to the least noise, rounded up, whose whole composition is confirmed to stay within it."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedllm.errors import UserError
from fedllm.privacy import accountants
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    GaussianEvent,
    message_multiplier,
    sampled_event,
    sum_multiplier,
)

DIGITS = 4  # multipliers are rounded up to so many significant digits
MIN_MULTIPLIER = 0.1  # less noise than this is never calibrated: a looser target is met with room to spare
MAX_MULTIPLIER = 1e6
SEARCH_GRID = 1e-3
TIGHT = 0.995  # share of the target that a calibrated epsilon should reach
MAX_CORRECTIONS = 8


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


def update_multiplier(noise_multiplier: float, sigma_bit: float) -> float:
    """Multiplier left for the update when a clip bit shares the event: (z^-2 - (2 sigma_b)^-2)^(-1/2).

    The bit is centred to +-1/2, so its sensitivity is 1/2 and noise of standard deviation sigma_bit on the sum of bits
    has multiplier 2 sigma_bit (Andrew et al. 2021, theorem 1). Both together are one Gaussian event of multiplier
    `noise_multiplier`.
    """
    if not 0 < noise_multiplier < 2 * sigma_bit:
        raise UserError(
            f"the clip bit's noise sigma_bit={sigma_bit} must exceed half the noise multiplier {noise_multiplier}"
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

    def total(multipliers: dict[float, int], **options: float) -> float:
        accountant = accountants.create("pld", ADD_REMOVE, **options)
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

    def epsilon_at(z: float, **options: float) -> float:
        counts = {first: stage1_rounds} if first else {}
        counts[z] = counts.get(z, 0) + rounds
        return total(counts, **options)

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


def _least(epsilon_at: Callable[..., float], target: float, guess: float, floor: float) -> float:
    """The least multiplier >= floor of DIGITS digits with epsilon_at(z) <= target; epsilon_at falls as z grows.

    Found on a coarse grid, then corrected until the grid of all quoted figures confirms it and little is wasted.
    """

    def coarse(z: float) -> float:
        return epsilon_at(z, grid=SEARCH_GRID)

    bracket = _bracket(coarse, target, guess, floor)
    z, slope = _solve(coarse, target, *bracket) if bracket else (round_up(floor), 1.0)
    best = None
    for _ in range(MAX_CORRECTIONS):
        epsilon = epsilon_at(z)
        if epsilon <= target:
            best = z if best is None else min(best, z)
            if epsilon >= TIGHT * target or z <= floor:
                return best
        corrected = round_up(max(z * (epsilon / target) ** (1 / slope), floor))
        z = corrected if corrected != z else round_up(z * (1 + 10.0 ** (1 - DIGITS)))
    while best is None:
        best = z if epsilon_at(z) <= target else None
        z = round_up(1.01 * z)
    return best


def _bracket(coarse: Callable[[float], float], target: float, guess: float, floor: float) -> tuple[float, float] | None:
    """(low, high) with coarse(low) > target >= coarse(high); None where even the floor is noise enough."""
    low = high = max(guess, floor)
    if coarse(high) > target:
        while coarse(high) > target:
            if high > MAX_MULTIPLIER:
                raise UserError(f"no noise reaches epsilon {target}: raise epsilon, delta or max_cohort, or cut rounds")
            low, high = high, 1.2 * high
        return low, high
    while coarse(low) <= target:
        if low <= floor:
            return None
        low, high = max(low / 1.2, floor), low
    return low, high


def _solve(coarse: Callable[[float], float], target: float, low: float, high: float) -> tuple[float, float]:
    """(z with coarse(z) about the target, -d log epsilon / d log z); in log-log scale the curve is nearly a line."""
    from scipy.optimize import brentq

    def excess(log_z: float) -> float:
        return math.log(max(coarse(math.exp(log_z)), 1e-9 * target) / target)

    ends = math.log(low), math.log(high)
    slope = (excess(ends[0]) - excess(ends[1])) / (ends[1] - ends[0])
    return round_up(math.exp(brentq(excess, *ends, xtol=1e-4))), max(slope, 0.5)
