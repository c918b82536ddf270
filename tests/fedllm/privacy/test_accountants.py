"""Accountants against closed forms, published figures and high-precision numerics."""

import math
import subprocess
import sys

import mpmath
import pytest

from fedllm.privacy import accountants
from fedllm.privacy.accountants import UnsupportedEvent, gdp, pld
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    FreeEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    truncation_probability,
)


def epsilon(name, event, count, delta, relation=ADD_REMOVE):
    return accountants.create(name, relation).compose(event, count).epsilon(delta).epsilon


@pytest.mark.parametrize("name", accountants.names())
class TestEveryAccountant:
    """What holds for any accountant, run over the registry."""

    def test_nothing_and_free_events_cost_nothing(self, name):
        empty = accountants.create(name)
        assert empty.epsilon(1e-5).epsilon == 0.0
        assert empty.compose(FreeEvent("public text"), 3).epsilon(1e-5).epsilon == 0.0
        assert empty.delta(0.5) == 0.0

    def test_no_noise_has_no_figure_but_a_reason(self, name):
        answer = accountants.create(name).compose(GaussianEvent(0.0)).epsilon(1e-5)
        assert answer.epsilon is None
        assert answer.reason == "no noise"
        assert answer.as_json()["epsilon"] is None

    def test_answer_is_named(self, name):
        answer = accountants.create(name, REPLACE_ONE).compose(GaussianEvent(2.0)).epsilon(1e-5)
        assert (answer.accountant, answer.relation, answer.delta, answer.kind) == (name, REPLACE_ONE, 1e-5, "bound")

    def test_falls_with_noise_and_grows_with_count(self, name):
        by_noise = [epsilon(name, GaussianEvent(s), 3, 1e-5) for s in (0.8, 1.0, 2.0, 5.0)]
        assert by_noise == sorted(by_noise, reverse=True)
        by_count = [epsilon(name, GaussianEvent(2.0), n, 1e-5) for n in (1, 2, 5)]
        assert by_count == sorted(by_count)

    def test_round_trip(self, name):
        accountant = accountants.create(name).compose(GaussianEvent(1.3), 2)
        for delta in (1e-3, 1e-5, 1e-8):
            assert accountant.delta(accountant.epsilon(delta).epsilon) == pytest.approx(delta, rel=1e-3)

    def test_replace_one_doubles_the_sensitivity_once(self, name):
        doubled = epsilon(name, GaussianEvent(2.0), 4, 1e-5, REPLACE_ONE)
        assert doubled == pytest.approx(gdp.gdp_epsilon(2.0, 1e-5), rel=1e-4)
        assert doubled == pytest.approx(epsilon(name, GaussianEvent(2.0, sensitivity=2.0), 4, 1e-5), rel=1e-4)

    def test_bad_arguments(self, name):
        for delta in (0.0, 1.0, -1e-5):
            with pytest.raises(ValueError, match="delta"):
                accountants.create(name).compose(GaussianEvent(1.0)).epsilon(delta)
        with pytest.raises(ValueError, match="relation"):
            accountants.create(name, "neighbours")
        with pytest.raises(ValueError, match="count"):
            accountants.create(name).compose(GaussianEvent(1.0), -1)


def test_unknown_accountant():
    with pytest.raises(ValueError, match="pld"):
        accountants.create("moments")


def test_starts_without_heavy_imports():
    modules = "fedllm.privacy.guard, fedllm.privacy.calibration, fedllm.privacy.noise"
    code = f"import sys, {modules}; print([m for m in ('torch', 'scipy', 'dp_accounting') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


