"""The lattice: unbiased inside its range, saturating outside, never more than one step off."""

import numpy as np
import pytest

from dr_encoder import quantize as lattice


@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_is_unbiased_and_within_one_step(bits):
    rng = np.random.default_rng(1)
    step = lattice.levels(clip=1.0, share_std=0.5, bits=bits)
    values = rng.uniform(-4, 4, 20)
    codes = np.tile(values, (40_000, 1))
    back = lattice.dequantize(lattice.quantize(codes, step, bits, rng.random(codes.shape)), step)
    assert np.abs(back - codes).max() <= step * (1 + 1e-9)
    standard_error = step / 2 / np.sqrt(len(codes))
    assert np.abs(back.mean(0) - values).max() < 4.5 * standard_error
    # Rounding to nearest would fail this: its mean error is up to half a step.
    assert np.abs(np.round(values / step) * step - values).max() > 4.5 * standard_error


@pytest.mark.parametrize("bits", [8, 16])
def test_the_range_is_clip_plus_six_deviations_and_saturates_symmetrically(bits):
    step = lattice.levels(clip=2.0, share_std=0.25, bits=bits)
    edge = 2.0 + 6 * 0.25
    back = lattice.dequantize(lattice.quantize(np.array([edge, -edge, 1e30, -1e30]), step, bits, np.array([0.0, 0.5, 0.999, 0.0])), step)
    np.testing.assert_allclose(back, [edge, -edge, edge, -edge], atol=step)
    assert back[2] == -back[3] == pytest.approx(edge)


def test_points_of_the_lattice_stay_where_they_are():
    step = lattice.levels(clip=1.0, share_std=0.0, bits=8)
    points = np.arange(-127, 128, dtype=np.int8)
    for uniform in (0.25, 0.75):
        again = lattice.quantize(lattice.dequantize(points, step), step, 8, np.full(255, uniform))
        np.testing.assert_array_equal(again, points)


def test_thirty_two_bits_pass_through():
    codes = np.array([0.1, -3.0, 1e300])
    back = lattice.quantize(codes, lattice.levels(1.0, 0.0, 32), 32, uniforms=None)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(lattice.dequantize(back, 1.0)[:2], codes[:2].astype(np.float32).astype(np.float64))
    assert np.isfinite(back).all()


def test_dtypes():
    assert [lattice.dtype_of(bits) for bits in (8, 16, 32, 64)] == ["int8", "int16", "float32", "float64"]
    codes = np.zeros((3, 5))
    assert lattice.quantize(codes, 1.0, 8, codes).dtype == np.int8
    assert lattice.quantize(codes, 1.0, 16, codes).shape == (3, 5)


@pytest.mark.parametrize("arguments", [(0.0, 0.1, 16), (1.0, -0.1, 16), (float("inf"), 0.1, 16), (1.0, 0.1, 12)])
def test_impossible_lattices_are_refused(arguments):
    with pytest.raises(ValueError):
        lattice.levels(*arguments)


def test_codes_that_are_not_finite_or_have_other_uniforms_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        lattice.quantize(np.array([np.nan]), 1.0, 16, np.zeros(1))
    with pytest.raises(ValueError, match="shape"):
        lattice.quantize(np.zeros(4), 1.0, 16, np.zeros(1))
