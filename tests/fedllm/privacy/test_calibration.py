"""Calibration: within the target by the accountant, and not wasteful."""

import math

import pytest

from fedllm.errors import UserError
from fedllm.privacy import accountants, calibration
from fedllm.privacy.calibration import (
    calibrate,
    calibrate_release,
    calibrate_server,
    round_down,
    round_up,
    update_multiplier,
)
from fedllm.privacy.events import REPLACE_ONE, GaussianEvent, PoissonGaussianEvent, TruncatedPoissonGaussianEvent


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_release_is_met_and_tight(target):
    found = calibrate_release(target, 1e-4, 1, 10, 0.05, 2000, 160, 0.05)
    again = accountants.create("pld")
    for z, count in ((found.stage1_multiplier, 1), (found.stage2_multiplier, 10)):
        again.compose(TruncatedPoissonGaussianEvent(z, 0.05, 2000, 160), count)
    assert again.epsilon(1e-4).epsilon == found.epsilon
    assert 0.99 * target < found.epsilon <= target


def test_published_calibration():
    found = calibrate_release(1.0, 1e-6, 0, 512, 0.1, 10_000, None, 0.05)
    assert found.stage1_multiplier is None
    assert found.stage2_multiplier == pytest.approx(9.66, abs=0.01)


def test_stage1_costs_its_share_and_stage2_pays():
    without = calibrate_release(1.0, 1e-4, 0, 10, 0.05, 2000, None, 0.05)
    small = calibrate_release(1.0, 1e-4, 2, 10, 0.05, 2000, None, 0.05)
    large = calibrate_release(1.0, 1e-4, 2, 10, 0.05, 2000, None, 0.4)
    assert without.stage2_multiplier < small.stage2_multiplier < large.stage2_multiplier
    assert large.stage1_multiplier < small.stage1_multiplier


def test_local_multiplier_is_that_of_one_message():
    of_sum = calibrate_release(1.0, 1e-4, 0, 4, 0.05, 2000, None, 0.0)
    of_message = calibrate_release(1.0, 1e-4, 0, 4, 0.05, 2000, None, 0.0, noise="local", shares=100)
    assert of_message.stage2_multiplier * 10 == pytest.approx(of_sum.stage2_multiplier, rel=2e-3)
    assert of_message.epsilon <= 1.0


def test_a_target_that_sampling_alone_meets_still_gets_noise(monkeypatch):
    monkeypatch.setattr(calibration, "MIN_MULTIPLIER", 0.4)
    found = calibrate_release(1.0, 1e-3, 0, 1, 1e-4, 1_000_000, None, 0.0)
    assert found.stage2_multiplier == 0.4
    assert found.epsilon <= 1.0


@pytest.mark.parametrize(("noise", "divisor"), [("distributed", 12.0), ("local", 1.0)])
def test_server_is_exact_gdp_with_replace_one(noise, divisor):
    found = calibrate_server(8.0, 1e-4, 2, 10, noise, 144, 0.1)
    first, second = found.stage1_multiplier / divisor, found.stage2_multiplier / divisor
    mu = math.sqrt(4 * (2 / first**2 + 10 / second**2))
    by_hand = accountants.create("gdp", REPLACE_ONE).compose(GaussianEvent(2 / mu)).epsilon(1e-4).epsilon
    assert found.epsilon == pytest.approx(by_hand, rel=1e-9)
    assert 0.99 * 8 < found.epsilon <= 8
    assert 4 * 2 / first**2 / mu**2 == pytest.approx(0.1, rel=5e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"target_epsilon": 0.0},
        {"target_epsilon": -1.0},
        {"target_epsilon": math.inf},
        {"target_epsilon": math.nan},
        {"delta": 0.0},
        {"delta": 1.0},
        {"rounds": 0},
        {"stage1_rounds": -1},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.2},
        {"max_cohort": 0},
        {"population": 0},
        {"stage1_share": 0.0},
        {"stage1_share": 1.0},
    ],
)
def test_impossible_targets_are_user_errors(change):
    good = {
        "target_epsilon": 1.0,
        "delta": 1e-4,
        "stage1_rounds": 1,
        "rounds": 5,
        "sampling_rate": 0.1,
        "population": 100,
        "max_cohort": 20,
        "stage1_share": 0.1,
    }
    with pytest.raises(UserError):
        calibrate_release(**{**good, **change})


