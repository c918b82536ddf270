"""Privacy loss distributions against published figures, closed forms and the exact truncated distribution."""

import math

import pytest

from fedllm.privacy import accountants
from fedllm.privacy.accountants import gdp, pld
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    GaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    truncation_probability,
)


def epsilon(name, event, count, delta, relation=ADD_REMOVE):
    return accountants.create(name, relation).compose(event, count).epsilon(delta).epsilon


class TestPld:
    @pytest.mark.parametrize(
        ("sigma", "q", "count", "delta", "want"),
        [
            (3, 0.1, 512, 1e-6, 3.7697),
            (1.5, 0.04, 2250, 1e-5, 6.7688),
            (0.8, 0.001, 100, 1e-6, 0.260339),
            (1.5, 0.05, 1000, 1e-6, 6.199695),
            (3, 0.05, 20000, 1e-6, 13.950657),
        ],
    )
    def test_published_figures_and_upper(self, sigma, q, count, delta, want):
        got = epsilon("pld", PoissonGaussianEvent(sigma, q), count, delta)
        assert got == pytest.approx(want, rel=5e-5)
        assert got >= want * (1 - 1e-5)

    def test_published_delta(self):
        assert accountants.create("pld").compose(PoissonGaussianEvent(0.5, 0.2), 3).delta(1.0).delta == pytest.approx(
            0.15594, rel=1e-4
        )

    @pytest.mark.parametrize(
        ("q", "at", "want"), [(0.8, 1.0, 0.0816951787), (0.3, 2.0, 0.000334110293), (0.2, 0.1, 0.051816131)]
    )
    def test_worse_direction_of_one_step(self, q, at, want):
        assert accountants.create("pld").compose(PoissonGaussianEvent(1.0, q)).delta(at).delta == pytest.approx(
            want, rel=1e-4
        )

    def test_rate_one_is_the_gaussian(self):
        for relation, mu in ((ADD_REMOVE, 1.0), (REPLACE_ONE, 2.0)):
            got = epsilon("pld", PoissonGaussianEvent(2.0, 1.0), 4, 1e-5, relation)
            assert got == pytest.approx(gdp.gdp_epsilon(mu, 1e-5), rel=1e-4)

    def test_order_of_composition_is_immaterial_to_the_bit(self):
        a, b = PoissonGaussianEvent(0.9, 0.05), PoissonGaussianEvent(1.1, 0.05)
        one = accountants.create("pld").compose(a, 2).compose(b, 7).epsilon(1e-5)
        other = accountants.create("pld").compose(b, 3).compose(a, 2).compose(b, 4).epsilon(1e-5)
        assert one == other

    def test_too_little_noise_gives_up_amplification_and_says_so(self):
        answer = accountants.create("pld").compose(PoissonGaussianEvent(0.01, 0.05), 10).epsilon(1e-5)
        assert answer.epsilon == pytest.approx(gdp.gdp_epsilon(math.sqrt(10) / 0.01, 1e-5))
        assert "without amplification" in answer.reason

    def test_delta_too_small_for_the_arithmetic(self):
        with pytest.raises(ValueError, match="delta"):
            epsilon("pld", GaussianEvent(1.0), 1, 1e-13)


class TestTruncation:
    """The cheap route (delta minus the mass of truncation) against the exact distribution for truncated sampling."""

    def test_probability_by_enumeration(self):
        n, q, limit = 9, 0.3, 4
        by_hand = sum(math.comb(n - 1, k) * q**k * (1 - q) ** (n - 1 - k) for k in range(limit, n))
        assert truncation_probability(n, q, limit) == pytest.approx(by_hand, rel=1e-12)
        assert truncation_probability(4, q, 4) == 0.0

    def test_negligible_truncation_costs_nearly_nothing(self):
        plain = epsilon("pld", PoissonGaussianEvent(1.0, 0.05), 5, 1e-4)
        cut = epsilon("pld", TruncatedPoissonGaussianEvent(1.0, 0.05, 2000, 160), 5, 1e-4)
        assert plain < cut < plain * 1.001

    def test_cheap_route_is_never_below_the_exact_one(self, monkeypatch):
        # Rare truncation: there the exact distribution is still within reach of the bound on delta.
        event = TruncatedPoissonGaussianEvent(1.0, 0.05, 2000, 150)
        lost = 5 * truncation_probability(2000, 0.05, 150)
        assert 1e-8 < lost < 1e-5
        cheap = epsilon("pld", event, 5, 1e-3)
        monkeypatch.setattr(pld, "CUT_SHARE", 0.0)
        pld._epsilon.cache_clear()
        exact = epsilon("pld", event, 5, 1e-3)
        pld._epsilon.cache_clear()
        plain = epsilon("pld", PoissonGaussianEvent(1.0, 0.05), 5, 1e-3)
        assert plain <= exact <= cheap

    def test_frequent_truncation_costs_a_replacement(self):
        plain = accountants.create("pld").compose(PoissonGaussianEvent(2.0, 0.5)).delta(0.5).delta
        cut = accountants.create("pld").compose(TruncatedPoissonGaussianEvent(2.0, 0.5, 40, 10)).delta(0.5).delta
        assert plain < cut < 1

    def test_nobody_else_means_no_cut(self):
        alone = epsilon("pld", TruncatedPoissonGaussianEvent(1.0, 0.3, 1, 1), 1, 1e-5)
        assert alone == epsilon("pld", PoissonGaussianEvent(1.0, 0.3), 1, 1e-5)
