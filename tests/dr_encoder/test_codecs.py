"""One conformance class for every codec family there is, and the closed forms of the linear ones."""

import functools
from itertools import pairwise

import numpy as np
import pytest
import torch

from dr_encoder import codecs
from dr_encoder.codecs import CODECS, decoded_noise_energy
from dr_encoder.codecs.allocation import AllocationCodec
from dr_encoder.codecs.base import wiener_gain
from dr_encoder.codecs.coordinate import CoordinateCodec
from dr_encoder.codecs.linear import LinearCodec, principal_subspace
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import from_moments, from_public_gradients, from_released

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = AdapterLayout.of([("A", torch.zeros(8, 25)), ("B", torch.zeros(25, 4)), ("head", torch.zeros(40))])
N = LAYOUT.size
SCALE = LAYOUT.spread(torch.tensor([1.0, 0.2, 3.0]))
FIXED = {"identity": N, "allocation": N, "autoencoder": None, "powersgd": None}  # families that fix the code size; None: to their own
SEEDED = {"autoencoder", "sketch", "powersgd"}  # families in which the seed always decides something
SEEDED_IF_DIAGONAL = {"coordinate", "linear", "kronecker"}  # ties between coordinates of a factor
PRIOR_BLIND = {"sketch", "topk", "powersgd"}  # families that fit the same whatever the prior
ONE_SIZE = {"identity", "allocation"}
NEEDS_ROWS = {"chain"}
CASES = [(f, s) for f in sorted(CODECS) for s in ("samples", "diagonal") if s == "samples" or f not in NEEDS_ROWS]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(seed: int = 1, count: int = 40) -> torch.Tensor:
    return torch.randn(count, N, generator=seeded(seed)) * SCALE


def make_prior(structure: str, seed: int = 1):
    if structure == "samples":
        return from_public_gradients(LAYOUT, rows(seed))
    return from_moments(LAYOUT, torch.zeros(3), torch.tensor([1.0, 0.2, 3.0]) * (1 + 0.01 * seed))


@functools.cache
def fit(family: str, structure: str = "samples", prior_seed: int = 1, seed: int = 3, code_size: int | None = 16, noise_std: float = 0.01):
    size = FIXED.get(family, code_size)
    return CODECS[family].fit(make_prior(structure, prior_seed), LAYOUT, size, noise_std, seed, steps=2)


