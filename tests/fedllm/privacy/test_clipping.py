"""Clipping: the norm never exceeds C, whatever comes in."""

import math

import pytest
import torch

from dr_encoder.layout import AdapterLayout
from fedllm.privacy.clipping import clip_bits, clip_by_group, clip_units, next_clip, noisy_fraction
from fedllm.privacy.groups import GROUPS, clip_groups


def exact_norm(row):
    """Norm in arithmetic without rounding in the sum."""
    return math.sqrt(math.fsum(float(x) ** 2 for x in row))


def adversarial_rows(k):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(k, generator=generator) * scale for scale in (1e-30, 1e-3, 0.05, 1.0, 1e4, 1e15, 1e36)]
    spike = torch.zeros(k)
    spike[0] = 3.4e38
    rows += [spike, torch.full((k,), 3.4e38), torch.full((k,), 1 / math.sqrt(k)), torch.full((k,), 1e-45)]
    mixed = torch.full((k,), 1e-20)
    mixed[1] = 2.0
    return torch.stack([*rows, mixed])


@pytest.mark.parametrize("clip", [1e-12, 0.1, 1.0, 1.0000001, 7.3, 1e30])
@pytest.mark.parametrize("k", [1 + 1, 128, 5000])
def test_norm_never_exceeds_the_clip(clip, k):
    rows = adversarial_rows(k)
    clipped = clip_units(rows, clip)
    assert clipped.dtype == torch.float32
    for before, after in zip(rows, clipped, strict=True):
        assert exact_norm(after) <= clip
        if clip * (1 + 1e-6) < exact_norm(before) < 1e36 * clip:
            assert exact_norm(after) == pytest.approx(clip, rel=1e-5)
            cosine = torch.dot(before.double(), after.double()) / (exact_norm(before) * exact_norm(after))
            assert cosine > 0.99999


def test_many_random_rows_reach_but_never_pass_the_clip():
    rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    norms = [exact_norm(row) for row in clip_units(rows, 0.1)]
    assert max(norms) <= 0.1
    assert min(norms) > 0.1 * (1 - 1e-6)


def test_rows_within_the_clip_and_zero_rows_are_untouched():
    rows = torch.tensor([[0.03, -0.04], [0.0, 0.0], [-0.0, 1e-40]])
    clipped = clip_units(rows, 0.1)
    assert torch.equal(clipped, rows)
    assert clipped.data_ptr() != rows.data_ptr()


def test_non_finite_rows_become_zero_and_leave_the_others():
    rows = torch.tensor([[float("nan"), 1.0], [float("inf"), 0.0], [3.0, 4.0], [-float("inf"), float("inf")]])
    clipped = clip_units(rows, 1.0)
    assert not clipped[[0, 1, 3]].any()
    assert clipped[2].tolist() == pytest.approx([0.6, 0.8])


def test_input_is_not_changed_and_empty_cohorts_pass():
    rows = torch.ones(2, 3) * 9
    clip_units(rows, 1.0)
    assert torch.equal(rows, torch.ones(2, 3) * 9)
    assert clip_units(torch.empty(0, 3), 1.0).shape == (0, 3)


def test_half_precision_input_is_clipped_after_widening():
    clipped = clip_units(torch.full((1, 64), 100.0, dtype=torch.bfloat16), 1.0)
    assert exact_norm(clipped[0]) <= 1.0


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_clip(clip):
    with pytest.raises(ValueError, match="clip"):
        clip_units(torch.ones(1, 2), clip)


def test_sensitivity_of_the_sum():
    rows = torch.randn(20, 16, generator=torch.Generator().manual_seed(2)) * 5
    clipped = clip_units(rows, 0.5).double()
    other = clip_units(-rows[:1], 0.5).double()
    whole = clipped.sum(0)
    assert torch.linalg.vector_norm(whole - clipped[1:].sum(0)) <= 0.5 + 1e-12
    assert torch.linalg.vector_norm(whole - (clipped[1:].sum(0) + other[0])) == pytest.approx(1.0, abs=1e-5)


# -- groups ----------------------------------------------------------------------------------------------------------------------------

NAMES = [f"model.layers.{layer}.attn.{target}.lora_{kind}.weight" for layer in (0, 1) for target in "qv" for kind in "AB"]
HEADS = [("score.weight", torch.zeros(7)), ("score.bias", torch.zeros(1))]
LAYOUT = AdapterLayout.of([*((name, torch.zeros(3, 5)) for name in NAMES), *HEADS])


