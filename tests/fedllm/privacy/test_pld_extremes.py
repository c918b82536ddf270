"""Privacy loss distributions where a grid ends: too little noise, too much, failures, sums over half a million points."""

import math

import pytest

from fedllm.privacy import accountants
from fedllm.privacy.accountants import gdp, pld, pld_compose
from fedllm.privacy.events import ADD_REMOVE, REPLACE_ONE, GaussianEvent, PoissonGaussianEvent


def epsilon(name, event, count, delta, relation=ADD_REMOVE):
    return accountants.create(name, relation).compose(event, count).epsilon(delta).epsilon


class TestFallback:
    @pytest.mark.parametrize("failure", [MemoryError("no room"), OverflowError("out of range")])
    def test_a_failure_of_the_arithmetic_is_seen(self, monkeypatch, failure):
        def fail(*_):
            raise failure

        event = PoissonGaussianEvent(1.0, 0.0123)
        monkeypatch.setattr(pld, "curves_of", fail)
        accountant = accountants.create("pld").compose(event, 100)
        for answer in (accountant.epsilon(1e-5), accountant.delta(1.0)):
            assert str(failure) in answer.reason and "rdp" in answer.reason
            assert answer.conversion != accountant.conversion
        assert accountant.epsilon(1e-5).epsilon == epsilon("rdp", event, 100, 1e-5)
        pld.epsilon_of.cache_clear()

    def test_without_a_renyi_bound_amplification_is_given_up(self):
        answer = accountants.create("pld", REPLACE_ONE).compose(PoissonGaussianEvent(0.001, 0.1), 3).epsilon(1e-5)
        assert "without amplification" in answer.reason
        assert answer.epsilon == pytest.approx(gdp.gdp_epsilon(2000 * math.sqrt(3), 1e-5))

    def test_a_lower_bound_that_cannot_be_had_is_not_made_up(self):
        answer = accountants.create("pld_optimistic").compose(PoissonGaussianEvent(0.001, 0.1), 3).epsilon(1e-5)
        assert answer.epsilon is None and "no lower bound" in answer.reason


@pytest.mark.parametrize("event", [PoissonGaussianEvent(0.0595, 0.9996), PoissonGaussianEvent(0.0665, 1 - 1e-12)])
def test_sums_over_a_wide_curve_lose_nothing(event):
    # Half a million additions in doubles lost 4e-14 of the mass, twice what was paid for rounding.
    (curve,) = pld.curves_of(((event, 1),), REPLACE_ONE, pld.GRID, False)
    assert abs(curve.whole[0] - 1) < curve.slack
    assert accountants.create("pld", REPLACE_ONE).compose(event).delta(0.0).delta >= event.sampling_rate


TOO_MUCH = (GaussianEvent(1e200), GaussianEvent(1e6, 1e-5), PoissonGaussianEvent(1e17, 0.1), PoissonGaussianEvent(1e100, 1 - 2**-53))


@pytest.mark.parametrize("event", TOO_MUCH)
def test_noise_beyond_all_digits_is_taken_for_less_never_for_more(event):
    upper, lower = accountants.create("pld").compose(event, 3), accountants.create("pld_optimistic").compose(event, 3)
    assert upper.epsilon(1e-6).epsilon == 0 < upper.delta(0.0).delta < 1e-7
    assert lower.epsilon(1e-6).epsilon is None and lower.delta(0.0).delta == 0


@pytest.mark.parametrize("event", [PoissonGaussianEvent(0.05, 1e-20), PoissonGaussianEvent(0.05, 1e-8)])
def test_chernoffs_parameter_is_not_driven_to_infinity_by_a_distribution_at_one_point(event, monkeypatch):
    calls = []
    moment = pld_compose.log_moment
    monkeypatch.setattr(pld_compose, "log_moment", lambda *arguments: calls.append(arguments) or moment(*arguments))
    pld.curves_of.cache_clear()
    pld._grid.cache_clear()
    curves = pld.curves_of(((event, 10),), ADD_REMOVE, pld.GRID, True)
    assert len(calls) < 300
    assert all(curve.tilt * curve.grid < 40 for curve in curves)
