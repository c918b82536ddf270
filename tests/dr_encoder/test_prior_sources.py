"""Priors that cost nothing: released codes, random directions, mixtures; and rows that live on disk."""

import pytest
import torch

from dr_encoder import priors
from dr_encoder.codecs import CODECS
from dr_encoder.layout import AdapterLayout

LAYOUT = AdapterLayout.of([("A", torch.zeros(4, 5)), ("B", torch.zeros(6)), ("C", torch.zeros(4))])
N = LAYOUT.size


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def public(count: int = 12, seed: int = 5, scale: float = 1.0) -> priors.GaussianPrior:
    return priors.from_public_gradients(LAYOUT, scale * torch.randn(count, N, generator=seeded(seed)))


def energy(rows: torch.Tensor, count: int) -> float:
    return float(rows.double().square().sum()) / count


def test_every_prior_says_what_it_costs():
    rows = torch.randn(3, N, generator=seeded())
    released, random = priors.from_released(LAYOUT, rows, 0.0, 4), priors.random_directions(LAYOUT, 2, 0)
    costs = {prior.name: prior.cost for prior in (public(), released, random)}
    assert costs == {
        "public": "none: public text",
        "released": "none: post-processing of released codes",
        "random": "none: random numbers of a public seed",
    }
    written = priors.from_public_gradients(LAYOUT, rows, generated=True)
    assert (written.name, written.cost) == ("generated", "none: text that a language model wrote")
    assert priors.from_moments(LAYOUT, torch.zeros(3), torch.ones(3)).cost == "stage 1 (in the ledger)"
    both = priors.mixture([public(), released, public(3)], [1, 1, 1])
    assert both.name == "public+released" and both.cost == "none: public text; none: post-processing of released codes"


def test_mixture_weights_are_shares_of_the_second_moment():
    parts = [public(12, 1, 5.0), public(3, 2, 0.01), public(7, 3)]
    mixed = priors.mixture(parts, [2.0, 1.0, 1.0])
    assert len(mixed.rows) == 22 and mixed.structure == "samples"
    own = [energy(rows, 22) for rows in mixed.rows.split([12, 3, 7])]
    total = sum(own)
    assert [share / total for share in own] == pytest.approx([0.5, 0.25, 0.25])
    assert total == pytest.approx(0.5 * energy(parts[0].rows, 12) + 0.25 * energy(parts[1].rows, 3) + 0.25 * energy(parts[2].rows, 7))
    assert torch.allclose(mixed.rows[:12] / mixed.rows[0, 0], parts[0].rows / parts[0].rows[0, 0], rtol=1e-4)


def test_a_mixture_of_one_is_itself_and_weight_zero_is_out():
    one = public()
    assert torch.allclose(priors.mixture([one], [3.0]).rows, one.rows)
    assert torch.allclose(priors.mixture([one, public(4, 9)], [3.0, 0.0]).rows, one.rows)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -0.1], [0.0, 0.0], [1.0, float("nan")]])
def test_mixture_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(ValueError, match="2 finite weights >= 0, not all zero"):
        priors.mixture([public(), public(4, 9)], weights)


def test_a_mixture_needs_rows_of_one_layout():
    with pytest.raises(ValueError, match="priors with rows, got the diagonal prior moments"):
        priors.mixture([public(), priors.from_moments(LAYOUT, torch.zeros(3), torch.ones(3))], [1, 1])
    other = AdapterLayout.of([("A", torch.zeros(N))])
    with pytest.raises(ValueError, match="of one layout"):
        priors.mixture([public(), priors.from_public_gradients(other, torch.ones(1, N))], [1, 1])


def test_recency_halves_and_sums_to_one():
    weights = priors.recency_weights(4, 1.0)
    assert weights.tolist() == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    assert priors.recency_weights(3, float("inf")).tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(ValueError, match="half_life=0 > 0"):
        priors.recency_weights(3, 0)


