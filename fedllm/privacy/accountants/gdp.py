"""Exact Gaussian differential privacy: for unsampled Gaussian sums only, where it is an equality, not a limit theorem.

Dong, Roth and Su (2019), theorem 2.7 and corollary 2.13; Balle and Wang (2018), theorem 8:
delta(epsilon) = Phi(-epsilon/mu + mu/2) - exp(epsilon) Phi(-epsilon/mu - mu/2), mu^2 = sum of (sensitivity/sigma)^2.
"""

import math

from fedllm.privacy.accountants import EventCounts, check_delta, check_epsilon
from fedllm.privacy.answers import EXACT, PrivacyAnswer
from fedllm.privacy.events import Event, FreeEvent, GaussianEvent

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_SQRT_HALF_PI = math.sqrt(math.pi / 2)
_TINY = 1e-300


def log_delta(mu: float, epsilon: float) -> float:
    """log delta(epsilon) of mu-GDP for mu > 0, epsilon >= 0, by Mills ratios so that exp(epsilon) never appears.

    With a = epsilon/mu - mu/2 and b = a + mu: exp(epsilon) phi(b) = phi(a), hence delta = Phi(-a) - phi(a) R(b), R(x) =
    Phi(-x)/phi(x).
    """
    from scipy.special import erfcx, log_ndtr

    a = epsilon / mu - mu / 2
    b = epsilon / mu + mu / 2
    log_phi = -0.5 * a * a - _LOG_SQRT_2PI
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

    check_delta(delta)
    if mu == 0 or math.isinf(mu):
        return mu
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


class GdpAccountant(EventCounts):
    """Exact composition of Gaussian sums. Refuses sampled events: the CLT figure for them is no bound."""

    name = "gdp"
    conversion = "closed form"

    def refusal(self, event: Event) -> str | None:
        return None if isinstance(event, GaussianEvent | FreeEvent) else "no exact composition of sampled sums"

    @property
    def mu(self) -> float:
        """GDP parameter of everything composed so far; infinity without noise."""
        total = 0.0
        for event, count in self.counts.items():
            if isinstance(event, FreeEvent):
                continue
            if event.noise_multiplier == 0:
                return math.inf
            total += count * (self.factor * event.sensitivity / event.noise_multiplier) ** 2
        return math.sqrt(total)

    def epsilon(self, delta: float) -> PrivacyAnswer:
        epsilon = gdp_epsilon(self.mu, delta)
        if math.isinf(epsilon):
            return self._answer(None, delta, "no noise", direction=EXACT)
        return self._answer(epsilon, delta, direction=EXACT)

    def delta(self, epsilon: float) -> PrivacyAnswer:
        reason = "no noise" if math.isinf(self.mu) else None
        return self._answer(epsilon, gdp_delta(self.mu, epsilon), reason, direction=EXACT)
