"""Privacy loss distributions against published figures, closed forms and the exact truncated distribution."""

import itertools
import math

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.integrate import quad
from scipy.stats import binom, norm

from fedllm.privacy import accountants
from fedllm.privacy.accountants import gdp, pld, pld_compose, pld_optimistic, pld_pairs
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


def library(event, count, relation=ADD_REMOVE):
    """dp-accounting's default accountant, pessimistic, on its default grid."""
    neighbours = dp_accounting.NeighboringRelation
    chosen = neighbours.ADD_OR_REMOVE_ONE if relation == ADD_REMOVE else neighbours.REPLACE_ONE
    return PLDAccountant(chosen).compose(event, count)


def sampled(sigma, q):
    return dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))


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

    def test_too_little_noise_for_a_grid_gets_the_better_of_rdp_and_gdp_and_says_so(self):
        answer = accountants.create("pld").compose(PoissonGaussianEvent(0.01, 0.05), 10).epsilon(1e-5)
        unamplified = gdp.gdp_epsilon(math.sqrt(10) / 0.01, 1e-5)
        by_rdp = epsilon("rdp", PoissonGaussianEvent(0.01, 0.05), 10, 1e-5)
        assert answer.epsilon == min(unamplified, by_rdp) < unamplified
        assert "rdp" in answer.reason and "RDP" in answer.conversion

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
        event = TruncatedPoissonGaussianEvent(3.0, 0.05, 2000, 150)
        lost = 5 * truncation_probability(2000, 0.05, 150)
        assert 1e-8 < lost < 1e-5
        cheap = epsilon("pld", event, 5, 1e-3)
        monkeypatch.setattr(pld, "CUT_SHARE", 0.0)
        pld.epsilon_of.cache_clear()
        exact = epsilon("pld", event, 5, 1e-3)
        pld.epsilon_of.cache_clear()
        # The replaced unit is known to the library as well: same mixture, coarser grid.
        theirs = library(dp_accounting.TruncatedSubsampledGaussianDpEvent(2000, 0.05, 150, 3.0), 5).get_epsilon(1e-3)
        assert theirs * (1 - 1e-9) <= exact <= 1.001 * theirs
        plain = epsilon("pld", PoissonGaussianEvent(3.0, 0.05), 5, 1e-3)
        assert plain <= exact <= cheap

    def test_frequent_truncation_costs_a_replacement(self):
        plain = accountants.create("pld").compose(PoissonGaussianEvent(2.0, 0.5)).delta(0.5).delta
        cut = accountants.create("pld").compose(TruncatedPoissonGaussianEvent(2.0, 0.5, 40, 10)).delta(0.5).delta
        assert plain < cut < 1

    def test_nobody_else_means_no_cut(self):
        alone = epsilon("pld", TruncatedPoissonGaussianEvent(1.0, 0.3, 1, 1), 1, 1e-5)
        assert alone == epsilon("pld", PoissonGaussianEvent(1.0, 0.3), 1, 1e-5)