def decodable(codec, codes: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What this codec's decode takes: a mean code and noise, or one update's code without."""
    return (codes.mean(0), 0.1) if codec.summable else (codes[0], 0.0)


def test_a_scale_of_the_rows_is_the_same_as_scaled_rows():
    """What a chain of allocation and linear does piece by piece, so that the rows are not copied whole."""
    prior = make_prior("samples")
    codec = CODECS["chain"].fit(prior, LAYOUT, 16, 0.0, 3, parts=("allocation", "linear"))
    basis, variance = principal_subspace(codec.outer.encode(prior.rows), 16, 3)
    assert torch.allclose(codec.inner.basis, basis, atol=1e-5) and torch.allclose(codec.inner.variance, variance, rtol=1e-5)
    assert torch.equal(prior.rows, make_prior("samples").rows)


def test_released_noise_alone_is_taken_for_a_signal_half_the_time_even_where_decoding_stretches_it():
    """allocation then linear, factors of very different scale: k s^2 is a small part of the decoded noise's energy."""
    layout, scale = LAYOUT, LAYOUT.spread(torch.tensor([1.0, 0.01, 3.0]))
    prior = from_public_gradients(layout, torch.randn(40, N, generator=seeded(1)) * scale)
    codec = CODECS["chain"].fit(prior, layout, 16, 0.0, 0, parts=("allocation", "linear"))
    generator, taken = seeded(2), 0
    for _ in range(60):
        code = 0.3 * torch.randn(16, generator=generator)
        try:
            from_released(layout, codec.decode(code)[None], decoded_noise_energy(codec, code, 0.3) ** 0.5, 1)
            taken += 1
        except ValueError:
            pass
    assert 12 < taken < 45


@pytest.mark.parametrize(("family", "structure"), CASES)
class TestConformance:
    @pytest.fixture
    def codec(self, family, structure):
        return fit(family, structure)

    def test_decoded_noise_has_the_energy_that_is_said(self, codec):
        """By many draws around this code, whatever the decoder does to their length."""
        if not codec.summable:
            pytest.skip("carries no noise")
        code, generator = codec.encode(rows(9, 1))[0], seeded(5)
        noisy = (code + 0.3 * torch.randn(400, codec.code_size, generator=generator)).unbind()
        energy = torch.stack([codec.decode(each) - codec.decode(code) for each in noisy]).square().sum(1).mean()
        assert decoded_noise_energy(codec, code, 0.3) == pytest.approx(float(energy), rel=0.35)
        assert decoded_noise_energy(codec, code, 0.0) == 0

    def test_shapes_and_types(self, codec, family):
        assert codec.update_size == N
        assert codec.code_size == (FIXED.get(family, 16) or codec.code_size) and codec.code_size >= 1
        codes = codec.encode(rows(9, 5))
        assert codes.shape == (5, codec.code_size) and codes.dtype == torch.float32
        update = codec.decode(*decodable(codec, codes))
        assert update.shape == (N,) and update.dtype == torch.float32 and torch.isfinite(update).all()
        assert codec.encode(rows(9, 1)).shape == (1, codec.code_size) and codec.encode(torch.zeros(0, N)).shape == (0, codec.code_size)

    def test_zero_stays_zero(self, codec):
        assert not codec.encode(torch.zeros(2, N)).any()
        assert not codec.decode(torch.zeros(codec.code_size)).any()
        if codec.summable:
            assert torch.isfinite(codec.decode(torch.zeros(codec.code_size), 0.1)).all()

    def test_linear_where_claimed(self, codec):
        if not codec.linear:
            pytest.skip("claims nothing")
        assert codec.summable
        one, other = rows(9, 2)
        mixed = codec.encode((2 * one - 3 * other)[None])[0]
        apart = codec.encode(torch.stack([one, other]))
        assert torch.allclose(mixed, 2 * apart[0] - 3 * apart[1], rtol=1e-4, atol=1e-4)
        decoded = [codec.decode(code) for code in (apart.mean(0), apart[0], apart[1])]
        assert torch.allclose(decoded[0], (decoded[1] + decoded[2]) / 2, rtol=1e-4, atol=1e-4)

    def test_rows_decode_as_one_by_one(self, codec):
        codes = codec.encode(rows(9, 3))
        assert torch.allclose(codec.decode_rows(codes), torch.stack([codec.decode(code) for code in codes]), rtol=1e-5, atol=1e-6)

    def test_noise_is_refused_where_codes_cannot_be_summed(self, codec):
        if codec.summable:
            pytest.skip("can be summed")
        assert not codec.orthonormal
        code = codec.encode(rows(9, 1))[0]
        with pytest.raises(ValueError, match=r"noise_std=0\.1 = 0"):
            codec.decode(code, 0.1)

    def test_orthonormal_where_claimed(self, codec):
        if not codec.orthonormal:
            pytest.skip("claims nothing")
        assert codec.linear
        matrix = codec.encode(torch.eye(N)).T.double()  # [k, n]
        assert (matrix @ matrix.T - torch.eye(codec.code_size)).abs().max() < 1e-5
        decoder = torch.stack([codec.decode(code) for code in torch.eye(codec.code_size)], 1)
        assert torch.allclose(decoder.double(), matrix.T, atol=1e-6)  # decode is the adjoint, so that decode(encode) projects

    def test_no_code_is_longer_than_its_update_where_orthonormal(self, codec):
        if not codec.orthonormal:
            pytest.skip("claims nothing")
        updates = torch.cat([rows(9, 20), rows(1), torch.eye(N)])
        assert (codec.encode(updates).double().norm(dim=1) <= updates.double().norm(dim=1) * (1 + 1e-5)).all()

    def test_a_code_is_of_its_own_row_alone(self, codec):
        updates = rows(9, 20)
        codes = codec.encode(updates)
        for row in (0, 7, 19):
            assert torch.allclose(codec.encode(updates[row : row + 1])[0], codes[row], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
    def test_a_non_finite_row_stays_in_its_row(self, codec, value):
        updates = rows(9, 12)
        spoiled = updates.clone()
        spoiled[4] = value
        others = torch.arange(12) != 4
        assert torch.allclose(codec.encode(spoiled)[others], codec.encode(updates)[others], rtol=1e-4, atol=1e-5)

    def test_encoding_changes_nothing_it_is_given(self, codec):
        updates = rows(9, 3)
        kept = updates.clone()
        codes = codec.encode(updates)
        code, noise = decodable(codec, codes)
        copy = code.clone()
        codec.decode(code, noise)
        assert torch.equal(updates, kept) and torch.equal(code, copy)

    def test_anyone_can_redo_the_fit(self, codec, family, structure):
        torch.manual_seed(77)  # nothing may come from the global generator
        again = fit.__wrapped__(family, structure)
        assert again.fingerprint() == codec.fingerprint() and len(codec.fingerprint()) == 16
        assert torch.equal(again.encode(rows(9, 3)), codec.encode(rows(9, 3)))

    def test_the_global_generator_is_left_alone(self, family, structure):
        state = torch.get_rng_state()
        fit.__wrapped__(family, structure)
        assert torch.equal(state, torch.get_rng_state())

    def test_another_prior_or_seed_is_another_codec(self, codec, family, structure):
        assert (fit(family, structure, prior_seed=2).fingerprint() != codec.fingerprint()) == (family not in PRIOR_BLIND)
        seed_matters = family in SEEDED or (family in SEEDED_IF_DIAGONAL and structure == "diagonal")
        assert (fit(family, structure, seed=4).fingerprint() != codec.fingerprint()) == seed_matters

    def test_saved_and_loaded_it_is_the_same(self, codec, tmp_path):
        codecs.save(codec, tmp_path / "codec.safetensors")
        back = codecs.load(tmp_path / "codec.safetensors")
        assert type(back) is type(codec) and back.name == codec.name
        assert (back.code_size, back.update_size) == (codec.code_size, codec.update_size)
        assert back.fingerprint() == codec.fingerprint()
        codes = codec.encode(rows(9, 3))
        assert torch.equal(back.encode(rows(9, 3)), codes)
        assert torch.equal(back.decode(*decodable(codec, codes)), codec.decode(*decodable(codec, codes)))
        assert (back.linear, back.orthonormal, back.summable) == (codec.linear, codec.orthonormal, codec.summable)

    def test_noise_shrinks_and_never_turns(self, codec):
        if not codec.linear:
            pytest.skip("of linear codes")
        code = codec.encode(rows(9, 30)).mean(0)
        clean = codec.decode(code)
        norms = [float(codec.decode(code, noise).norm()) for noise in (0.0, 0.05, 0.5, 5.0)]
        assert all(more <= less * (1 + 1e-6) for less, more in pairwise(norms)) and norms[-1] < 0.5 * norms[0]
        assert float(codec.decode(code, 0.5) @ clean) > 0

    @pytest.mark.parametrize("code_size", [0, -1, N + 1])
    def test_a_code_size_out_of_range_is_refused(self, family, structure, code_size):
        if family in ONE_SIZE:
            pytest.skip("has one size")
        with pytest.raises(ValueError, match="code_size"):
            CODECS[family].fit(make_prior(structure), LAYOUT, code_size, 0.0, 0, steps=1)


def test_names_are_the_registrys():
    assert all(cls.name == name for name, cls in CODECS.items())
    published = {"linear", "coordinate", "identity", "autoencoder", "kronecker", "sketch", "powersgd", "topk", "chain"}
    assert published <= CODECS.keys()


@pytest.mark.parametrize("family", sorted(CODECS))
def test_a_prior_that_does_not_serve_is_refused_in_one_line(family):
    if not CODECS[family].fits:
        assert CODECS[family].fit(None, LAYOUT, FIXED.get(family, 16), 0.0, 0).update_size == N
        return
    with pytest.raises(ValueError, match=r"^Expected a prior[^\n]*$"):
        CODECS[family].fit(None, LAYOUT, FIXED.get(family, 16), 0.0, 0)
    if family in NEEDS_ROWS:
        with pytest.raises(ValueError, match=rf"^Expected a prior with rows for codec family {family}, got the diagonal prior moments$"):
            fit(family, "diagonal")


# -- closed forms ----------------------------------------------------------------------------------------------------------------------


def test_linear_keeps_the_most_that_any_code_can():
    """Eckart-Young, against numpy's SVD of the rows in float64."""
    sample = rows(1)
    values, axes = np.linalg.svd(sample.double().numpy(), full_matrices=False)[1:]
    for size in (1, 7, 40):
        codec = LinearCodec.fit(from_public_gradients(LAYOUT, sample), LAYOUT, size, 0.0, 0)
        kept = float(codec.encode(sample).double().square().sum())
        assert kept == pytest.approx(float((values[:size] ** 2).sum()), rel=1e-5)
        overlap = np.abs(np.diag(codec.basis.double().numpy() @ axes[:size].T))
        assert overlap[: min(size, 7)].min() > 1 - 1e-3
        assert torch.allclose(codec.variance.double(), torch.from_numpy(values[:size] ** 2 / 40), rtol=1e-4)
        random = torch.linalg.qr(torch.randn(N, size, generator=seeded(2))).Q
        assert float((sample @ random).square().sum()) < kept


def test_a_lopsided_prior_still_gives_an_orthonormal_basis():
    """Rows that are nearly one and the same: rounding must not cost the orthogonality that `noise_in: update` rests on."""
    sample = rows(1, 1) + 0.02 * rows(2)
    basis, variance = principal_subspace(sample, 40)
    assert (basis.double() @ basis.double().T - torch.eye(40)).abs().max() < 1e-5
    assert (variance[:-1] >= variance[1:]).all() and (variance > 0).all()


def test_linear_asks_for_a_row_a_number():
    with pytest.raises(ValueError, match=r"code_size=21 <= 20, .* prior's rows"):
        LinearCodec.fit(from_public_gradients(LAYOUT, rows(1, 20)), LAYOUT, 21, 0.0, 0)


def test_a_dense_matrix_above_the_stated_size_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(codecs.linear, "DENSE_NUMBERS", 20 * N)
    prior = from_public_gradients(LAYOUT, rows(1, 30))
    assert LinearCodec.fit(prior, LAYOUT, 20, 0.0, 0).code_size == 20
    with pytest.raises(ValueError, match=rf"code_size=21 <= 20 for updates of {N:,}, a dense matrix of {20 * N:,} numbers; kronecker"):
        LinearCodec.fit(prior, LAYOUT, 21, 0.0, 0)
    assert CODECS["kronecker"].fit(prior, LAYOUT, 21, 0.0, 0).code_size == 21


@pytest.mark.parametrize("spoil", ["twice", "tiny", "one direction"])
def test_linear_fills_up_what_its_rows_do_not_span(spoil):
    """A text that comes twice, or one that the model has learnt, is no error: the code keeps its length and loses nothing."""
    given = rows(1, 20)
    if spoil == "twice":
        given[7] = given[3]
    elif spoil == "tiny":
        given[7] *= 1e-5
    else:
        given = torch.outer(torch.arange(1.0, 21.0), given[0])
    codec = LinearCodec.fit(from_public_gradients(LAYOUT, given), LAYOUT, 20, 0.0, 3)
    spanned = 1 if spoil == "one direction" else 19
    assert (codec.variance > 0).sum() == spanned and codec.code_size == 20
    gram = codec.basis.double() @ codec.basis.double().T
    assert (gram - torch.eye(20)).abs().max() < 1e-5
    kept = torch.stack([codec.decode(code) for code in codec.encode(given)])
    assert torch.allclose(kept, given, rtol=1e-3, atol=1e-3 * float(given.abs().max()))
    assert (codec.basis[spanned:] @ codec.decode(torch.ones(20), 0.1)).abs().max() < 1e-5  # under noise the filled-up ones are left out
    again = LinearCodec.fit(from_public_gradients(LAYOUT, given), LAYOUT, 20, 0.0, 3)
    assert again.fingerprint() == codec.fingerprint()


def test_the_scale_of_the_rows_does_not_matter():
    one = LinearCodec.fit(from_public_gradients(LAYOUT, rows(1)), LAYOUT, 8, 0.0, 0)
    for scale in (1e-6, 1e6):
        other = LinearCodec.fit(from_public_gradients(LAYOUT, rows(1) * scale), LAYOUT, 8, 0.0, 0)
        assert torch.allclose(other.basis, one.basis, atol=1e-4)


def test_linear_of_a_diagonal_prior_is_a_choice_of_coordinates():
    codec = fit("linear", "diagonal", code_size=45)
    assert isinstance(codec, CoordinateCodec)
    assert set(range(300, 340)) <= set(codec.chosen.tolist())  # the head has the largest variance
    assert len(set(codec.chosen.tolist()) & set(range(200))) == 5  # then A


def test_coordinate_takes_the_largest():
    prior = from_public_gradients(LAYOUT, rows(1))
    codec = CoordinateCodec.fit(prior, LAYOUT, 25, 0.0, 0)
    threshold = prior.variance().sort(descending=True).values[24]
    assert set(codec.chosen.tolist()) == set(torch.nonzero(prior.variance() >= threshold).flatten().tolist())


def test_identity_gives_back_what_it_gets():
    codec = CODECS["identity"].fit(None, LAYOUT, None, 0.0, 0)
    updates = rows(9, 3)
    assert torch.equal(codec.encode(updates), updates) and torch.equal(codec.decode(updates[0]), updates[0])


# -- shrinking -------------------------------------------------------------------------------------------------------------------------


def test_gain_without_noise_is_one():
    assert torch.equal(wiener_gain(torch.randn(4), 0.0, torch.rand(4)), torch.ones(4))


def test_gain_is_the_closed_form_at_the_matched_scale():
    variance = torch.tensor([4.0, 1.0, 0.0])
    code = torch.tensor([6.0, 2.0, 1.0])
    scale = (36 + 4 + 1 - 3 * 0.25) / 5
    expected = scale * variance / (scale * variance + 0.25)
    assert torch.allclose(wiener_gain(code, 0.5, variance), expected)
    assert torch.allclose(wiener_gain(code, 0.5, 7 * variance), expected)  # the prior's scale does not matter


def test_gain_of_a_code_that_is_all_noise_stands_at_the_floor():
    gain = wiener_gain(torch.zeros(5), 2.0, torch.ones(5))
    assert torch.allclose(gain, torch.full((5,), 0.1 / 1.1))


def test_gain_lowers_the_error():
    generator = seeded(4)
    variance = torch.logspace(1, -3, 400)
    errors = torch.zeros(2)
    for _ in range(50):
        clean = torch.randn(400, generator=generator) * variance.sqrt()
        noisy = clean + 0.5 * torch.randn(400, generator=generator)
        errors += torch.stack([(noisy - clean).square().sum(), (noisy * wiener_gain(noisy, 0.5, variance) - clean).square().sum()])
    best = float((variance * 0.25 / (variance + 0.25)).sum() * 50)
    assert errors[1] < 0.5 * errors[0] and errors[1] < 1.1 * best


def test_gain_of_a_prior_without_variance_is_finite():
    assert torch.isfinite(wiener_gain(torch.ones(3), 0.5, torch.zeros(3))).all()


# -- allocation ------------------------------------------------------------------------------------------------------------------------


def test_allocation_is_the_best_split_of_clip_and_noise():
    """Energy to fit under the clip times energy of the noise that comes back: Cauchy's bound, which no other split of scales passes."""
    codec, moments = fit("allocation", "diagonal"), make_prior("diagonal").variance().double()
    bound = float(moments.sqrt().sum()) ** 2

    def product(scale: torch.Tensor) -> float:
        return float((moments / scale.square()).sum() * scale.square().sum())

    assert product(codec.scale.double()) == pytest.approx(bound, rel=1e-6)
    assert float(codec.scale.double().square().mean()) == pytest.approx(1, rel=1e-6)
    assert product(torch.ones(N)) > 1.2 * bound
    for power in (0.125, 0.5):
        assert product(moments**power) > 1.001 * bound


def test_allocation_loses_nothing_and_knows_its_noise():
    codec, updates = fit("allocation"), rows(9, 4)
    assert torch.allclose(codec.decode(codec.encode(updates)[0]), updates[0], rtol=1e-5)
    energy = codec.encode(rows(2, 400)).square().mean(0)  # of a code's numbers, factor by factor, as the prior has it
    for factor in LAYOUT.factors:
        where = slice(factor.offset, factor.stop)
        assert float(energy[where].mean()) == pytest.approx(float(codec.variance[where].mean()), rel=0.1)


def test_allocation_lets_a_factor_without_moments_through_and_refuses_a_prior_of_nothing():
    codec = AllocationCodec.fit(from_moments(LAYOUT, torch.zeros(3), torch.tensor([1.0, 0.0, 1.0])), LAYOUT, None, 0.0, 0)
    assert torch.allclose(codec.decode(codec.encode(rows(9, 1))[0]), rows(9, 1)[0], rtol=1e-4)
    with pytest.raises(ValueError, match="nothing to share"):
        AllocationCodec.fit(from_moments(LAYOUT, torch.zeros(3), torch.zeros(3)), LAYOUT, None, 0.0, 0)
