"""Noise and cohorts: the right law (both ways), secrecy of the source, reproducibility of the seeded one."""

import numpy as np
import pytest
from scipy import stats

from fedllm.privacy.events import truncation_probability
from fedllm.privacy.noise import Noise, default_max_cohort

KEY = {"purpose": "test", "stage": "stage2", "round": 3}


@pytest.mark.parametrize("seed", [7, None])
def test_gaussian_has_the_right_std_and_not_two_thirds_or_three_halves(seed):
    values = Noise(seed).gaussian(100_001, 2.5, **KEY)
    assert values.dtype == np.float64
    assert stats.kstest(values, "norm", args=(0, 2.5)).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(values, "norm", args=(0, 2.5 * wrong)).pvalue < 1e-30
    assert values.var() == pytest.approx(2.5**2, rel=0.03)
    # Box-Muller pairs share a radius: they must still be uncorrelated, in value and in size.
    half = 50_001
    first, second = values[: half - 1], values[half:]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first**2, second**2)[0, 1]) < 0.03


def test_shapes_and_zero_std():
    noise = Noise(1)
    assert noise.gaussian((3, 5), 1.0, **KEY).shape == (3, 5)
    assert noise.gaussian((), 1.0, **KEY).shape == ()
    assert not noise.gaussian(9, 0.0, **KEY).any()
    assert noise.gaussian(0, 1.0, **KEY).size == 0
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std"):
            noise.gaussian(3, std, **KEY)


def test_seeded_streams_depend_on_every_part_of_the_key():
    base = Noise(5).gaussian(4, 1.0, **KEY, client=2)
    assert np.array_equal(base, Noise(5).gaussian(4, 1.0, **KEY, client=2))
    others = [
        Noise(6).gaussian(4, 1.0, **KEY, client=2),
        Noise(5).gaussian(4, 1.0, **KEY, client=3),
        Noise(5).gaussian(4, 1.0, **KEY),
        Noise(5).gaussian(4, 1.0, **{**KEY, "round": 4}, client=2),
        Noise(5).gaussian(4, 1.0, **{**KEY, "stage": "stage1"}, client=2),
        Noise(5).gaussian(4, 1.0, **{**KEY, "purpose": "other"}, client=2),
    ]
    assert all(not np.any(base == other) for other in others)


def test_os_noise_is_fresh_and_ignores_global_seeds():
    np.random.seed(0)
    first = Noise().gaussian(8, 1.0, **KEY)
    np.random.seed(0)
    assert not np.any(first == Noise().gaussian(8, 1.0, **KEY))
    assert (Noise().rng, Noise(0).rng) == ("os", "seeded")


def test_global_generator_is_left_alone():
    np.random.seed(3)
    want = np.random.random()
    np.random.seed(3)
    Noise(1).sample_cohort(50, 0.5, None, stage="stage2", round=0)
    assert np.random.random() == want


def test_uniform():
    values = Noise(2).uniform((200, 50), **KEY)
    assert values.shape == (200, 50)
    assert values.min() >= 0 and values.max() < 1
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-6


@pytest.mark.parametrize(("trials", "p"), [(40, 0.1), (40, 0.8), (3, 0.5)])
def test_binomial_law(trials, p):
    noise = Noise(11)
    counts = [noise.binomial(trials, p, purpose="b", stage="s", round=r) for r in range(4000)]
    observed = np.bincount(counts, minlength=trials + 1)
    expected = 4000 * stats.binom.pmf(np.arange(trials + 1), trials, p)
    keep = expected > 5
    assert stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue > 1e-6
    wrong = 4000 * stats.binom.pmf(np.arange(trials + 1), trials, p * 0.9)
    assert stats.chisquare(observed[keep], wrong[keep] * observed[keep].sum() / wrong[keep].sum()).pvalue < 1e-6
    assert observed[~keep].sum() < 60


def test_binomial_ends():
    noise = Noise(1)
    assert noise.binomial(10, 0.0, **KEY) == 0
    assert noise.binomial(10, 1.0, **KEY) == 10
    assert noise.binomial(0, 0.3, **KEY) == 0
    assert noise.binomial(10**12, 1e-10, **KEY) == pytest.approx(100, abs=60)


def test_choice_is_uniform_over_subsets():
    noise = Noise(4)
    for count in (2, 3):
        seen = {}
        for r in range(3000):
            subset = tuple(noise.choice(5, count, purpose="c", stage="s", round=r).tolist())
            assert len(set(subset)) == count and list(subset) == sorted(subset)
            seen[subset] = seen.get(subset, 0) + 1
        assert len(seen) == 10
        assert stats.chisquare(list(seen.values())).pvalue > 1e-6
    assert noise.choice(5, 0, **KEY).size == 0
    assert noise.choice(5, 5, **KEY).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="count"):
        noise.choice(5, 6, **KEY)


def test_cohort_includes_each_client_independently_at_the_rate():
    noise, rounds = Noise(9), 4000
    member = np.zeros((rounds, 12), dtype=bool)
    for r in range(rounds):
        member[r, noise.sample_cohort(12, 0.3, None, stage="stage2", round=r)] = True
    assert member.mean(axis=0) == pytest.approx(0.3, abs=0.04)
    correlation = np.corrcoef(member.T) - np.eye(12)
    assert np.abs(correlation).max() < 0.08


def test_cohort_is_cut_at_random():
    noise, rounds = Noise(9), 3000
    hits = np.zeros(10)
    for r in range(rounds):
        cohort = noise.sample_cohort(10, 0.9, 4, stage="stage2", round=r)
        assert len(cohort) <= 4
        hits[cohort] += 1
    assert hits / rounds == pytest.approx(0.4, abs=0.05)


def test_a_million_clients():
    cohort = Noise().sample_cohort(1_000_000, 1e-4, None, stage="stage2", round=0)
    assert cohort.dtype == np.int64
    assert 30 < len(cohort) < 200
    assert cohort.max() < 1_000_000


def test_default_max_cohort_is_the_smallest_negligible_one():
    limit = default_max_cohort(2000, 0.05, 11, 1e-4)
    assert 11 * truncation_probability(2000, 0.05, limit) <= 1e-7
    assert 11 * truncation_probability(2000, 0.05, limit - 1) > 1e-7
    assert default_max_cohort(5, 0.5, 10, 1e-5) == 5
    assert default_max_cohort(20, 1.0, 10, 1e-5) == 20
    assert default_max_cohort(1, 0.5, 10, 1e-5) == 1