class TestAgainstTheLibrary:
    """Never below dp-accounting's pessimistic answer, at most 0.1 % above it."""

    @pytest.mark.parametrize(
        ("sigma", "q", "count", "delta"),
        [
            (0.8, 0.01, 10_000, 1e-5),
            (3, 0.1, 512, 1e-6),
            (1.5, 0.04, 2250, 1e-5),
            (0.8, 0.001, 100, 1e-6),
            (1.5, 0.05, 1000, 1e-6),
            (3, 0.05, 20_000, 1e-6),
            (1.3, 256 / 60_000, 3510, 1e-5),
            (0.8, 0.01, 100, 0.015),
            (2, 0.0005, 50_000, 1e-7),
            (10, 0.1, 5000, 1e-6),
            (50, 0.5, 1000, 1e-5),
            (1, 0.8, 1, 1e-3),
            (4, 1.0, 30, 1e-5),
        ],
    )
    def test_epsilon_and_both_bounds(self, sigma, q, count, delta):
        theirs = library(sampled(sigma, q), count).get_epsilon(delta)
        ours = epsilon("pld", PoissonGaussianEvent(sigma, q), count, delta)
        assert theirs <= ours <= 1.001 * theirs
        lower = epsilon("pld_optimistic", PoissonGaussianEvent(sigma, q), count, delta)
        # Where the grid is coarse against one release's loss, the library's own answer is that far off.
        assert (0.98 if q < 0.001 else 0.99) * ours < lower < ours

    def test_mixed_compositions(self):
        a = accountants.create("pld").compose(PoissonGaussianEvent(0.8, 0.005), 100).compose(GaussianEvent(8.0), 200)
        theirs = library(sampled(0.8, 0.005), 100).compose(dp_accounting.GaussianDpEvent(8.0), 200).get_epsilon(1e-6)
        assert theirs <= a.epsilon(1e-6).epsilon <= 1.001 * theirs

    @pytest.mark.parametrize(("sigma", "q", "count"), [(2.0, 1.0, 4), (1.5, 0.1, 50)])
    def test_replace_one(self, sigma, q, count):
        theirs = library(sampled(sigma, q), count, REPLACE_ONE).get_epsilon(1e-5)
        ours = epsilon("pld", PoissonGaussianEvent(sigma, q), count, 1e-5, REPLACE_ONE)
        assert theirs <= ours <= 1.001 * theirs
        assert 0.99 * ours < epsilon("pld_optimistic", PoissonGaussianEvent(sigma, q), count, 1e-5, REPLACE_ONE) < ours