def test_server_target_needs_noised_messages():
    with pytest.raises(UserError, match="central"):
        calibrate_server(8.0, 1e-4, 0, 10, "central", 100, 0.1)


def test_round_up():
    assert round_up(0.46825) == 0.4683
    assert round_up(0.4682) == 0.4682
    assert round_up(9.9999) == 10.0
    assert round_up(123456.0) == 123500.0
    assert round_up(math.nextafter(0.4682, 1)) == 0.4683


def test_clip_bit_and_update_together_are_one_event():
    z, sigma_bit = 0.8, 3.0
    z_update = update_multiplier(z, sigma_bit)
    assert z_update > z
    # The joint sensitivity in units of the noise: the update's 1/z_update and the bit's (1/2)/sigma_bit.
    assert math.hypot(1 / z_update, 0.5 / sigma_bit) == pytest.approx(1 / z)
    with pytest.raises(UserError):
        update_multiplier(0.8, 0.4)


def test_less_noise_than_calibrated_breaks_the_target():
    found = calibrate_release(3.0, 1e-4, 0, 10, 0.05, 2000, None, 0.0)
    event = PoissonGaussianEvent(0.97 * found.stage2_multiplier, 0.05)
    assert accountants.create("pld").compose(event, 10).epsilon(1e-4).epsilon > 3.0


class TestAnyAccountant:
    @pytest.mark.parametrize(
        ("name", "target"), [("pld", 3.0), ("pld", 0.05), ("pld", 40.0), ("rdp", 3.0), ("edgeworth_1", 3.0), ("pld_optimistic", 3.0)]
    )
    def test_least_multiplier_of_its_digits(self, name, target):
        def compose(z):
            return [(PoissonGaussianEvent(z, 0.02), 300), (PoissonGaussianEvent(2 * z, 0.01), 100)]

        def at(z):
            accountant = accountants.create(name)
            for event, count in compose(z):
                accountant.compose(event, count)
            return accountant.epsilon(1e-5)

        z, answer = calibrate(name, compose, target, 1e-5)
        assert z == round_up(z) and answer == at(z)
        assert answer.epsilon <= target < at(round_down(z)).epsilon

    @pytest.mark.parametrize(
        ("epsilon", "sigma"), [(0.1, 30.749566), (0.5, 7.031827), (1, 3.730632), (2, 1.993812), (4, 1.081162), (8, 0.600229)]
    )
    def test_analytic_gaussian(self, epsilon, sigma):
        for name in ("gdp", "pld"):
            found = calibrate(name, lambda z: [(GaussianEvent(z), 1)], epsilon, 1e-5)[0]
            assert sigma <= found <= sigma * (1 + 1e-3)
        replaced = calibrate("gdp", lambda z: [(GaussianEvent(z), 1)], epsilon, 1e-5, REPLACE_ONE)[0]
        assert 2 * sigma <= replaced <= 2 * sigma * (1 + 1e-3)

    def test_published(self):
        assert calibrate("pld", lambda z: [(PoissonGaussianEvent(z, 0.1), 512)], 1.0, 1e-6)[0] == pytest.approx(9.66, abs=5e-3)

    def test_a_loose_target_gets_the_least_noise_there_is(self):
        assert calibrate("gdp", lambda z: [(GaussianEvent(z), 1)], 1e6, 1e-5)[0] == calibration.MIN_MULTIPLIER

    @pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
    def test_impossible_targets(self, epsilon, delta):
        with pytest.raises(UserError):
            calibrate("pld", lambda z: [(GaussianEvent(z), 1)], epsilon, delta)

    def test_noise_that_never_suffices(self):
        with pytest.raises(UserError, match="no noise"):
            calibrate("gdp", lambda z: [(GaussianEvent(1.0), 1), (GaussianEvent(z), 1)], 1.0, 1e-5)


def test_round_down_is_the_neighbour():
    assert [round_down(v) for v in (10.0, 0.8765, 1.0, 123500.0, math.inf)] == [9.999, 0.8764, 0.9999, 123400.0, math.inf]
