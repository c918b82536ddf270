"""Gaussian differential privacy: an equality for unsampled Gaussian sums, a limit theorem for Poisson-sampled ones.

Dong, Roth and Su (2019), theorem 2.7 and corollary 2.13; Balle and Wang (2018), theorem 8:
delta(epsilon) = Phi(-epsilon/mu + mu/2) - exp(epsilon) Phi(-epsilon/mu - mu/2), mu^2 = sum of (sensitivity/sigma)^2.

T sums over Poisson samples of rate q tend to mu-GDP with mu^2 = q^2 T (exp(1/sigma^2) - 1) (Bu, Dong, Long and Su 2020,
corollary 4): what that gives has no error bound here and is an estimate.
"""

import math

from fedllm.privacy.accountants import EventCounts, check_delta, check_epsilon
from fedllm.privacy.answers import BOUND, ESTIMATE, EXACT, UNKNOWN, PrivacyAnswer
from fedllm.privacy.events import REPLACE_ONE, Event, FreeEvent, GaussianEvent, PoissonGaussianEvent

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_SQRT_HALF_PI = math.sqrt(math.pi / 2)
_TINY = 1e-300
_SMALL_MU = 1e-5  # below it a difference of Mills ratios has lost too many digits
_LARGE_MU = 1e7  # above it epsilon/mu - mu/2 has
_MAX_MU = 1e4  # up to here epsilon is computed to 12 digits
NO_BOUND = "a limit theorem without an error bound: it may under-report, most where the steps are few or the noise is small"


def log_delta(mu: float, epsilon: float) -> float:
    """log delta(epsilon) of mu-GDP for mu > 0, epsilon >= 0, by Mills ratios so that exp(epsilon) never appears.

    With a = epsilon/mu - mu/2 and b = a + mu: exp(epsilon) phi(b) = phi(a), hence delta = Phi(-a) - phi(a) R(b), R(x) =
    Phi(-x)/phi(x).
    """
    from scipy.special import erfcx, log_ndtr

    a = epsilon / mu - mu / 2
    b = epsilon / mu + mu / 2
    log_phi = -0.5 * a * a - _LOG_SQRT_2PI
    if mu < _SMALL_MU:
        # R(a) - R(b) is the integral of 1 - x R(x), which is convex: the trapezium is above it, by mu^2 at most.
        slopes = (1 - x * _SQRT_HALF_PI * float(erfcx(x / math.sqrt(2))) for x in (a, b))
        return log_phi + math.log(max(_TINY, mu * sum(slopes) / 2))  # in this order also where the slopes are not numbers
    mills_b = _SQRT_HALF_PI * erfcx(b / math.sqrt(2))
    if a > 0:
        return log_phi + math.log(max(_SQRT_HALF_PI * erfcx(a / math.sqrt(2)) - mills_b, _TINY))
    log_first = float(log_ndtr(-a))
    return log_first + math.log(-math.expm1(min(log_phi + math.log(mills_b) - log_first, -_TINY)))


def gdp_delta(mu: float, epsilon: float) -> float:
    """delta(epsilon) of mu-GDP, mu >= 0, epsilon >= 0."""
    check_epsilon(epsilon)
    if mu == 0 or math.isinf(epsilon):
        return 0.0 if mu < math.inf else 1.0
    return 1.0 if math.isinf(mu) else math.exp(log_delta(mu, epsilon))


def gdp_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon >= 0 at which mu-GDP gives `delta`; about mu^2/2 + mu z(delta) for large mu, without
    overflow up to mu 1e4.

    Rounded up in the last digits, so that it stays a bound. mu: >= 0 (infinity gives infinity). delta: in (0, 1).
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    check_delta(delta)
    if mu == 0 or math.isinf(mu):
        return mu
    if mu > _LARGE_MU:
        # delta <= Phi(-a); what is left out is 1/mu^2 of epsilon at most.
        return mu * (mu / 2 - float(ndtri(delta))) * (1 + 1e-15)
    target = math.log(delta)
    if log_delta(mu, 0.0) <= target:
        return 0.0
    # delta <= Phi(-a) <= exp(-a^2/2): at a = sqrt(2 log 1/delta) the target is certainly met.
    upper = mu * mu / 2 + mu * math.sqrt(-2 * target)
    epsilon = brentq(lambda e: log_delta(mu, e) - target, 0.0, upper, xtol=1e-15 * max(1.0, upper), rtol=8.9e-16)
    while log_delta(mu, epsilon) > target:
        epsilon += 1e-12 * max(epsilon, 1e-3)
    return epsilon