class TestGdp:
    @pytest.mark.parametrize(
        ("relation", "want"),
        [
            (ADD_REMOVE, {0: 0.38292492, 1: 0.12693674, 2: 0.020923636}),
            (REPLACE_ONE, {0: 0.68268949, 1: 0.50986166, 2: 0.331897999}),
        ],
    )
    def test_delta_closed_form(self, relation, want):
        accountant = accountants.create("gdp", relation).compose(GaussianEvent(1.0))
        for at, delta in want.items():
            assert accountant.delta(at) == pytest.approx(delta, rel=1e-6)

    @pytest.mark.parametrize(
        ("mu", "five", "six"),
        [
            (0.25, 0.926341504, 1.060701862),
            (0.5, 1.993091404, 2.254084650),
            (1, 4.377178096, 4.886554117),
            (2, 9.997256146, 10.997151214),
            (6, 42.836008103, 45.785905949),
        ],
    )
    def test_epsilon_closed_form(self, mu, five, six):
        assert gdp.gdp_epsilon(mu, 1e-5) == pytest.approx(five, rel=1e-8)
        assert gdp.gdp_epsilon(mu, 1e-6) == pytest.approx(six, rel=1e-8)

    @pytest.mark.parametrize(("mu", "delta"), [(1e-3, 1e-6), (0.3, 1e-12), (30.0, 1e-5), (1e4, 1e-5), (1e4, 1e-30)])
    def test_against_high_precision_and_never_below(self, mu, delta):
        found = gdp.gdp_epsilon(mu, delta)
        with mpmath.workdps(60):
            m, d = mpmath.mpf(mu), mpmath.mpf(delta)

            def excess(e):
                return mpmath.log(
                    mpmath.ncdf(-e / m + m / 2) - mpmath.exp(e) * mpmath.ncdf(-e / m - m / 2)
                ) - mpmath.log(d)

            if found > 0:
                exact = float(mpmath.findroot(excess, mpmath.mpf(found)))
                assert found == pytest.approx(exact, rel=1e-9)
                assert found >= exact * (1 - 1e-11)
            else:
                assert excess(mpmath.mpf(0)) <= 0

    def test_composition(self):
        accountant = accountants.create("gdp")
        for sigma in (1.0, 2.0, 3.0):
            accountant.compose(GaussianEvent(sigma))
        combined = (1 + 1 / 4 + 1 / 9) ** -0.5
        assert accountant.epsilon(1e-5).epsilon == pytest.approx(
            epsilon("gdp", GaussianEvent(combined), 1, 1e-5), rel=1e-10
        )

    @pytest.mark.parametrize(("target", "sigma"), [(0.1, 30.749566), (1, 3.730632), (8, 0.600229)])
    def test_mu_for_a_target_is_the_analytic_gaussian(self, target, sigma):
        assert 1 / gdp.gdp_mu(target, 1e-5) == pytest.approx(sigma, rel=1e-6)

    def test_refuses_sampling(self):
        with pytest.raises(UnsupportedEvent, match=r"gdp.*PoissonGaussianEvent"):
            accountants.create("gdp").compose(PoissonGaussianEvent(1.0, 0.1))


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
        assert accountants.create("pld").compose(PoissonGaussianEvent(0.5, 0.2), 3).delta(1.0) == pytest.approx(
            0.15594, rel=1e-4
        )

    @pytest.mark.parametrize(
        ("q", "at", "want"), [(0.8, 1.0, 0.0816951787), (0.3, 2.0, 0.000334110293), (0.2, 0.1, 0.051816131)]
    )
    def test_worse_direction_of_one_step(self, q, at, want):
        assert accountants.create("pld").compose(PoissonGaussianEvent(1.0, q)).delta(at) == pytest.approx(
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
        plain = accountants.create("pld").compose(PoissonGaussianEvent(2.0, 0.5)).delta(0.5)
        cut = accountants.create("pld").compose(TruncatedPoissonGaussianEvent(2.0, 0.5, 40, 10)).delta(0.5)
        assert plain < cut < 1

    def test_nobody_else_means_no_cut(self):
        alone = epsilon("pld", TruncatedPoissonGaussianEvent(1.0, 0.3, 1, 1), 1, 1e-5)
        assert alone == epsilon("pld", PoissonGaussianEvent(1.0, 0.3), 1, 1e-5)
