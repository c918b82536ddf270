"""The convolutional auto-encoder: shapes, determinism, what fitting buys, and the promises of its docstring."""

import math

import pytest
import torch

from dr_encoder import codecs, priors
from dr_encoder.codecs import autoencoder
from dr_encoder.codecs.autoencoder import AutoEncoderCodec, image_shape, required_code_size
from dr_encoder.fitting import fit_to_samples, with_noise
from dr_encoder.layout import AdapterLayout

LAYOUT = AdapterLayout.of(
    [
        ("q.A", torch.empty(8, 600)),
        ("q.B", torch.empty(600, 8)),
        ("v.A", torch.empty(8, 300)),
        ("v.B", torch.empty(50, 8)),
    ]
)
STD = torch.tensor([1e-3, 2e-2, 5.0, 0.3])
PRIOR = priors.from_moments(LAYOUT, torch.zeros(4), STD)


def fit(steps: int = 3, seed: int = 0, noise_std: float = 0.0, **options) -> AutoEncoderCodec:
    prior = options.pop("prior", PRIOR)
    return AutoEncoderCodec.fit(prior, LAYOUT, None, noise_std, seed, steps=steps, batch_size=4, **options)


def kept(codec: AutoEncoderCodec, updates: torch.Tensor) -> float:
    """Share of the energy that survives, every factor weighing alike."""
    scale = LAYOUT.spread(STD)
    back = torch.stack([codec.decode(code) for code in codec.encode(updates)])
    return 1 - float(((back - updates) / scale).square().sum() / (updates / scale).square().sum())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Images this small gain nothing from a second thread, and lose much to it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def codec() -> AutoEncoderCodec:
    return fit()


@pytest.fixture(scope="module")
def updates() -> torch.Tensor:
    return PRIOR.sample(12, torch.Generator().manual_seed(99))


@pytest.mark.parametrize("size", [1, 4096, 4097, 11_000, 74_498, 460_800, 8_388_608])
def test_the_image_is_tight_and_near_square(size):
    height, width = image_shape(size)
    assert height % 64 == width % 64 == 0
    assert height * width >= size
    assert height <= width <= 4 * height
    assert height * width - size < max(2 * 4096, 0.05 * size)
    assert required_code_size(size) * 64 == height * width


def test_the_published_size_has_the_published_code():
    """CG-FedLLM: 8,388,608 values, latent 64 x 64 x 32."""
    assert required_code_size(8_388_608) == 64 * 64 * 32


def test_another_code_size_and_no_prior_are_refused():
    with pytest.raises(ValueError, match=str(required_code_size(LAYOUT.size))):
        AutoEncoderCodec.fit(PRIOR, LAYOUT, 128, 0.0, 0)
    with pytest.raises(ValueError, match="prior"):
        AutoEncoderCodec.fit(None, LAYOUT, None, 0.0, 0)
    with pytest.raises(ValueError, match="widths"):
        fit(widths=(4, 8, 64))


def test_shapes_and_registry(codec, updates):
    assert codecs.CODECS["autoencoder"] is AutoEncoderCodec
    assert not codec.linear
    assert not codec.orthonormal
    codes = codec.encode(updates)
    assert codes.shape == (12, codec.code_size)
    assert codes.dtype == torch.float32
    assert not codes.requires_grad
    assert codes.abs().max() <= 1
    assert codec.decode(codes[0]).shape == (LAYOUT.size,)


def test_a_units_code_depends_on_that_unit_alone(codec, updates):
    together = codec.encode(updates)
    alone = torch.cat([codec.encode(updates[i : i + 1]) for i in (0, 11)])
    torch.testing.assert_close(together[[0, 11]], alone, rtol=1e-4, atol=1e-5)


def test_bands_make_no_difference(codec, updates, monkeypatch):
    code = codec.encode(updates[:2])
    update = codec.decode(code[0], 0.01)
    monkeypatch.setattr(autoencoder, "BAND", 1)  # a row of tiles at once, of three: every one has a neighbour, the middle one two
    assert codec.network.rows >= 2
    torch.testing.assert_close(codec.encode(updates[:2]), code, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.decode(code[0], 0.01), update, rtol=1e-4, atol=1e-6)


def test_windows_of_a_sample_fit_as_well_and_with_as_much_noise(updates, monkeypatch):
    seen = []
    monkeypatch.setattr(autoencoder, "WINDOW", 64 * 64)
    monkeypatch.setattr(autoencoder, "fit_to_samples", lambda *args, **options: seen.append(options) or fit_to_samples(*args, **options))
    fitted = fit(steps=40, noise_std=0.001)
    height, width = fitted.shape
    assert seen[0]["noise_std"] == pytest.approx(0.001 * (height * width) ** 0.5 / 64)
    assert kept(fitted, updates) > kept(fit(steps=0), updates) + 0.001


