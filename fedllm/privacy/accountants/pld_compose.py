"""Composition of privacy loss distributions by one FFT, and their hockey-stick divergence with what arithmetic may add.

The sum of T losses has the T-fold convolution as its law; all parts of a composition share one pair of transforms.

What is not computed is paid for, on the side of more privacy loss:
- Mass beyond the window (Chernoff bound) goes to infinity. Mass below it wraps around to higher losses.
- Each release's masses are off by some u in proportion, so the composition's by T times that.
- Rounding. A real FFT of length n errs by about u sqrt(log2 n) in root mean square relative to the l2 norm (Schatzman
  1996, "Accuracy of the discrete Fourier transform and the fast Fourier transform"); ten times that is assumed for each
  coefficient, the T-th power multiplies it by T, and Cauchy-Schwarz over the window turns it into an error of delta.

That error is absolute, so small deltas drown in it. They are computed from the *tilted* distribution p(l) exp(theta l) /
M(theta), whose composition puts its mass where those deltas come from: the error is then relative to Chernoff's bound.
Tilted mass beyond the window wraps around as well, and weighs more below: upper bounds stay upper bounds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft

from fedllm.privacy.accountants.pld_pairs import MAX_EXPONENT, Pmf

TAIL_MASS = 1e-17  # of the composition, on either side of the window
TILT_MASS = 1e-10  # the tilt is best for about this delta, and good from 1e-4 down to 1e-20
LOG_NOTHING = -60.0  # Fourier coefficients below exp of this are taken as 0
UNIT = 2.0**-53
SAFETY = 10.0  # over the root mean square of rounding errors

Parts = Sequence[tuple[Pmf, int]]


@dataclass(frozen=True)
class Curve:
    """The hockey-stick divergence delta(epsilon) for epsilon >= 0, linear in exp(epsilon) between the grid's points.

    first: index of the lowest point, whose loss is first * grid. above [n]: mass strictly above each point.
    beyond [n]: the sum over that mass of exp(point - loss). infinite: mass at infinity. whole: mass and its exp-sum from
    the lowest point on, for epsilon below it.
    drift: relative error of all masses. slack, tilt, log_moment: an error of slack exp(log_moment - tilt loss) is possible
    at each point besides.
    """

    first: int
    grid: float
    above: np.ndarray
    beyond: np.ndarray
    whole: tuple[float, float]
    infinite: float
    drift: float
    slack: float
    tilt: float = 0.0
    log_moment: float = 0.0

    def errors(self, index: np.ndarray) -> np.ndarray:
        """What rounding may have taken from delta in the cell that starts at point `index`."""
        exponent = self.log_moment - self.tilt * self.grid * (self.first + np.maximum(index, 0))
        return self.slack * np.exp(np.clip(exponent, -700.0, 0.0 if self.tilt == 0 else 60.0))

    def deltas(self, epsilons: np.ndarray, sign: float = 1.0) -> np.ndarray:
        """delta [m] at epsilons [m] >= 0. sign: +1 adds what may have been lost (an upper bound), -1 removes what may
        have been added (a lower bound, without the mass at infinity; of an untilted distribution only)."""
        points = len(self.above)
        position = np.minimum(np.asarray(epsilons, dtype=float) / self.grid - self.first, points)
        index = np.clip(np.floor(position).astype(np.int64), -1, points - 1)
        inside = np.maximum(index, 0)
        growth = np.exp((position - inside) * self.grid)
        mass = np.where(index < 0, self.whole[0], self.above[inside])
        moment = growth * np.where(index < 0, self.whole[1], self.beyond[inside])
        found = mass - moment + sign * self._summing() * (mass + moment)
        found = np.maximum(found, 0.0) * (1 + sign * self.drift) + self._margin(index, sign)
        if self.tilt:
            # Below the window a tilted distribution knows nothing.
            found = np.where(index < 0, 1.0, found)
        return np.clip(found, 0.0, 1.0)

    def _summing(self) -> float:
        """Relative error of `above` and `beyond` as sums of the masses: a term's and the worst of a running sum's."""
        return 16 * UNIT + len(self.above) * float(np.finfo(np.longdouble).eps)

    def _margin(self, index: np.ndarray, sign: float) -> np.ndarray:
        # Clipping at 0 keeps the positive half of the noise: to be removed once more from a lower bound.
        return self.errors(index) + self.infinite if sign > 0 else -2 * self.errors(index) - self.infinite

    def epsilon(self, delta: float, sign: float = 1.0) -> float:
        """The least epsilon >= 0 with deltas(epsilon) <= delta; infinity where there is none. sign: as for `deltas`."""
        low, high = -1, len(self.above) - 1
        if float(self.deltas(np.array([(self.first + high) * self.grid]), sign)[0]) > delta:
            return math.inf
        # Bisection over the points: invariant delta(low) > delta >= delta(high); -1 stands for epsilon 0.
        if float(self.deltas(np.zeros(1), sign)[0]) <= delta:
            return 0.0
        low = max(-self.first, -1)
        while high - low > 1:
            middle = (low + high) // 2
            at = np.array([max(0.0, (self.first + middle) * self.grid)])
            low, high = (middle, high) if float(self.deltas(at, sign)[0]) > delta else (low, middle)
        mass, moment = (float(self.above[low]), float(self.beyond[low])) if low >= 0 else self.whole
        mass, moment = mass * (1 + sign * self._summing()), moment * (1 - sign * self._summing())
        excess = mass - (delta - float(self._margin(np.array([low]), sign)[0])) / (1 + sign * self.drift)
        top = max(0.0, (self.first + high) * self.grid)
        if excess <= 0 or moment <= 0:
            return top
        start = (self.first + max(low, 0)) * self.grid
        return min(max(start + math.log(excess / moment), 0.0), top)


def log_moment(pmf: Pmf, grid: float, theta: float) -> float:
    """log of the sum of p exp(theta loss) over the finite losses."""
    exponents = (theta * grid) * np.arange(pmf.first, pmf.first + len(pmf.probs))
    peak = max(exponents[0], exponents[-1])
    total = float(pmf.probs @ np.exp(exponents - peak))
    if total > 1e-250:
        return peak + math.log(total)
    # The largest exponents belong to hardly any mass: weigh before looking for the largest.
    massive = pmf.probs > 0
    terms = exponents[massive] + np.log(pmf.probs[massive])
    peak = float(np.max(terms))
    return peak + math.log(float(np.sum(np.exp(terms - peak))))


def mean_and_variance(parts: Parts, grid: float) -> tuple[float, float]:
    """Of the composed finite loss."""
    mean = variance = 0.0
    for pmf, count in parts:
        losses = grid * np.arange(pmf.first, pmf.first + len(pmf.probs))
        total = float(pmf.probs.sum())
        one = float(pmf.probs @ losses) / total
        mean += count * one
        variance += count * float(pmf.probs @ (losses - one) ** 2) / total
    return mean, variance


def window(parts: Parts, grid: float) -> tuple[int, int]:
    """(lowest, highest) point that holds all but TAIL_MASS of the composition on either side, by Chernoff's bound."""
    low = sum(count * pmf.first for pmf, count in parts)
    high = sum(count * (pmf.first + len(pmf.probs) - 1) for pmf, count in parts)
    if sum(count for _, count in parts) > 1:
        reach = -math.log(TAIL_MASS)
        _, variance = mean_and_variance(parts, grid)
        start = math.sqrt(2 * reach / max(variance, grid * grid))
        for sign in (1.0, -1.0):

            def bound(theta: float, sign: float = sign) -> float:
                return (sum(count * log_moment(pmf, grid, sign * theta) for pmf, count in parts) + reach) / theta

            # Beyond `most` less than one point is to be gained.
            best = _least_value(bound, start, reach / grid) / grid
            if sign > 0:
                high = min(high, math.ceil(best) + 1)
            else:
                low = max(low, math.floor(-best) - 1)
    return low, max(low, high)