class TestOracles:
    POINTS = ((1.0, 0.8, 1.0), (1.0, 0.2, 0.0), (1.0, 0.2, 0.5), (0.7, 0.01, 0.05), (0.7, 0.01, 3.0))

    @pytest.mark.parametrize(("sigma", "q", "at"), POINTS)
    def test_one_step_both_directions_in_fifty_digits(self, sigma, q, at):
        with mpmath.workdps(50):
            s, rate, e = mpmath.mpf(sigma), mpmath.mpf(q), mpmath.exp(at)

            def where(loss):  # the outcome whose loss, removing, is `loss`; minus infinity below log(1-q)
                rest = (mpmath.exp(loss) - 1 + rate) / rate
                return s * s * mpmath.log(rest) + mpmath.mpf(1) / 2 if rest > 0 else -mpmath.inf

            def above(x, shift):
                return mpmath.ncdf((shift - x) / s) if x > -mpmath.inf else mpmath.mpf(1)

            x = where(at)
            remove = (1 - rate) * above(x, 0) + rate * above(x, 1) - e * above(x, 0)
            x = where(-at)
            add = 1 - above(x, 0) - e * (1 - (1 - rate) * above(x, 0) - rate * above(x, 1))
        curves = [
            pld_compose.compose([(pmf, 1)], pld.GRID, pld_compose.window([(pmf, 1)], pld.GRID))
            for pmf in pld_pairs.discretize(pld_pairs.poisson_pair(sigma, q), pld.GRID)
        ]
        for curve, want in zip(curves, (float(remove), float(add)), strict=True):
            got = float(curve.deltas(np.array([at]))[0])
            assert want - 1e-16 <= got <= want * (1 + 1e-5) + 1e-12

    @pytest.mark.parametrize(("q", "k", "at"), [(0.02, 3, 0.5), (0.3, 2, 0.0), (0.3, 5, 2.0), (1.0, 3, 1.0)])
    def test_group_by_integration(self, q, k, at):
        weights = binom.pmf(np.arange(k + 1), k, q)

        def difference(x, remove):
            mixture = float(weights @ norm.pdf(x, np.arange(k + 1), 2.0))
            one, other = (mixture, norm.pdf(x, 0, 2.0)) if remove else (norm.pdf(x, 0, 2.0), mixture)
            return max(one - math.exp(at) * other, 0.0)

        want = max(quad(difference, -30, 40, (remove,), limit=500, points=[0, k])[0] for remove in (True, False))
        event = PoissonGaussianEvent(2.0, q, group=k)
        assert accountants.create("pld").compose(event).delta(at).delta == pytest.approx(want, rel=1e-5, abs=1e-9)

    def test_group_against_the_library(self):
        weights = list(binom.pmf(np.arange(3), 2, 0.05))
        theirs = library(dp_accounting.dp_event.MixtureOfGaussiansDpEvent(8.0, list(range(3)), weights), 200).get_epsilon(1e-5)
        ours = epsilon("pld", PoissonGaussianEvent(8.0, 0.05, group=2), 200, 1e-5)
        assert theirs <= ours <= 1.001 * theirs

    def test_groups_have_a_limit_and_no_replacement(self):
        assert not accountants.create("pld").supports(PoissonGaussianEvent(1.0, 0.1, group=pld.MAX_GROUP + 1))
        assert not accountants.create("pld", REPLACE_ONE).supports(PoissonGaussianEvent(1.0, 0.1, group=2))

    def test_tiny_deltas_of_a_gaussian_survive_the_rounding_of_the_transform(self):
        # 400 releases at rate 1: the closed form knows the answer; an absolute error of 1e-12 would be seen.
        for delta in (1e-8, 1e-10, 1e-12):
            got = epsilon("pld", PoissonGaussianEvent(20.0, 1.0), 400, delta)
            want = gdp.gdp_epsilon(1.0, delta)
            assert want <= got <= want * 1.001

    def test_the_lower_bound_holds_on_a_grid_that_is_much_too_coarse(self, monkeypatch):
        monkeypatch.setattr(pld_optimistic, "GRID", 0.1)
        monkeypatch.setattr(pld_optimistic, "GAP", 10.0)
        accountant, want = accountants.create("pld_optimistic").compose(PoissonGaussianEvent(60.0, 1.0), 900), gdp.gdp_epsilon(0.5, 1e-2)
        (curve,), _ = accountant._lower_curves(accountant._costly())
        assert curve.grid == 0.025 and curve.epsilon(1e-2, -1.0) > want
        assert accountant.epsilon(1e-2).epsilon < want

    @pytest.mark.parametrize(("sigma", "count"), [(20.0, 400), (3.0, 9), (60.0, 900)])
    def test_the_lower_bound_stands_below_the_closed_form(self, sigma, count):
        event, mu = PoissonGaussianEvent(sigma, 1.0), math.sqrt(count) / sigma
        want = gdp.gdp_epsilon(mu, 1e-5)
        assert 0.99 * want < epsilon("pld_optimistic", event, count, 1e-5) < want
        assert accountants.create("pld_optimistic").compose(event, count).delta(1.0).delta < gdp.gdp_delta(mu, 1.0)

    def test_a_cut_lowers_the_rate_of_the_lower_bound_only(self):
        event = TruncatedPoissonGaussianEvent(2.0, 0.5, 40, 10)
        kept = sum(binom.pmf(k, 39, 0.5) * min(1.0, 10 / (k + 1)) for k in range(40)) / 2
        assert pld_optimistic.kept_rate(event) == pytest.approx(kept, rel=1e-9)
        assert epsilon("pld_optimistic", event, 5, 1e-5) < epsilon("pld", PoissonGaussianEvent(2.0, 0.5), 5, 1e-5)


def test_a_curve_is_vectorised_and_exact():
    for name in ("pld", "pld_optimistic"):
        accountant = accountants.create(name).compose(PoissonGaussianEvent(1.0, 0.02), 500)
        at = np.linspace(0, 12, 1001)
        curve = accountant.deltas(at)
        assert all(first >= second for first, second in itertools.pairwise(curve))
        assert [curve[i] for i in (0, 170, 1000)] == [accountant.delta(at[i]).delta for i in (0, 170, 1000)]
