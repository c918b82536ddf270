"""Priors: what they say of scale is what they sample."""

import pytest
import torch

from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import factor_rms, from_moments, from_public_gradients

LAYOUT = AdapterLayout.of([("A", torch.zeros(4, 5)), ("B", torch.zeros(6)), ("C", torch.zeros(4))])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def public_rows() -> torch.Tensor:
    return torch.randn(12, LAYOUT.size, generator=seeded(5)) * LAYOUT.spread(torch.tensor([1.0, 0.1, 3.0]))


def priors():
    return {
        "moments": from_moments(LAYOUT, torch.tensor([0.3, -0.2, 0.0]), torch.tensor([1.0, 0.1, 2.0])),
        "public": from_public_gradients(LAYOUT, public_rows()),
    }


@pytest.mark.parametrize("name", list(priors()))
def test_samples_have_the_second_moment_that_is_claimed(name):
    prior = priors()[name]
    samples = prior.sample(20_000, seeded())
    assert samples.shape == (20_000, LAYOUT.size) and samples.dtype == torch.float32
    found = samples.square().mean(0)
    assert torch.allclose(found, prior.variance(), rtol=0.08)
    assert not torch.allclose(found, prior.variance() * 4 / 9, rtol=0.08) and not torch.allclose(found, prior.variance() * 9 / 4, rtol=0.08)


def test_diagonal_samples_have_the_means_and_are_independent():
    prior = priors()["moments"]
    samples = prior.sample(20_000, seeded())
    assert prior.structure == "diagonal"
    error = samples.mean(0) - LAYOUT.spread(prior.mean)
    assert (error.abs() < 5 * LAYOUT.spread(prior.std) / 20_000**0.5).all()
    correlation = torch.corrcoef(samples.T) - torch.eye(LAYOUT.size)
    assert correlation.abs().max() < 0.05


def test_public_samples_have_the_rows_second_moment():
    rows = public_rows()
    prior = from_public_gradients(LAYOUT, rows)
    assert prior.structure == "samples" and not prior.mean.any()
    samples = prior.sample(40_000, seeded())
    expected = rows.T @ rows / len(rows)
    assert (samples.T @ samples / 40_000 - expected).norm() < 0.05 * expected.norm()
    assert torch.linalg.matrix_rank(samples[:50]) == 12  # they stay in the rows' span


def test_the_scale_is_per_factor():
    rows = public_rows()
    expected = [rows[:, :20].square().mean() ** 0.5, rows[:, 20:26].square().mean() ** 0.5, rows[:, 26:].square().mean() ** 0.5]
    assert torch.allclose(factor_rms(LAYOUT, rows), torch.stack(expected))
    assert torch.equal(from_public_gradients(LAYOUT, rows).std, factor_rms(LAYOUT, rows))


@pytest.mark.parametrize("name", list(priors()))
def test_sampling_follows_the_generator_alone(name):
    prior = priors()[name]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = prior.sample(3, seeded(7))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(prior.sample(3, seeded(7)), one) and not torch.equal(prior.sample(3, seeded(8)), one)


def test_the_fingerprint_follows_every_number():
    mean, std = torch.tensor([0.3, -0.2, 0.0]), torch.tensor([1.0, 0.1, 2.0])
    rows = public_rows()
    nudged = rows.clone()
    nudged[3, 4] = torch.nextafter(nudged[3, 4], torch.tensor(9.0))
    other = AdapterLayout.of([("A", torch.zeros(5, 4)), ("B", torch.zeros(6)), ("C", torch.zeros(4))])
    different = [
        from_moments(LAYOUT, mean, std),
        from_moments(LAYOUT, mean + 1e-6, std),
        from_moments(LAYOUT, mean, std * 1.0001),
        from_moments(other, mean, std),
        from_public_gradients(LAYOUT, rows),
        from_public_gradients(LAYOUT, nudged),
    ]
    assert len({prior.fingerprint() for prior in different}) == 6
    assert from_public_gradients(LAYOUT, rows.clone()).fingerprint() == different[4].fingerprint()
    assert all(len(prior.fingerprint()) == 16 for prior in different)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_cannot_be_a_prior_are_refused(value):
    rows = public_rows()
    rows[1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        from_public_gradients(LAYOUT, rows)
    with pytest.raises(ValueError, match="whose squares are finite too"):
        from_public_gradients(LAYOUT, torch.full((2, LAYOUT.size), 1e30))
    with pytest.raises(ValueError, match="not all zero"):
        from_public_gradients(LAYOUT, torch.zeros(3, LAYOUT.size))