def gdp_mu(epsilon: float, delta: float) -> float:
    """The largest mu (to 12 digits, rounded down) whose exact epsilon at `delta` stays within `epsilon` > 0."""
    from scipy.optimize import brentq

    check_delta(delta)
    if not 0 < epsilon < math.inf:
        raise ValueError(f"Expected epsilon={epsilon} finite and > 0")
    target = math.log(delta)
    low, high = 1e-12, 1.0
    while log_delta(high, epsilon) < target:
        low, high = high, 2 * high
    mu = brentq(lambda m: log_delta(m, epsilon) - target, low, high, rtol=1e-13, xtol=1e-16)
    while log_delta(mu, epsilon) > target:
        mu *= 1 - 1e-12
    return mu


def clt_mu_squared(noise_multiplier: float, sampling_rate: float, steps: int) -> float:
    """mu^2 of `steps` Poisson-sampled Gaussian sums in the limit; infinity where it overflows. noise_multiplier: > 0."""
    if noise_multiplier < 0.04:  # exp(1/sigma^2) overflows
        return math.inf if sampling_rate and steps else 0.0
    return sampling_rate**2 * steps * math.expm1(noise_multiplier**-2)


class GdpAccountant(EventCounts):
    """Exact composition of Gaussian sums; with Poisson-sampled ones among them, an estimate by the CLT that says so."""

    name = "gdp"

    def refusal(self, event: Event) -> str | None:
        if isinstance(event, GaussianEvent | FreeEvent):
            return None
        if not isinstance(event, PoissonGaussianEvent):
            return "no exact composition, and the central limit theorem here is for plain Poisson sampling"
        if event.sampling_rate == 1:
            return None
        if self.relation == REPLACE_ONE:
            return "the central limit theorem here is for Poisson sampling with add-or-remove-one"
        return "group privacy under sampling" if event.group > 1 else None

    @property
    def sampled(self) -> bool:
        """Whether anything in the composition rests on the limit theorem."""
        return any(isinstance(event, PoissonGaussianEvent) and 0 < event.sampling_rate < 1 for event in self.counts)

    @property
    def conversion(self) -> str:
        return "central limit theorem" if self.sampled else "closed form"

    @property
    def mu(self) -> float:
        """GDP parameter of everything composed so far (in the limit, where `sampled`); infinity without noise."""
        return math.sqrt(math.fsum(sorted(self._mu_squared(event, count) for event, count in self.counts.items())))

    def _mu_squared(self, event: Event, count: int) -> float:
        rate = getattr(event, "sampling_rate", 1.0)
        if isinstance(event, FreeEvent) or rate == 0:
            return 0.0
        if event.noise_multiplier == 0:
            return math.inf
        if rate < 1:
            return clt_mu_squared(event.noise_multiplier, rate, count)
        sensitivity = self.factor * (event.sensitivity if isinstance(event, GaussianEvent) else event.group)
        mu = sensitivity / event.noise_multiplier
        return count * mu * mu  # infinite where mu**2 would raise

    def epsilon(self, delta: float) -> PrivacyAnswer:
        check_delta(delta)
        trouble = self._trouble()
        return self._labelled(None if trouble else gdp_epsilon(self.mu, delta), delta, trouble)

    def delta(self, epsilon: float) -> PrivacyAnswer:
        check_epsilon(epsilon)
        trouble = self._trouble()
        if trouble == "no noise":
            return self._labelled(epsilon, 1.0, trouble)
        return self._labelled(epsilon, None if trouble else gdp_delta(self.mu, epsilon), trouble)

    def _trouble(self) -> str | None:
        """Why there is no figure, if there is none."""
        if any(getattr(event, "noise_multiplier", 1.0) == 0 and self._mu_squared(event, 1) for event in self.counts):
            return "no noise"
        if math.isinf(self.mu) and not self.sampled:
            return "too little noise: mu is beyond all floating-point numbers"
        if self.sampled and self.mu > _MAX_MU:
            return f"too little noise for the central limit theorem: it gives mu={self.mu:.3g}"
        return None

    def _labelled(self, epsilon: float | None, delta: float | None, trouble: str | None) -> PrivacyAnswer:
        if self.sampled:
            return self._answer(epsilon, delta, trouble or NO_BOUND, kind=ESTIMATE, direction=UNKNOWN)
        return self._answer(epsilon, delta, trouble, kind=BOUND, direction=EXACT)
