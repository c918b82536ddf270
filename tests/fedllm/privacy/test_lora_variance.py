"""DP-FedLoRA's variance: the closed form against simulation, and where the published bound fails."""

import json

import numpy as np
import pytest

from fedllm.privacy.lora_variance import (
    exact_variance,
    lora_variance,
    monte_carlo,
    published_variance,
    random_factors,
    variance_terms,
)

TALL = (24, 6, 3, 2.0, 0.5, 0.2, 0.3)
WIDE = (6, 24, 3, 2.0, 0.5, 0.2, 0.3)


@pytest.mark.parametrize("sizes", [TALL, WIDE, (9, 9, 4, 1.0, 1.0, 0.05, 0.4), (1, 7, 1, 3.0, 0.0, 1.0, 0.1)])
def test_exact_against_simulation(sizes):
    found = lora_variance(*sizes, draws=4000, seed=3)
    assert abs(found.monte_carlo - found.exact) < 4 * found.standard_error
    assert found.standard_error < 0.1 * found.exact
    # Swapping m and n in any term would be seen.
    if sizes[0] != sizes[1] and sizes[4]:
        assert abs(found.monte_carlo - found.published) > 10 * found.standard_error


def test_every_term_alone():
    b, a = random_factors(20, 5, 2, 3.0, 0.7, seed=0)
    of_a, of_b, of_both = variance_terms(20, 5, 2, 3.0, 0.7, 0.4, 0.3)
    for noise, factors, want in (
        ((0.0, 0.3), (b, a), of_a),
        ((0.4, 0.0), (b, a), of_b),
        ((0.4, 0.3), (0 * b, 0 * a), of_both),
    ):
        mean, error, _ = monte_carlo(*factors, *noise, draws=3000, seed=5)
        assert abs(mean - want) < 4 * error


def test_unbiased():
    found = lora_variance(*TALL, draws=3000, seed=1)
    assert found.bias == pytest.approx(found.bias_expected, rel=0.5)
    b, a = random_factors(24, 6, 3, 2.0, 0.5, seed=0)
    # One noise for both factors would be biased: the check above would see it.
    assert found.bias < 0.01 * float(((b @ a) ** 2).sum()) + 3 * found.bias_expected


def test_published_bound_holds_for_square_matrices_only():
    square = (8, 8, 2, 2.0, 0.5, 0.2, 0.3)
    assert published_variance(*square) == pytest.approx(exact_variance(*square))
    assert lora_variance(*square, draws=2).published_is_bound
    assert lora_variance(*TALL, draws=2).published_is_bound  # too large by a factor here
    wide = lora_variance(*WIDE, draws=2000)
    assert not wide.published_is_bound
    assert wide.monte_carlo - 10 * wide.standard_error > wide.published


def test_no_noise_no_variance():
    found = lora_variance(3, 4, 2, 1.0, 1.0, 0.0, 0.0, draws=5)
    assert found.exact == found.published == found.monte_carlo == found.bias == 0.0


def test_factors_have_the_norms_asked_for():
    b, a = random_factors(7, 5, 3, 0.1, 2.0, seed=9)
    assert (b.shape, a.shape) == ((7, 3), (3, 5))
    assert (np.linalg.norm(b), np.linalg.norm(a)) == pytest.approx((0.1, 2.0))


def test_same_seed_same_record_and_json():
    one = lora_variance(*TALL, draws=10, seed=4)
    assert one == lora_variance(*TALL, draws=10, seed=4) != lora_variance(*TALL, draws=10, seed=5)
    assert json.loads(json.dumps(one.as_json()))["published_is_bound"] is True
    assert lora_variance(2, 2, 1, 0.0, 1.0, 0.1, 0.1, draws=2).as_json()["relative"] is None


@pytest.mark.parametrize(
    ("position", "value", "name"), [(0, 0, "m"), (1, -1, "n"), (2, 0, "r"), (3, -1.0, "norm_b"), (6, float("nan"), "std_a")]
)
def test_bad_arguments_are_named(position, value, name):
    sizes = list(TALL)
    sizes[position] = value
    with pytest.raises(ValueError, match=rf"Expected {name}="):
        exact_variance(*sizes)


def test_needs_draws():
    with pytest.raises(ValueError, match="draws=1"):
        lora_variance(*TALL, draws=1)
