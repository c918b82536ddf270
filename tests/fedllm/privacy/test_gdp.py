"""Exact Gaussian differential privacy against closed forms and high precision."""

import mpmath
import pytest

from fedllm.privacy import accountants
from fedllm.privacy.accountants import UnsupportedEvent, gdp
from fedllm.privacy.events import ADD_REMOVE, REPLACE_ONE, GaussianEvent, PoissonGaussianEvent


def epsilon(name, event, count, delta, relation=ADD_REMOVE):
    return accountants.create(name, relation).compose(event, count).epsilon(delta).epsilon


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
            assert accountant.delta(at).delta == pytest.approx(delta, rel=1e-6)

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
