"""Renyi divergences against high precision and dp-accounting, conversions against published figures."""

import math
import warnings

import mpmath
import numpy as np
import pytest

from fedllm.privacy import accountants
from fedllm.privacy.accountants import UnsupportedEvent, gdp, rdp, renyi
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    FixedSizeGaussianEvent,
    GaussianEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    truncation_probability,
)

BOTH = ("rdp", "rdp_classic")


def epsilon(name, event, count, delta, relation=ADD_REMOVE, **options):
    return accountants.create(name, relation, **options).compose(event, count).epsilon(delta).epsilon


def divergence(sigma, q, alpha):
    return renyi.poisson_cumulant(alpha - 1, 1 / sigma, q) / (alpha - 1)


def optimistic(event):
    """A privacy loss distribution by dp-accounting whose figures are lower bounds (very nearly, where cohorts are cut)."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    options = {"value_discretization_interval": 1e-3}
    if isinstance(event, TruncatedPoissonGaussianEvent):
        sizes = (event.population, event.sampling_rate, event.max_cohort, event.noise_multiplier)
        return pld.from_truncated_subsampled_gaussian_mechanism(*sizes, **options)
    options |= {"pessimistic_estimate": False, "use_connect_dots": False}
    return pld.from_gaussian_mechanism(event.noise_multiplier, sampling_prob=event.sampling_rate, **options)


def exact_cumulant(s, sigma, q):
    """log E[(1 + w)^(1+s)] to 30 digits."""
    with mpmath.workdps(40):
        mu, order = 1 / mpmath.mpf(sigma), 1 + mpmath.mpf(s)

        def integrand(x):
            return mpmath.npdf(x) * (1 + mpmath.mpf(q) * mpmath.expm1(mu * x - mu * mu / 2)) ** order

        end = float(max(2, order) * mu) + 14
        return mpmath.log(mpmath.quad(integrand, mpmath.linspace(-14, end, 30)))


class TestPoissonDivergence:
    @pytest.mark.parametrize(
        ("alpha", "want"), [(2.5, 1.08548710e-3), (5, 2.18075656e-3), (50, 2.38460375e-2), (100, 167.416308)]
    )
    def test_published_figures(self, alpha, want):
        assert 50 * divergence(2.5, 0.01, alpha) == pytest.approx(want, rel=1e-4)

    def test_low_fractional_order_where_the_usual_series_stops_too_early(self):
        # dp-accounting 0.6.0 gives 6.70579741e-4 here, 3 % above what 40 digits say.
        found = 50 * divergence(2.5, 0.01, 1.5)
        assert found == pytest.approx(float(50 * exact_cumulant(0.5, 2.5, 0.01) / 0.5), rel=1e-9)
        assert found <= 6.70579741e-4

    @pytest.mark.parametrize(("alpha", "want"), [(3, 0.00137687239217), (3.5, 0.00162757941604), (4, 0.00188534006445)])
    def test_high_precision_figures(self, alpha, want):
        assert divergence(1.5, 0.04, alpha) == pytest.approx(want, rel=1e-10)

    @pytest.mark.parametrize(
        ("s", "sigma", "q"),
        [
            (1e-7, 1.0, 0.01),
            (0.1, 2.0, 0.2),  # the usual series does not converge here
            (0.1, 0.5, 1e-6),
            (0.25, 0.1, 1024 / 1e8),
            (3.7, 5.0, 1e-9),
            (0.5, 5.0, 2e-3),
            (6.5, 0.7, 0.3),
            (0.3, 3.0, 0.999),
            (2.2, 100.0, 0.5),
        ],
    )
    def test_against_high_precision(self, s, sigma, q):
        assert renyi.poisson_cumulant(s, 1 / sigma, q) == pytest.approx(float(exact_cumulant(s, sigma, q)), rel=1e-10, abs=0)

    @pytest.mark.parametrize(("sigma", "q"), [(0.8, 0.01), (4.0, 0.3), (30.0, 1e-3)])
    def test_whole_orders_are_dp_accountings(self, sigma, q):
        from dp_accounting.rdp import rdp_privacy_accountant as theirs

        for alpha in (2, 7, 33):
            want = theirs._compute_rdp_poisson_subsampled_gaussian(q, sigma, [alpha])[0]
            assert divergence(sigma, q, alpha) == pytest.approx(want, rel=1e-7, abs=1e-14)

    def test_the_other_direction_is_no_worse(self):
        x, weight = np.linspace(-20, 30, 50_001), 1e-3 / math.sqrt(2 * math.pi)
        for s in (0.2, 1.0, 6.0):
            mixture = 1 + 0.1 * np.expm1(x - 0.5)
            other = math.log(np.sum(weight * np.exp(-x * x / 2) * mixture**-s)) / s
            assert other <= divergence(1.0, 0.1, 1 + s)

    def test_more_nodes_than_affordable_leave_an_upper_bound(self):
        exact = renyi.poisson_cumulant(1.0, 50.0, 1e-3)
        bound = renyi.mixture_cumulant((1 - 1e-3, 0.0), (1e-3, renyi.gaussian_cumulant(1.0, 50.0)))
        assert exact <= bound
        assert renyi.poisson_cumulant(1.0, 5000.0, 1e-3) == pytest.approx(renyi.gaussian_cumulant(1, 5000) + math.log(1e-3))


class TestFixedSizeDivergence:
    @pytest.mark.parametrize(("sigma", "q"), [(2.0, 0.02), (1.0, 0.1), (0.5, 0.01), (5.0, 0.3)])
    def test_the_better_of_the_theorem_and_joint_convexity(self, sigma, q):
        from dp_accounting.rdp import rdp_privacy_accountant as theirs

        for alpha in (1.3, 2, 3, 4.5, 12, 30.5):
            theorem = (alpha - 1) * theirs._compute_rdp_sample_wor_gaussian_scalar(q, sigma, alpha)
            convexity = renyi.mixture_cumulant((1 - q, 0.0), (q, renyi.gaussian_cumulant(alpha - 1, 1 / sigma)))
            found = renyi.fixed_size_cumulant(alpha - 1, 1 / sigma, q)
            assert found == pytest.approx(min(theorem, convexity), rel=1e-9)

    def test_above_the_true_divergence_of_a_mean(self):
        # The unit is +1 or -1, all others 0: (1-q) N(0) + q N(1) against (1-q) N(0) + q N(-1), by direct integration.
        sigma, q = 2.0, 0.25
        x = np.linspace(-40, 60, 20_001)
        law = [
            (1 - q) * np.exp(-(x**2) / (2 * sigma**2)) + q * np.exp(-((x - to) ** 2) / (2 * sigma**2)) for to in (1, -1)
        ]
        for alpha in (1.5, 2, 4, 9):
            density = law[1] * (law[0] / law[1]) ** alpha
            integral = np.sum(density) * (x[1] - x[0]) / (sigma * math.sqrt(2 * math.pi))
            assert renyi.fixed_size_cumulant(alpha - 1, 2 / sigma, q) >= math.log(integral)

    def test_replace_one_moves_the_sum_by_two(self):
        whole = FixedSizeGaussianEvent(4.0, 100, 100)
        assert epsilon("rdp", whole, 3, 1e-5, REPLACE_ONE) == epsilon("rdp", GaussianEvent(2.0), 3, 1e-5)
        almost = epsilon("rdp", FixedSizeGaussianEvent(4.0, 10**6, 10**6 - 1), 3, 1e-5, REPLACE_ONE)
        assert almost == pytest.approx(epsilon("rdp", whole, 3, 1e-5, REPLACE_ONE), rel=1e-4)

    def test_sampling_amplifies(self):
        values = [epsilon("rdp", FixedSizeGaussianEvent(4.0, 1000, m), 100, 1e-5, REPLACE_ONE) for m in (1, 10, 100, 1000)]
        assert values == sorted(values) and values[0] < 0.1 * values[-1]

    def test_against_dp_accountings_accountant(self):
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant

        theirs = RdpAccountant(range(2, 64), dp_accounting.NeighboringRelation.REPLACE_ONE)
        # Its noise multiplier is relative to how far a replacement moves the sum: half of ours.
        theirs.compose(dp_accounting.SampledWithoutReplacementDpEvent(1000, 20, dp_accounting.GaussianDpEvent(2.0)), 500)
        found = epsilon("rdp", FixedSizeGaussianEvent(4.0, 1000, 20), 500, 1e-5, REPLACE_ONE, orders=range(2, 64))
        assert found == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)


class TestConversions:
    @pytest.mark.parametrize(
        ("sigma", "epochs", "classic", "improved", "pld"),
        [(1.1, 60, 3.0084, 2.5967, 2.3818), (1.3, 15, 1.1923, 0.9546, 0.8646)],
    )
    def test_the_conversion_moves_the_headline(self, sigma, epochs, classic, improved, pld):
        event, count = PoissonGaussianEvent(sigma, 256 / 60000), epochs * 60000 // 256
        # The published figures come from lists of orders: ours are at most that much lower, as any real order may serve.
        assert epsilon("rdp_classic", event, count, 1e-5) == pytest.approx(classic, rel=1.5e-3)
        assert epsilon("rdp", event, count, 1e-5) == pytest.approx(improved, rel=5e-4)
        assert pld < epsilon("rdp", event, count, 1e-5) <= improved < epsilon("rdp_classic", event, count, 1e-5) <= classic

    def test_published_epsilon(self):
        assert epsilon("rdp", PoissonGaussianEvent(1.5, 0.04), 2250, 1e-5) == pytest.approx(7.3291, rel=3e-4)

    def test_extreme_published_epsilon_belongs_to_its_lowest_order(self):
        event, count = PoissonGaussianEvent(0.1, 1024 / 1e8), 10 * 97657
        assert epsilon("rdp", event, count, 1e-7, orders=(1.25, 1.5, 2, 64)) == pytest.approx(5.9e6, rel=5e-3)
        best = epsilon("rdp", event, count, 1e-7)
        # A client takes part about 10 times; 24 or fewer but for 1e-4 > delta: exact GDP of those is a lower bound.
        assert gdp.gdp_epsilon(math.sqrt(24) / 0.1, 1e-7) - 24 * math.log(1e8 / 1024) < best < 7801

    @pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE_ONE])
    def test_closed_form_of_the_gaussian(self, relation):
        mu, log_inverse = (0.5 if relation == ADD_REMOVE else 1.0), math.log(1e5)
        classic = mu * mu / 2 + mu * math.sqrt(2 * log_inverse)
        assert epsilon("rdp_classic", GaussianEvent(2.0), 1, 1e-5, relation) == pytest.approx(classic, rel=1e-5)
        improved = epsilon("rdp", GaussianEvent(2.0), 1, 1e-5, relation)
        assert gdp.gdp_epsilon(mu, 1e-5) < improved < classic

    def test_improved_at_one_order_is_the_proposition(self):
        alpha, delta = 4.0, 1e-6
        want = alpha / 2 + math.log1p(-1 / alpha) - math.log(alpha * delta) / (alpha - 1)
        assert epsilon("rdp", GaussianEvent(1.0), 1, delta, orders=[alpha]) == pytest.approx(want, rel=1e-12)
        want = alpha / 2 + math.log(1 / delta) / (alpha - 1)
        assert epsilon("rdp_classic", GaussianEvent(1.0), 1, delta, orders=[alpha]) == pytest.approx(want, rel=1e-12)

    def test_the_answer_names_conversion_and_optimal_order(self):
        event, count = PoissonGaussianEvent(0.8, 0.01), 10_000
        found = accountants.create("rdp").compose(event, count).epsilon(1e-5)
        assert found.conversion == "improved (CKS 2020), order 2.994"
        assert (found.kind, found.direction) == ("bound", "upper")
        assert epsilon("rdp", event, count, 1e-5, orders=[2.994]) == pytest.approx(found.epsilon, rel=1e-6)
        classic = accountants.create("rdp_classic").compose(event, count).epsilon(1e-5)
        assert classic.conversion == "classic (Mironov 2017), order 3.075"

    @pytest.mark.parametrize(("event", "count"), [(PoissonGaussianEvent(2.0, 0.2), 100), (PoissonGaussianEvent(0.8, 0.01), 1)])
    @pytest.mark.parametrize("delta", [1e-3, 1e-12])
    def test_no_listed_order_beats_the_one_found(self, event, count, delta):
        orders = 1 + np.geomspace(1e-5, 1e4, 800)
        for name in BOTH:
            found = epsilon(name, event, count, delta)
            assert found <= epsilon(name, event, count, delta, orders=orders) * (1 + 1e-5)

    def test_total_variation_makes_small_costs_free(self):
        event = PoissonGaussianEvent(100.0, 1e-6)
        found = accountants.create("rdp").compose(event).epsilon(1e-3)
        assert found.epsilon == 0.0 and "total variation" in found.conversion
        answer = accountants.create("rdp").compose(GaussianEvent(1.0)).delta(0.0)
        assert gdp.gdp_delta(1.0, 0.0) < answer.delta < 0.6

    def test_orders_are_checked(self):
        for orders in ([], [1.0], [0.5, 2], [math.inf]):
            with pytest.raises(ValueError, match="orders"):
                accountants.create("rdp", orders=orders)


class TestBounds:
    @pytest.mark.parametrize(
        ("event", "count"),
        [
            (PoissonGaussianEvent(1.5, 0.04), 2250),
            (PoissonGaussianEvent(0.6, 0.01), 50),
            (PoissonGaussianEvent(3.0, 0.5), 3),
            (PoissonGaussianEvent(0.8, 0.001), 1),
        ],
    )
    def test_never_below_pld(self, event, count):
        truth = optimistic(event).self_compose(count)
        for name in BOTH:
            bound = accountants.create(name).compose(event, count)
            for delta in (1e-3, 1e-6, 1e-10):
                assert bound.epsilon(delta).epsilon >= truth.get_epsilon_for_delta(delta)
            for at in (0.0, 0.2, 1.0, 4.0):
                assert bound.delta(at).delta >= truth.get_delta_for_epsilon(at) - 1e-13  # its FFT knows no less

    def test_truncation_is_paid_from_delta_or_in_the_divergence(self):
        delta = 1e-5
        plain = epsilon("rdp", PoissonGaussianEvent(1.0, 0.02), 100, delta)
        values = {m: epsilon("rdp", TruncatedPoissonGaussianEvent(1.0, 0.02, 5000, m), 100, delta) for m in (5000, 160, 140, 101)}
        assert values[5000] == plain
        paid = 100 * truncation_probability(5000, 0.02, 160)
        assert 0 < paid < delta
        assert values[160] == epsilon("rdp", PoissonGaussianEvent(1.0, 0.02), 100, delta - paid)
        assert 100 * truncation_probability(5000, 0.02, 140) > delta  # where paying is impossible
        assert plain < values[160] < values[140] < values[101] <= epsilon("rdp", GaussianEvent(0.5), 100, delta)

    @pytest.mark.parametrize("cohort", [101, 140])
    def test_truncation_never_below_its_exact_distribution(self, cohort):
        event = TruncatedPoissonGaussianEvent(1.0, 0.02, 5000, cohort)
        assert epsilon("rdp", event, 3, 1e-5) >= optimistic(event).self_compose(3).get_epsilon_for_delta(1e-5) * 0.999

    def test_a_cut_that_always_comes_is_a_replacement_of_two_clips(self):
        event = TruncatedPoissonGaussianEvent(1.0, 0.5, 1000, 1)
        for s in (0.3, 2.0):
            replaced = math.log(0.5 + 0.5 * math.exp(s * (1 + s) * 4 / 2))
            assert rdp.event_cumulant(event, s, ADD_REMOVE) == pytest.approx(replaced, rel=1e-12)

    def test_heterogeneous_phases_compose(self):
        parts = [(PoissonGaussianEvent(0.8, 0.01), 500), (PoissonGaussianEvent(1.2, 0.02), 100), (GaussianEvent(8.0), 20)]
        one, other = accountants.create("rdp"), accountants.create("rdp")
        for event, count in parts:
            one.compose(event, count)
        for event, count in reversed(parts):
            other.compose(event, count)
        assert one.epsilon(1e-5) == other.epsilon(1e-5)
        assert max(epsilon("rdp", e, n, 1e-5) for e, n in parts) < one.epsilon(1e-5).epsilon
        assert one.epsilon(1e-5).epsilon < sum(epsilon("rdp", e, n, 1e-5 / 3) for e, n in parts)

    @pytest.mark.parametrize("name", BOTH)
    def test_extremes_and_no_warnings(self, name):
        cases = [
            (PoissonGaussianEvent(2.0, 0.2), 10, 1e-5),
            (PoissonGaussianEvent(100.0, 0.01), 10**6, 1e-12),
            (PoissonGaussianEvent(1e-3, 0.5), 10**6, 1e-12),
            (PoissonGaussianEvent(1e6, 1e-9), 1, 1e-12),
            (PoissonGaussianEvent(1.0, 1e-200), 10, 1e-5),
            (PoissonGaussianEvent(1.0, 1 - 1e-15), 10, 1e-5),
            (GaussianEvent(1e-3), 100, 0.999),
            (GaussianEvent(1e8), 1, 1e-12),
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for event, count, delta in cases:
                accountant = accountants.create(name).compose(event, count)
                found = accountant.epsilon(delta)
                assert math.isfinite(found.epsilon) and found.epsilon >= 0
                if found.epsilon > 0:
                    assert accountant.delta(found.epsilon).delta == pytest.approx(delta, rel=2e-3)
                for at in (0.0, 1e-3, 1e6, math.inf):
                    assert 0 <= accountant.delta(at).delta <= 1

    def test_nearly_everybody_is_everybody(self):
        assert epsilon("rdp", PoissonGaussianEvent(2.0, 1 - 1e-12), 4, 1e-5) == pytest.approx(
            epsilon("rdp", GaussianEvent(2.0), 4, 1e-5), rel=1e-6
        )


@pytest.mark.parametrize("name", BOTH)
def test_an_overflowing_cumulant_is_no_figure(name):
    answer = accountants.create(name).compose(PoissonGaussianEvent(1e-200, 0.1), 10).epsilon(1e-5)
    assert answer.epsilon is None and "overflow" in answer.reason
    assert renyi.mixture_cumulant((0.9, 0.0), (0.1, math.inf)) == math.inf


def test_an_underflowing_cumulant_is_not_nothing():
    for event in (GaussianEvent(1e200), PoissonGaussianEvent(1.0, 1e-200), PoissonGaussianEvent(1e200, 0.1)):
        assert 0 < accountants.create("rdp").compose(event).delta(0.0).delta < 1e-100


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("event", "relation", "why"),
    [
        (PoissonGaussianEvent(1.0, 0.1), REPLACE_ONE, "Poisson sampling with replace-one"),
        (TruncatedPoissonGaussianEvent(1.0, 0.1, 100, 30), REPLACE_ONE, "Poisson sampling with replace-one"),
        (PoissonGaussianEvent(1.0, 0.1, group=2), ADD_REMOVE, "groups under sampling"),
        (FixedSizeGaussianEvent(1.0, 100, 10), ADD_REMOVE, "only replace-one"),
    ],
)
def test_refused_with_the_reason(name, event, relation, why):
    with pytest.raises(UnsupportedEvent, match=rf"{name}.*{type(event).__name__}.*{why}"):
        accountants.create(name, relation).compose(event)


@pytest.mark.parametrize("relation", [ADD_REMOVE, REPLACE_ONE])
def test_unsampled_groups_are_a_sensitivity(relation):
    group = epsilon("rdp", PoissonGaussianEvent(2.0, 1.0, group=3), 2, 1e-5, relation)
    assert group == epsilon("rdp", GaussianEvent(2.0, 3.0), 2, 1e-5, relation)


def test_as_gaussian_leaves_sampled_events_alone():
    for event in (PoissonGaussianEvent(1.0, 0.5), FixedSizeGaussianEvent(1.0, 10, 9)):
        assert rdp.as_gaussian(event) is event