def test_released_rows_are_shrunk_by_the_noise_expected_in_them():
    rows = torch.zeros(3, N)
    rows[0, 0], rows[1, 1], rows[2, 2] = 2.0, 4.0, 1.0
    prior = priors.from_released(LAYOUT, rows, 0.5, 8)  # noise energy 2 in each, signal 7 - 2 on average
    assert torch.allclose(prior.rows, rows * 5 / 7)
    noise = torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64)
    weights = (noise + 1) ** -2
    signal = (weights * (torch.tensor([4.0, 16.0, 1.0]) - noise)).sum() / weights.sum()
    of_each = priors.from_released(LAYOUT, rows, torch.tensor([0.0, 0.5, 0.25]), 8)
    assert torch.allclose(of_each.rows, rows * (signal / (signal + noise)).float()[:, None])
    aged = priors.from_released(LAYOUT, rows, 0.0, 8, half_life=1.0)
    assert torch.allclose(aged.rows, rows * (3 * torch.tensor([1, 2, 4]) / 7).sqrt()[:, None])
    with pytest.raises(ValueError, match="above their noise, got 3 that are not"):
        priors.from_released(LAYOUT, rows, 5.0, 8)
    with pytest.raises(ValueError, match="finite released updates"):
        priors.from_released(LAYOUT, rows * float("nan"), 0.0, 8)


def test_released_noisy_codes_lead_back_to_the_signal():
    """Rounds of little and of much noise: plain rows point where the noise was loudest, shrunk ones at the signal."""
    signal = torch.nn.functional.normalize(torch.randn(N, generator=seeded(4)), dim=0)
    noise_std = torch.tensor([0.1] * 3 + [2.0] * 12)
    noisy = 2 * signal + noise_std[:, None] * torch.randn(15, N, generator=seeded(3))
    plain, shrunk = priors.from_rows("plain", LAYOUT, noisy, "none"), priors.from_released(LAYOUT, noisy, noise_std, N)
    kept = [float(CODECS["linear"].fit(prior, LAYOUT, 1, 0.0, 0).encode(signal[None]).square()) for prior in (plain, shrunk)]
    assert kept[0] < 0.7 and kept[1] > 0.9


def test_random_directions_have_the_scale_of_each_factor():
    prior = priors.random_directions(LAYOUT, 4_000, 3, torch.tensor([1.0, 0.1, 0.0]))
    assert prior.std.tolist() == pytest.approx([1.0, 0.1, 0.0], rel=0.02)
    assert torch.equal(prior.rows, priors.random_directions(LAYOUT, 4_000, 3, torch.tensor([1.0, 0.1, 0.0])).rows)
    assert not torch.equal(prior.rows[:2], priors.random_directions(LAYOUT, 2, 4, torch.tensor([1.0, 0.1, 0.0])).rows)
    with pytest.raises(ValueError, match="count=0 >= 1"):
        priors.random_directions(LAYOUT, 0, 0)


def test_a_refit_with_random_directions_can_leave_the_old_span():
    rows = torch.zeros(4, N)
    rows[:, :4] = torch.eye(4)
    mixed = priors.mixture([priors.from_public_gradients(LAYOUT, rows), priors.random_directions(LAYOUT, 6, 0)], [0.9, 0.1])
    codec = CODECS["linear"].fit(mixed, LAYOUT, 8, 0.0, 0)
    assert float(codec.encode(torch.eye(N)[20:21]).norm()) > 0.01
    with pytest.raises(ValueError, match="code_size=5 <= 4"):
        CODECS["linear"].fit(priors.from_public_gradients(LAYOUT, rows), LAYOUT, 5, 0.0, 0)


def test_rows_on_disk_are_the_same_prior(tmp_path):
    rows = torch.randn(6, N, generator=seeded())
    mapped = priors.rows_on_disk(iter(rows), tmp_path / "rows")
    assert torch.equal(mapped, rows) and (tmp_path / "rows").stat().st_size == 4 * 6 * N
    one, other = (priors.from_public_gradients(LAYOUT, given) for given in (rows, mapped))
    assert one.fingerprint() == other.fingerprint()
    codecs = [CODECS["kronecker"].fit(prior, LAYOUT, 8, 0.0, 0).fingerprint() for prior in (one, other)]
    assert codecs[0] == codecs[1]
    with pytest.raises(FileExistsError):
        priors.rows_on_disk(iter(rows), tmp_path / "rows")
    with pytest.raises(ValueError, match=r"rows of one length, got \[3, 4\]"):
        priors.rows_on_disk([torch.zeros(3), torch.zeros(4)], tmp_path / "uneven")
    with pytest.raises(ValueError, match="got none"):
        priors.rows_on_disk([], tmp_path / "empty")


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=rf"public gradients of shape \[count, {N}\], got \[2, 3\]"):
        priors.from_public_gradients(LAYOUT, torch.ones(2, 3))
