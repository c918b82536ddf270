"""What holds for every accountant, run over the registry: a new one is tested by being registered."""

import itertools
import math
import subprocess
import sys

import pytest

from fedllm.privacy import accountants
from fedllm.privacy.accountants import UnsupportedEvent, gdp
from fedllm.privacy.answers import BOUND, EXACT, UPPER
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    ComposedEvent,
    FixedSizeGaussianEvent,
    FreeEvent,
    GaussianEvent,
    MomentsEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
)

SAMPLED = PoissonGaussianEvent(1.0, 0.02)
EVENTS = [
    GaussianEvent(2.0),
    SAMPLED,
    TruncatedPoissonGaussianEvent(1.0, 0.02, 5000, 180),
    FixedSizeGaussianEvent(4.0, 1000, 20),
    PoissonGaussianEvent(2.0, 0.02, group=3),
]
RELATIONS = (ADD_REMOVE, REPLACE_ONE)
DELTA = 1e-5


def answer(name, event, count=1, delta=DELTA, relation=ADD_REMOVE):
    return accountants.create(name, relation).compose(event, count).epsilon(delta)


def epsilon(name, event, count=1, delta=DELTA, relation=ADD_REMOVE):
    return answer(name, event, count, delta, relation).epsilon


def supported(name, relations=RELATIONS, events=EVENTS):
    return [
        (event, relation)
        for event, relation in itertools.product(events, relations)
        if accountants.create(name, relation).supports(event)
    ]


EXTREMES = (
    *(GaussianEvent(sigma) for sigma in (1e-300, 1e-155, 1e-20, 1e17, 1e100, 1e200)),
    *(PoissonGaussianEvent(sigma, 0.1) for sigma in (1e-300, 1e-200, 1e-20, 1e17, 1e200)),
    PoissonGaussianEvent(0.05, 1e-160),
    PoissonGaussianEvent(1e100, 1 - 2**-53),
)