def test_groups_hold_every_coordinate_once():
    counts = {by: len(clip_groups(LAYOUT, by)) for by in GROUPS}
    assert counts == {"joint": 1, "matrix": 10, "layer": 3, "kind": 3}
    for by in GROUPS:
        taken = torch.zeros(LAYOUT.size)
        for group in clip_groups(LAYOUT, by):
            for start, stop in group:
                taken[start:stop] += 1
        assert torch.equal(taken, torch.ones(LAYOUT.size)), by
    assert clip_groups(LAYOUT, "kind") == (
        ((0, 15), (30, 45), (60, 75), (90, 105)),
        ((15, 30), (45, 60), (75, 90), (105, 120)),
        ((120, 128),),
    )
    assert clip_groups(LAYOUT, "layer") == (((0, 60),), ((60, 120),), ((120, 128),))


@pytest.mark.parametrize("clip", [1e-12, 0.1, 1.0000001, 1e30])
@pytest.mark.parametrize("by", GROUPS)
def test_no_group_exceeds_the_clip_and_the_row_no_more_than_all_of_them(by, clip):
    groups = clip_groups(LAYOUT, by)
    rows = adversarial_rows(LAYOUT.size)
    clipped = clip_by_group(rows, clip, groups)
    for before, after in zip(rows, clipped, strict=True):
        for group in groups:
            part = torch.cat([after[start:stop] for start, stop in group])
            whole = torch.cat([before[start:stop] for start, stop in group])
            assert exact_norm(part) <= clip
            if clip * (1 + 1e-6) < exact_norm(whole) < 1e36 * clip:
                assert exact_norm(part) == pytest.approx(clip, rel=1e-5)
        assert exact_norm(after) <= clip * math.sqrt(len(groups))
    long = clip_by_group(torch.ones(1, LAYOUT.size) * 9, 0.1, groups)
    assert exact_norm(long[0]) == pytest.approx(0.1 * math.sqrt(len(groups)), rel=1e-5)  # the sensitivity is reached


def test_one_group_is_the_plain_clip_and_short_groups_are_untouched():
    rows = adversarial_rows(LAYOUT.size)
    assert torch.equal(clip_by_group(rows, 0.3, clip_groups(LAYOUT, "joint")), clip_units(rows, 0.3))
    rows = torch.zeros(1, LAYOUT.size)
    rows[0, :15], rows[0, 15:30] = 9.0, 1e-3
    clipped = clip_by_group(rows, 0.1, clip_groups(LAYOUT, "matrix"))
    assert torch.equal(clipped[0, 15:], rows[0, 15:]) and exact_norm(clipped[0, :15]) == pytest.approx(0.1, rel=1e-5)


def test_a_row_that_is_not_finite_anywhere_is_zero_in_all_groups():
    rows = torch.ones(2, LAYOUT.size)
    rows[0, 50] = float("nan")
    clipped = clip_by_group(rows, 1.0, clip_groups(LAYOUT, "matrix"))
    assert not clipped[0].any() and clipped[1].any()


@pytest.mark.parametrize("groups", [(), (((0, 127),),), (((1, 128),),), (((0, 64),), ((60, 128),)), (((0, 60),), ((64, 128),))])
def test_groups_that_leave_out_or_repeat_a_coordinate_are_refused(groups):
    with pytest.raises(ValueError, match="each of k coordinates once"):
        clip_by_group(torch.ones(1, 128), 1.0, groups)


# -- bits ------------------------------------------------------------------------------------------------------------------------------


def test_clip_bits_are_centred():
    bits = clip_bits(torch.tensor([0.5, 1.0, 1.5, float("nan")], dtype=torch.float64), 1.0)
    assert bits.tolist() == [0.5, 0.5, -0.5, -0.5]


def test_adaptive_clip_finds_the_quantile():
    norms = torch.rand(1000, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 4
    clip = 0.05
    for _ in range(300):
        clip = next_clip(clip, noisy_fraction(clip_bits(norms, clip).sum().item(), 1000), 0.75, 0.2)
    assert clip == pytest.approx(3.0, rel=0.05)
    assert next_clip(1.0, 0.9, 0.5, 0.2) == pytest.approx(math.exp(-0.08))
    assert noisy_fraction(1e9, 100) == 1.0
    assert noisy_fraction(-1e9, 100) == 0.0
    with pytest.raises(ValueError):
        next_clip(1.0, 1.5, 0.5, 0.2)