def _least_value(function: Callable[[float], float], start: float, most: float) -> float:
    """The least value of a unimodal function of theta in (0, most], roughly (any value is a valid bound): steps by halves."""
    start = min(start, most)
    best, value, factor = start, function(start), 2.0
    while factor > 1.3:
        for step in (factor, 1 / factor):
            while best * step <= most and (trial := function(best * step)) < value:
                best, value = best * step, trial
        factor = math.sqrt(factor)
    return value


def compose(parts: Parts, grid: float, bounds: tuple[int, int], tilted: bool = False) -> Curve:
    """The curve of a whole composition. parts: distributions with counts >= 1, all on `grid`. bounds: from `window`."""
    low, high = bounds
    theta, moments = 0.0, [0.0] * len(parts)
    if tilted:
        theta = _tilt(parts, grid)
        moments = [log_moment(pmf, grid, theta) for pmf, _ in parts]
        parts = [(_tilted(pmf, grid, theta, moment), count) for (pmf, count), moment in zip(parts, moments, strict=True)]
        high = max(high, window(parts, grid)[1])
    length = next_fast_len(high - low + 1, real=True)
    centre = 0
    log_size, phase = np.zeros(length // 2 + 1), np.zeros(length // 2 + 1)
    relative = np.zeros(length // 2 + 1)
    rounding = SAFETY * UNIT * math.sqrt(math.log2(length + 1))
    infinite = TAIL_MASS
    with np.errstate(divide="ignore"):
        for pmf, count in parts:
            probs = pmf.probs
            points = np.arange(pmf.first, pmf.first + len(probs))
            # Around its own mean, so that phases stay small where the coefficients are large.
            middle = round(float(probs @ points) / float(probs.sum()))
            spectrum = rfft(_fold(probs, pmf.first - middle, length))
            size = np.abs(spectrum)
            log_size += count * np.log(size)
            near = log_size > LOG_NOTHING
            phase[near] += count * np.angle(spectrum[near])
            relative += count * (rounding * float(np.linalg.norm(probs)) / np.maximum(size, 1e-30) + 4 * UNIT)
            centre += count * middle
            infinite += -math.expm1(count * math.log1p(-pmf.infinite)) if pmf.infinite < 1 else 1.0
    kept = np.flatnonzero(log_size > LOG_NOTHING)
    result = np.zeros(length // 2 + 1, dtype=complex)
    size = np.exp(log_size[kept])
    result[kept] = size * np.exp(1j * phase[kept])
    masses = np.roll(irfft(result, length), (centre - low) % length)
    norm = math.sqrt(2 / length) * float(np.linalg.norm(size))
    noise = math.sqrt(2 / length) * float(np.linalg.norm(size * relative[kept])) + rounding * norm + math.exp(LOG_NOTHING)
    first, masses = _upper_half(low, np.maximum(masses, 0.0))
    total = sum(count * moment for (_, count), moment in zip(parts, moments, strict=True))
    if theta:
        exponents = total - theta * grid * np.arange(first, first + len(masses))
        masses = np.minimum(masses * np.exp(np.minimum(exponents, 300.0)), 1.0)
    reach = min(len(masses), 1 / -math.expm1(-2 * theta * grid)) if theta else len(masses)
    slack = math.sqrt(reach) * noise
    drift = 8 * UNIT * sum(count for _, count in parts)
    return Curve(first, grid, *_sums(masses, grid), min(infinite, 1.0), drift, slack, theta, total)


def _tilted(pmf: Pmf, grid: float, theta: float, moment: float) -> Pmf:
    """p(l) exp(theta l - moment)."""
    exponents = theta * grid * np.arange(pmf.first, pmf.first + len(pmf.probs)) - moment
    return Pmf(pmf.first, pmf.probs * np.exp(np.minimum(exponents, MAX_EXPONENT)), pmf.infinite)


def _fold(probs: np.ndarray, first: int, length: int) -> np.ndarray:
    """Masses at the points first, first + 1, ... on a circle of `length` points."""
    start = first % length
    padded = np.zeros(-(-(start + len(probs)) // length) * length)
    padded[start : start + len(probs)] = probs
    return padded.reshape(-1, length).sum(axis=0)


def _upper_half(low: int, masses: np.ndarray) -> tuple[int, np.ndarray]:
    """Without the losses below -1 point: no epsilon >= 0 asks for them."""
    cut = min(max(-low - 1, 0), len(masses) - 1)
    return low + cut, masses[cut:]


def _sums(masses: np.ndarray, grid: float) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """`above`, `beyond` and `whole` of a curve."""
    # From the small end on: sums keep their relative precision.
    above = _sums_after(masses)
    beyond = np.empty(len(masses))
    block = max(1, int(400 / grid))  # exp(loss) must not overflow within one
    carry, end = 0.0, len(masses)
    while end > 0:
        start = max(0, end - block)
        decay = np.exp(-grid * np.arange(1, end - start + 1))
        beyond[start:end] = (_sums_after(masses[start:end] * decay) + carry * decay[-1]) / decay
        carry = float(beyond[start] + masses[start]) * math.exp(-grid)
        end = start
    return above, beyond, (float(above[0] + masses[0]), float(beyond[0] + masses[0]))


def _sums_after(values: np.ndarray) -> np.ndarray:
    """Sum of all later values, at each [n]."""
    sums = np.zeros(len(values))
    # In doubles the rounding of half a million additions would be more than all other errors together.
    sums[:-1] = np.cumsum(values[:0:-1], dtype=np.longdouble)[::-1]
    return sums


def _tilt(parts: Parts, grid: float) -> float:
    """theta at which Chernoff's bound is about TILT_MASS: theta K'(theta) - K(theta) = log(1 / TILT_MASS)."""
    reach = -math.log(TILT_MASS)
    _, variance = mean_and_variance(parts, grid)
    values: dict[float, float] = {}

    def bound(theta: float) -> float:
        values[theta] = (sum(count * log_moment(pmf, grid, theta) for pmf, count in parts) + reach) / theta
        return values[theta]

    _least_value(bound, math.sqrt(2 * reach / max(variance, grid * grid)), reach / grid)
    return min(values, key=values.get)
