"""Gaussian differential privacy: the exact figures against closed forms, the limit theorem's against published ones."""

import mpmath
import pytest

from fedllm.privacy import accountants
from fedllm.privacy.accountants import UnsupportedEvent, gdp
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    FixedSizeGaussianEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
)


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

    @pytest.mark.parametrize("mu", [1e-12, 1e-9, 1e-7, 9e-6, 1.1e-5])
    @pytest.mark.parametrize("z", [0.0, 0.3, 4.0])
    def test_small_mu_keeps_its_digits(self, mu, z):
        with mpmath.workdps(60):
            m, e = mpmath.mpf(mu), mpmath.mpf(z * mu)
            want = float(mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m))
        assert gdp.gdp_delta(mu, z * mu) == pytest.approx(want, rel=1e-9)

    def test_large_mu_up_to_where_there_is_no_number(self):
        assert gdp.gdp_epsilon(1.01e7, 1e-5) == pytest.approx(1.01e7**2 / 2 + 1.01e7 * 4.264890793922825, rel=1e-13)
        assert epsilon("gdp", GaussianEvent(1e-20), 4, 0.5) == pytest.approx(2e40)
        answer = accountants.create("gdp").compose(GaussianEvent(1e-200)).epsilon(1e-5)
        assert answer.epsilon is None and answer.reason

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


class TestCentralLimit:
    @pytest.mark.parametrize(
        ("sigma", "q", "steps", "mu", "want", "pld"),
        [
            (1.5, 0.04, 2250, 1.41938176, 6.601567, 6.7688),
            (0.638, 256 / 60000, 70 * 60000 / 256, 1.784917, 8.6974, 9.4770),
        ],
    )
    def test_published_figures_are_below_the_truth(self, sigma, q, steps, mu, want, pld):
        accountant = accountants.create("gdp").compose(PoissonGaussianEvent(sigma, q), int(steps))
        assert accountant.mu == pytest.approx(mu, rel=1e-4)
        assert accountant.epsilon(1e-5).epsilon == pytest.approx(want, rel=1e-4)
        assert accountant.epsilon(1e-5).epsilon < pld

    @pytest.mark.parametrize("rate", [1e-9, 0.02, 0.999])
    @pytest.mark.parametrize("sigma", [0.0, 0.01, 0.1, 1.0, 100.0])
    def test_is_never_called_a_bound(self, sigma, rate):
        accountant = accountants.create("gdp").compose(GaussianEvent(3.0), 2).compose(PoissonGaussianEvent(sigma, rate))
        for answer in (accountant.epsilon(1e-5), accountant.delta(1.0)):
            assert (answer.kind, answer.direction, answer.conversion) == ("estimate", "unknown", "central limit theorem")
            assert answer.reason

    def test_the_label_stays_when_more_is_composed(self):
        accountant = accountants.create("gdp").compose(PoissonGaussianEvent(1.0, 0.02)).compose(GaussianEvent(1.0), 10**6)
        assert accountant.epsilon(1e-5).kind == "estimate"

    @pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE_ONE])
    def test_nothing_sampled_is_the_exact_bound(self, relation):
        exact = accountants.create("gdp", relation).compose(GaussianEvent(2.0), 4).epsilon(1e-5)
        whole = accountants.create("gdp", relation).compose(PoissonGaussianEvent(2.0, 1.0), 4).epsilon(1e-5)
        assert whole == exact
        assert (exact.kind, exact.direction, exact.reason) == ("bound", "exact", None)
        group = accountants.create("gdp", relation).compose(PoissonGaussianEvent(2.0, 1.0, group=3), 4).epsilon(1e-5)
        assert group.epsilon == epsilon("gdp", GaussianEvent(2.0, 3.0), 4, 1e-5, relation)

    def test_composes_with_exact_sums(self):
        accountant = accountants.create("gdp").compose(GaussianEvent(4.0), 9)
        accountant.compose(PoissonGaussianEvent(1.5, 0.04), 2250)
        assert accountant.mu == pytest.approx((9 / 16 + 1.41938176**2) ** 0.5, rel=1e-7)

    @pytest.mark.parametrize("sigma", [0.1, 0.03, 1e-200])
    def test_too_little_noise_has_a_reason(self, sigma):
        accountant = accountants.create("gdp").compose(PoissonGaussianEvent(sigma, 0.01), 1000)
        answer, delta = accountant.epsilon(1e-5), accountant.delta(1.0)
        assert answer.epsilon is None and delta.delta is None
        assert "too little noise" in answer.reason and answer.kind == "estimate"

    @pytest.mark.parametrize(
        ("event", "relation", "why"),
        [
            (PoissonGaussianEvent(1.0, 0.1), REPLACE_ONE, "add-or-remove-one"),
            (PoissonGaussianEvent(1.0, 0.1, group=2), ADD_REMOVE, "group"),
            (FixedSizeGaussianEvent(1.0, 100, 10), REPLACE_ONE, "plain Poisson"),
            (TruncatedPoissonGaussianEvent(1.0, 0.1, 100, 30), ADD_REMOVE, "plain Poisson"),
        ],
    )
    def test_refuses_what_the_theorem_is_not_about(self, event, relation, why):
        with pytest.raises(UnsupportedEvent, match=rf"gdp.*{type(event).__name__}.*{why}"):
            accountants.create("gdp", relation).compose(event)