@pytest.mark.parametrize("size", [4096, 460_800, 8_388_608])
def test_a_window_is_made_of_tiles_and_within_the_image(size):
    image = image_shape(size)
    window = autoencoder.window_shape(image)
    assert all(side % 64 == 0 and side <= whole for side, whole in zip(window, image, strict=True))
    assert min(autoencoder.WINDOW, math.prod(image)) / 2 < math.prod(window) <= autoencoder.WINDOW


def test_nothing_in_nothing_out_and_the_decoder_scales(codec, updates):
    assert not codec.encode(torch.zeros(1, LAYOUT.size)).any()
    assert not codec.decode(torch.zeros(codec.code_size)).any()
    code = codec.encode(updates[:1])[0]
    torch.testing.assert_close(codec.decode(0.01 * code) * 100, codec.decode(code), rtol=1e-3, atol=1e-4)


def test_fitting_keeps_energy_that_the_start_does_not(updates):
    """White samples, 64 numbers for one: no code can keep more than 1/64 on average."""
    start, fitted = kept(fit(steps=0), updates), kept(fit(steps=40), updates)
    assert fitted > start + 0.0015
    assert fitted < 1.2 * required_code_size(LAYOUT.size) / LAYOUT.size


def test_the_same_prior_and_seed_give_the_same_codec_whatever_the_global_generator(codec):
    torch.manual_seed(1234)
    state = torch.random.get_rng_state()
    assert fit().fingerprint() == codec.fingerprint()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fit(seed=1).fingerprint() != codec.fingerprint()
    assert fit(noise_std=0.1).fingerprint() != codec.fingerprint()


def test_save_and_load_give_the_same_codec(codec, updates, tmp_path):
    codecs.save(codec, tmp_path / "codec.safetensors")
    back = codecs.load(tmp_path / "codec.safetensors")
    assert back.fingerprint() == codec.fingerprint()
    codes = codec.encode(updates)
    torch.testing.assert_close(back.encode(updates), codes)
    torch.testing.assert_close(back.decode(codes[0], 0.1), codec.decode(codes[0], 0.1))


def test_a_factor_the_prior_says_is_zero_is_left_out(updates):
    """At LoRA's start B = 0 and A's gradient is exactly zero: no division by that zero."""
    silent = priors.from_moments(LAYOUT, torch.zeros(4), STD * torch.tensor([0.0, 1.0, 1.0, 1.0]))
    codec = fit(prior=silent)
    codes = codec.encode(updates)
    assert torch.isfinite(codes).all()
    back = LAYOUT.views(codec.decode(codes[0]))
    assert not back["q.A"].any()
    assert back["q.B"].any()


def test_decoding_shrinks_under_noise(codec, updates):
    code = codec.encode(updates[:1])[0]
    plain, shrunk = codec.decode(code), codec.decode(code, float(code.square().mean().sqrt()))
    assert 0 < shrunk.norm() < 0.7 * plain.norm()


def test_noise_in_the_loop_has_the_stated_size():
    codes = torch.randn(50, 400, generator=torch.Generator().manual_seed(0)) * 3
    noise = with_noise(codes, 0.1, torch.Generator().manual_seed(1)) - codes
    assert float(noise.std()) == pytest.approx(0.1 * 3 * 20, rel=0.03)


def test_progress_is_told_and_bad_options_are_refused():
    told = []
    codec = fit(steps=2, progress=lambda *args: told.append(args))
    assert [(step, steps) for step, steps, _ in told] == [(1, 2), (2, 2)]
    assert [loss for *_, loss in told] == codec.losses
    for options in ({"steps": -1}, {"learning_rate": 0.0}, {"noise_std": -1.0}):
        with pytest.raises(ValueError, match="Expected"):
            fit(**options)


def test_a_fit_that_diverges_says_so():
    class Exploding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(1e30))

        def encoder(self, inputs):
            return inputs * self.weight

        def decoder(self, codes):
            return codes * self.weight

    with pytest.raises(FloatingPointError, match="step 1"):
        fit_to_samples(
            Exploding(),
            lambda count, generator: torch.randn(count, 5, generator=generator),
            steps=2,
            batch_size=3,
            learning_rate=1e-3,
            noise_std=0.0,
            generator=torch.Generator().manual_seed(0),
        )