@pytest.mark.parametrize("name", accountants.names())
class TestEveryAccountant:
    def test_nothing_and_free_events_cost_nothing(self, name):
        empty = accountants.create(name)
        assert empty.epsilon(DELTA).epsilon == 0.0
        assert empty.compose(FreeEvent("public text"), 3).epsilon(DELTA).epsilon == 0.0
        assert empty.delta(0.5).delta == 0.0
        if empty.supports(SAMPLED):
            assert empty.compose(PoissonGaussianEvent(1.0, 0.0), 5).compose(SAMPLED, 0).epsilon(DELTA).epsilon == 0.0

    def test_no_noise_has_no_figure_but_a_reason(self, name):
        for event in (GaussianEvent(0.0), PoissonGaussianEvent(0.0, 0.1)):
            if not accountants.create(name).supports(event):
                continue
            found = answer(name, event)
            assert found.epsilon is None and found.reason == "no noise"
            assert found.as_json()["epsilon"] is None
            assert accountants.create(name).compose(event).delta(1.0).delta == 1.0

    def test_answer_is_named(self, name):
        for event, relation in supported(name):
            accountant = accountants.create(name, relation).compose(event)
            for found in (accountant.epsilon(DELTA), accountant.delta(1.0)):
                assert (found.accountant, found.relation) == (name, relation)
                assert found.conversion
                assert found.kind == "bound" or found.direction == "unknown"
            assert accountant.epsilon(DELTA).delta == DELTA
            assert accountant.delta(1.0).epsilon == 1.0

    def test_falls_with_noise_and_grows_with_count_rate_and_smaller_delta(self, name):
        for relation in RELATIONS:
            by_noise = [epsilon(name, GaussianEvent(s), 3, relation=relation) for s in (0.8, 1.0, 2.0, 5.0)]
            assert by_noise == sorted(by_noise, reverse=True)
        if not accountants.create(name).supports(SAMPLED):
            return
        for values in (
            [epsilon(name, PoissonGaussianEvent(s, 0.02), 500) for s in (3.0, 2.0, 1.5, 1.0)],
            [epsilon(name, SAMPLED, n) for n in (300, 500, 1000, 2000)],
            [epsilon(name, PoissonGaussianEvent(1.0, q), 500) for q in (0.01, 0.02, 0.04)],
            [epsilon(name, SAMPLED, 500, delta) for delta in (1e-3, 1e-5, 1e-7)],
        ):
            assert values == sorted(values) and values[0] < values[-1]

    def test_round_trip(self, name):
        for event, relation in supported(name):
            accountant = accountants.create(name, relation).compose(event, 40)
            for delta in (1e-3, 1e-5, 1e-8):
                found = accountant.epsilon(delta).epsilon
                if found > 0:
                    assert accountant.delta(found).delta == pytest.approx(delta, rel=2e-3)

    def test_a_curve_is_its_points(self, name):
        accountant = accountants.create(name).compose(GaussianEvent(1.5), 2)
        at = [0.0, 0.3, 1.0, 4.0]
        found = accountant.deltas(at)
        assert found == pytest.approx([accountant.delta(e).delta for e in at], rel=1e-9)
        assert list(found) == sorted(found, reverse=True)

    def test_order_of_composition_does_not_matter(self, name):
        a, b = GaussianEvent(3.0), GaussianEvent(2.0)
        one = accountants.create(name).compose(a, 2).compose(b, 7).epsilon(DELTA)
        other = accountants.create(name).compose(b, 3).compose(a, 2).compose(b, 4).epsilon(DELTA)
        assert one == other
        wrapped = ComposedEvent(((MomentsEvent(a), 1), (ComposedEvent(((b, 7),)), 1), (FreeEvent("public"), 1), (a, 1)))
        assert accountants.create(name).compose(wrapped).epsilon(DELTA) == one

    def test_replace_one_doubles_the_sensitivity_once(self, name):
        doubled = epsilon(name, GaussianEvent(2.0), 4, relation=REPLACE_ONE)
        assert doubled == pytest.approx(epsilon(name, GaussianEvent(2.0, sensitivity=2.0), 4), rel=1e-4)
        if accountants.create(name, REPLACE_ONE).supports(PoissonGaussianEvent(2.0, 1.0)):
            assert epsilon(name, PoissonGaussianEvent(2.0, 1.0), 4, relation=REPLACE_ONE) == pytest.approx(doubled, rel=1e-4)

    def test_a_rate_of_one_is_no_sampling(self, name):
        if accountants.create(name).supports(PoissonGaussianEvent(2.0, 1.0)):
            assert epsilon(name, PoissonGaussianEvent(2.0, 1.0), 4) == pytest.approx(epsilon(name, GaussianEvent(2.0), 4), rel=1e-4)

    def test_a_group_of_one_is_a_unit_and_a_larger_one_costs_more(self, name):
        one, three = PoissonGaussianEvent(2.0, 0.02, group=1), PoissonGaussianEvent(2.0, 0.02, group=3)
        assert one == PoissonGaussianEvent(2.0, 0.02)
        if accountants.create(name).supports(three):
            assert epsilon(name, three, 100) > epsilon(name, one, 100)

    def test_upper_bounds_stand_above_the_closed_form_and_lower_ones_below(self, name):
        for mu in (0.2, 1.0, 4.0):
            found, truth = answer(name, GaussianEvent(1 / mu)), gdp.gdp_epsilon(mu, DELTA)
            if found.direction == "upper":
                assert found.epsilon >= truth * (1 - 1e-9)
            elif found.direction == "lower":
                assert found.epsilon <= truth * (1 + 1e-9)
            elif found.direction == "exact":
                assert found.epsilon == pytest.approx(truth, rel=1e-9)

    def test_extreme_inputs_give_a_figure_or_a_reason(self, name):
        for event, count, delta in (
            (PoissonGaussianEvent(0.1, 1e-7), 10_000, 1e-7),
            (PoissonGaussianEvent(100.0, 0.01), 10**6, 1e-5),
            (PoissonGaussianEvent(1.0, 0.01), 1000, 1e-12),
            (PoissonGaussianEvent(0.1, 1024 / 1e8), 10 * 97657, 1e-7),
            (GaussianEvent(0.01), 100, 1e-5),
            *((event, count, 1e-6) for event in EXTREMES for count in (1, 10**6)),
        ):
            if not accountants.create(name).supports(event):
                continue
            found = answer(name, event, count, delta)
            if found.epsilon is None:
                assert found.reason
            else:
                assert math.isfinite(found.epsilon) and found.epsilon >= 0
            for at in (1e-3, 1e6):
                value = accountants.create(name).compose(event, count).delta(at)
                assert value.reason if value.delta is None else 0 <= value.delta <= 1

    @pytest.mark.parametrize(("sigma", "rate"), [(1e-300, 0.1), (1e-200, 0.1), (1e-20, 1e-3), (1e-3, 1e-3)])
    def test_no_bound_is_below_the_chance_of_being_seen(self, name, sigma, rate):
        # With next to no noise a unit is seen whenever it is sampled.
        accountant = accountants.create(name).compose(PoissonGaussianEvent(sigma, rate), 10)
        seen = 1 - (1 - rate) ** 10
        by_delta, by_epsilon = accountant.epsilon(seen / 2), accountant.delta(1.0)
        if by_delta.kind == BOUND and by_delta.direction in (UPPER, EXACT):
            assert by_delta.reason if by_delta.epsilon is None else by_delta.epsilon > 10
            assert by_epsilon.delta > seen * (1 - 1e-9)

    def test_what_it_has_no_theorem_for_is_refused_with_the_reason(self, name):
        for event, relation in itertools.product(EVENTS, RELATIONS):
            accountant = accountants.create(name, relation)
            if not accountant.supports(event):
                with pytest.raises(UnsupportedEvent, match=f"{name}.*{type(event).__name__}.*: "):
                    accountant.compose(event)

    def test_bad_arguments(self, name):
        for delta in (0.0, 1.0, -1e-5, math.nan):
            with pytest.raises(ValueError, match="delta"):
                accountants.create(name).compose(GaussianEvent(1.0)).epsilon(delta)
        for at in (-1.0, math.nan):
            with pytest.raises(ValueError, match="epsilon"):
                accountants.create(name).compose(GaussianEvent(1.0)).delta(at)
        with pytest.raises(ValueError, match="relation"):
            accountants.create(name, "neighbours")
        with pytest.raises(ValueError, match="count"):
            accountants.create(name).compose(GaussianEvent(1.0), -1)


def test_unknown_accountant():
    with pytest.raises(ValueError, match="pld"):
        accountants.create("moments")


def test_families_name_registered_accountants():
    assert {name for members in accountants.FAMILIES.values() for name in members} == set(accountants.names())


def test_starts_without_heavy_imports():
    modules = "fedllm.privacy.guard, fedllm.privacy.calibration, fedllm.privacy.noise"
    code = f"import sys, {modules}; print([m for m in ('torch', 'scipy', 'dp_accounting') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
