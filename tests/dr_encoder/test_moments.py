"""Moments of stage 1: exact without noise, sane under it."""

import pytest
import torch

from dr_encoder.layout import AdapterLayout
from dr_encoder.moments import moments_to_std, unit_moments

LAYOUT = AdapterLayout.of([("q.A", torch.empty(4, 50)), ("q.B", torch.empty(30, 4)), ("v.A", torch.empty(7, 90))])
SCALE = torch.tensor([1.0, 0.1, 5.0])


def updates(units: int, mean: torch.Tensor, std: torch.Tensor, seed: int = 0) -> torch.Tensor:
    white = torch.randn(units, LAYOUT.size, generator=torch.Generator().manual_seed(seed))
    return white * LAYOUT.spread(std) + LAYOUT.spread(mean)


def test_moments_are_those_of_each_factor_of_each_unit():
    rows = updates(3, torch.tensor([0.5, 0.0, -2.0]), torch.tensor([1.0, 0.2, 3.0]))
    moments = unit_moments(rows, LAYOUT, SCALE)
    assert moments.shape == (3, 6)
    for unit, row in enumerate(rows):
        for index, part in enumerate(LAYOUT.views(row).values()):
            assert moments[unit, index] == pytest.approx(float(part.mean() / SCALE[index]), rel=1e-4)
            assert moments[unit, 3 + index] == pytest.approx(float(part.square().mean() / SCALE[index] ** 2), rel=1e-4)


def test_a_unit_like_the_public_ones_weighs_each_factor_alike():
    moments = unit_moments(updates(200, torch.zeros(3), SCALE), LAYOUT, SCALE)
    torch.testing.assert_close(moments[:, 3:].mean(0), torch.ones(3), atol=0.05, rtol=0)


def test_mean_and_deviation_come_back():
    mean, std = torch.tensor([0.5, 0.0, -2.0]), torch.tensor([1.0, 0.2, 3.0])
    released = unit_moments(updates(400, mean, std), LAYOUT, SCALE).mean(0)
    back_mean, back_std = moments_to_std(released, SCALE, floor=0.01)
    torch.testing.assert_close(back_mean, mean, atol=0.02, rtol=0.02)
    torch.testing.assert_close(back_std, std, rtol=0.02, atol=0)


def test_noise_never_gives_less_than_the_floor():
    mean, std = moments_to_std(torch.tensor([0.0, 9.0, 0.0, -4.0, 1.0, 0.0]), SCALE, floor=0.05)
    torch.testing.assert_close(std, 0.05 * SCALE)
    assert torch.isfinite(mean).all()


def test_shrinking_brings_noisy_moments_nearer_the_truth():
    generator = torch.Generator().manual_seed(3)
    factors, noise = 60, 0.7
    scale = torch.ones(factors)
    truth = torch.cat([torch.zeros(factors), 1 + 0.1 * torch.randn(factors, generator=generator)])
    true_std = truth[factors:].sqrt()
    plain = shrunk = 0.0
    for _ in range(50):
        noisy = truth + noise * torch.randn(2 * factors, generator=generator)
        plain += float((moments_to_std(noisy, scale, 0.05)[1] - true_std).square().mean())
        shrunk += float((moments_to_std(noisy, scale, 0.05, noise)[1] - true_std).square().mean())
    assert shrunk < 0.25 * plain


def test_without_noise_nothing_is_shrunk():
    released = torch.tensor([0.1, -0.2, 0.3, 1.0, 2.0, 0.5])
    torch.testing.assert_close(moments_to_std(released, SCALE, 0.01, 1e-6), moments_to_std(released, SCALE, 0.01))


@pytest.mark.parametrize("scale", [[1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, 1.0]])
def test_a_scale_that_is_no_scale_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        unit_moments(torch.zeros(1, LAYOUT.size), LAYOUT, torch.tensor(scale))


def test_moments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="finite"):
        moments_to_std(torch.tensor([float("inf"), 0.0]), torch.ones(1), 0.1)
    with pytest.raises(ValueError, match="floor"):
        moments_to_std(torch.zeros(2), torch.ones(1), 0.0)
    with pytest.raises(ValueError, match="units"):
        unit_moments(torch.zeros(2, 5), LAYOUT, SCALE)
