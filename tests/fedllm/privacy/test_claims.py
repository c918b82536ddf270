"""Published noise formulas against the figures that are known of them."""

import math

import pytest

from fedllm.privacy import accountants
from fedllm.privacy.claims import CALIBRATIONS, SOUND, accountant_multiplier, classic_multiplier
from fedllm.privacy.events import GaussianEvent, PoissonGaussianEvent


def exact(multiplier: float, releases: int, delta: float) -> float:
    return accountants.create("gdp").compose(GaussianEvent(multiplier), releases).epsilon(delta).epsilon


def test_classic_formula():
    assert classic_multiplier(1.0, 1e-5) == pytest.approx(4.844805, rel=1e-6)
    assert exact(classic_multiplier(0.9, 1e-5), 1, 1e-5) < 0.9  # proven below 1
    one = classic_multiplier(25.0, 1e-5)
    assert exact(one, 1, 1e-5) == pytest.approx(34.6, abs=0.05)  # DP-FedLoRA's: one matrix
    assert exact(classic_multiplier(25.0, 1e-5, 128), 1, 1e-5) == pytest.approx(exact(one, 128, 1e-5), rel=1e-12)
    assert exact(classic_multiplier(25.0, 1e-5, 128), 1, 1e-5) == pytest.approx(1950, rel=0.01)  # all 128 of a client in a round


@pytest.mark.parametrize(("records", "delta", "sigma"), [(392702, 1e-5, 0.557), (67349, 1e-5, 0.7865), (104743, 1e-6, 0.7395)])
def test_ew_tune_takes_the_first_order_estimate(records, delta, sigma):
    steps = 20 * (records // 2000)
    found = accountant_multiplier("edgeworth_1", 8.0, delta, steps, 2000 / records, records)
    assert found == pytest.approx(sigma, rel=2e-3)
    truth = accountants.create("pld").compose(PoissonGaussianEvent(found, 2000 / records), steps).epsilon(delta).epsilon
    assert truth > 8.25


@pytest.mark.parametrize("accountant", accountants.names())
def test_every_accountant_calibrates_to_its_own_answer(accountant):
    z = accountant_multiplier(accountant, 3.0, 1e-5, 50, 0.1, 1000)
    assert 2.99 < accountants.create(accountant).compose(PoissonGaussianEvent(z, 0.1), 50).epsilon(1e-5).epsilon <= 3.0
    assert accountant in CALIBRATIONS
    least = accountant_multiplier("pld", 3.0, 1e-5, 50, 0.1, 1000)
    assert z >= least if accountant in SOUND else math.isfinite(z)


def test_cut_cohorts_are_accounted_where_there_is_a_theorem():
    plain, cut = (accountant_multiplier("pld", 3.0, 1e-5, 50, 0.1, 1000, most) for most in (None, 120))
    assert cut > plain
    assert accountant_multiplier("gdp", 3.0, 1e-5, 50, 0.1, 1000, 120) == accountant_multiplier("gdp", 3.0, 1e-5, 50, 0.1, 1000)
