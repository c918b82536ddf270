"""The published convolutional ResNet auto-encoder at 1/64 (DR-Encoder, arXiv 2412.17053, after CG-FedLLM, 2405.13746).

An update is divided by its prior's scale of each factor, zero-padded and laid out as an image [1, H, W]. Six stride-2
convolutions halve it to 64 channels of H/64 x W/64, three residual blocks and a Tanh follow: H W / 64 numbers. The
decoder mirrors this. The papers leave the widths in between open; narrow ones at high resolution let two CPU cores fit
it in a minute.

Large images pass in parts. Encoder and decoder take bands of rows with a tile (64) more on either side, which is all that a
tile depends on, so the answer is the whole image's. The fit takes a random window of every sample, as is usual for
convolutions: its memory is then that of a window, whatever the update's length.

Two choices here are ours. No layer has a bias, so a zero update gets the zero code, the zero code decodes to no change,
and the decoder scales with its code (a cohort's mean code is much smaller than a single one). Nothing normalises over
the batch, so that a unit's code depends on that unit alone.

Sharp edges: convolutions look for local structure, and a prior of independent coordinates has none, so no code of 1/64
keeps more than 1/64 = 0.0156 of its energy. Measured at n = 460,800 (k = 7,296, 660,608 weights, two CPU cores) on white
samples, no noise: 0.0115 after the default 200 steps (6 to 25 s), 0.0141 after 1,000; with noise of 0.01 clip norms in the
loop 0.0074 after 200. Two machines may fit codecs that differ in the last bits: fit once and send the file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from dr_encoder.codecs.base import Codec, register, wiener_gain
from dr_encoder.fitting import Progress, fit_to_samples
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior

RATIO = 64
WIDTHS = (4, 8, 16, 32, 64, 64)
_BLOCKS = 3
_SLOPE = 0.5
_LONGEST_SIDE = 4
BAND = 1 << 20  # numbers of an image that are encoded or decoded at once
WINDOW = 1 << 18  # numbers of a sample that one step of the fit sees
_VARIANCE_SAMPLES = 8


def image_shape(update_size: int) -> tuple[int, int]:
    """The smallest H x W >= update_size with both sides multiples of 64 and W at most four times H."""
    if update_size < 1:
        raise ValueError(f"Expected update_size={update_size} >= 1")
    side = RATIO
    for tiles in itertools.count(math.ceil(update_size / side**2)):
        for rows in range(math.isqrt(tiles), 0, -1):
            if tiles % rows == 0 and tiles <= _LONGEST_SIDE * rows**2:
                return rows * side, tiles // rows * side
    raise AssertionError("a square number of tiles always fits")


def required_code_size(update_size: int) -> int:
    """The code length k that an update of n numbers gets: the padded length / 64 (a little over n / 64)."""
    height, width = image_shape(update_size)
    return height * width // RATIO


class ResidualBlock(nn.Module):
    """x + conv(act(conv(x))), same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.second(functional.leaky_relu(self.first(image), _SLOPE))


class ConvAutoEncoder(nn.Module):
    """Images [units, 1, H, W] <-> latents [units, 64, H/64, W/64]: H W / 64 numbers."""

    def __init__(self, shape: tuple[int, int], widths: tuple[int, ...]):
        super().__init__()
        if len(widths) != 6 or widths[-1] != RATIO:
            raise ValueError(f"Expected widths={list(widths)} to be six channel counts, the last of them 64")
        self.rows, self.columns = shape[0] // RATIO, shape[1] // RATIO
        sizes = list(itertools.pairwise((1, *widths)))
        with torch.random.fork_rng(devices=[]):  # layers draw their start from the global generator, which is not ours
            down = [nn.Conv2d(a, b, 4, stride=2, padding=1, bias=False) for a, b in sizes]
            up = [nn.ConvTranspose2d(b, a, 4, stride=2, padding=1, bias=False) for a, b in reversed(sizes)]
            self.down = nn.Sequential(*_activated(down), *(ResidualBlock(RATIO) for _ in range(_BLOCKS)))
            self.up = nn.Sequential(*(ResidualBlock(RATIO) for _ in range(_BLOCKS)), *_activated(up))
        self.to(memory_format=torch.channels_last)

    def encoder(self, images: Tensor) -> Tensor:
        """Images [units, 1, H, W] -> latents [units, 64, H/64, W/64]."""
        return self.finish(self.halve(images))

    def halve(self, images: Tensor) -> Tensor:
        """The strided convolutions: a row of the result depends on its tile and on those above and below."""
        return self.down[:-_BLOCKS](images.contiguous(memory_format=torch.channels_last))

    def finish(self, latents: Tensor) -> Tensor:
        return torch.tanh(self.down[-_BLOCKS:](latents))

    def decoder(self, latents: Tensor) -> Tensor:
        """Latents [units, 64, H/64, W/64] -> images [units, 1, H, W]."""
        return self.double(self.begin(latents))

    def begin(self, latents: Tensor) -> Tensor:
        return self.up[:_BLOCKS](latents.contiguous(memory_format=torch.channels_last))

    def double(self, latents: Tensor) -> Tensor:
        """The transposed convolutions: a tile of the result depends on its latent row and on those above and below."""
        return self.up[_BLOCKS:](latents)


@register("autoencoder")
class AutoEncoderCodec(Codec):
    """The network, the scale of each factor, and the variance of a code's coordinates under the prior.

    Formal guarantees: none of its own. A code's norm is at most sqrt(k) (Tanh); the caller clips codes to C.
    """

    fits = ("moments", "rows")
    fixed_size = True

    def __init__(self, network: ConvAutoEncoder, factor_std: Tensor, factor_sizes: Tensor, code_variance: Tensor):
        self.network = network.eval().requires_grad_(False)
        self.factor_std, self.factor_sizes, self.code_variance = factor_std, factor_sizes, code_variance
        self.losses: list[float] = []
        ends = factor_sizes.cumsum(0).tolist()
        self._factors = list(zip([0, *ends], ends, factor_std.tolist(), strict=False))
        self.update_size = ends[-1]
        self.shape = (network.rows * RATIO, network.columns * RATIO)
        self.code_size = len(code_variance)

    @classmethod
    def fit(
        cls,
        prior: GaussianPrior | None,
        layout: AdapterLayout,
        code_size: int | None,
        noise_std: float,
        seed: int,
        *,
        steps: int = 200,
        batch_size: int = 1,
        learning_rate: float = 1e-3,
        widths: tuple[int, ...] = WIDTHS,
        progress: Progress | None = None,
    ) -> AutoEncoderCodec:
        """Fit to samples of the prior; the same prior, seed and options give the same codec.

        Args:
            prior: any structure; a factor of scale 0 is left out (its part of every decoded update is 0).
            code_size: None, or exactly `required_code_size(layout.size)`.
            noise_std: DP noise of a mean code's coordinate in clip norms, put into the loop.
            steps, batch_size, learning_rate: of Adam on the reconstruction error, see `fitting.fit_to_samples`. The papers'
                rate is 2e-4, over far more steps; 1e-3 keeps more after a few hundred. One image holds so many patches
                that a batch of one is enough.
            widths: channels after each of the six convolutions, the last 64.
            progress: called as progress(step, steps, loss).
        Raises:
            ValueError: without a prior, or for another code size.
        """
        if prior is None:
            raise ValueError("Expected a prior: the auto-encoder is fitted to its samples")
        wanted = required_code_size(layout.size)
        if code_size not in (None, wanted):
            raise ValueError(f"Expected code_size={code_size} = {wanted}: 1/64 of the padded update of {layout.size}")
        shape = image_shape(layout.size)
        generator = torch.Generator().manual_seed(seed)
        network = ConvAutoEncoder(shape, tuple(widths))
        _initialise(network, generator)
        sizes = torch.tensor([factor.size for factor in layout.factors])
        codec = cls(network, prior.std.float().clone(), sizes, torch.ones(wanted))

        window = window_shape(shape)

        def images(count: int, source: torch.Generator) -> Tensor:
            top, left = (random_tile(whole - part, source) for whole, part in zip(shape, window, strict=True))
            sample = prior.sample(count, source)
            return codec._to_images(sample, top, top + window[0])[..., left : left + window[1]].clone()

        network.requires_grad_(True)
        codec.losses = fit_to_samples(
            network,
            images,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            noise_std=noise_std * math.sqrt(math.prod(shape) / math.prod(window)),  # a window has so much less of the clip norm
            generator=generator,
            progress=progress,
        )
        network.requires_grad_(False)
        codes = torch.cat([codec.encode(prior.sample(1, generator)) for _ in range(_VARIANCE_SAMPLES)])
        codec.code_variance = codec._channel_variance(codes)
        return codec

    @torch.no_grad()
    def encode(self, updates: Tensor) -> Tensor:
        codes = torch.empty(len(updates), self.code_size)
        for place, code in enumerate(codes):
            latents = [
                self.network.halve(self._to_images(updates[place : place + 1], RATIO * first, RATIO * last))[:, :, start:stop]
                for first, last, start, stop in bands(*self.shape)
            ]
            code.copy_(self.network.finish(torch.cat(latents, 2)).flatten())
        return codes

    @torch.no_grad()
    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        shrunk = mean_code * wiener_gain(mean_code, noise_std, self.code_variance)
        shape = {"row": self.network.rows, "column": self.network.columns}
        latents = self.network.begin(rearrange(shrunk.float(), "(channel row column) -> 1 channel row column", **shape))
        update = torch.empty(self.update_size)
        for first, last, start, stop in bands(*self.shape):
            band = self.network.double(latents[:, :, first:last])[0, 0, RATIO * start : RATIO * stop].flatten()
            place = (first + start) * RATIO * self.shape[1]
            update[place : place + len(band)] = band[: max(self.update_size - place, 0)]
        for start, stop, scale in self._factors:
            update[start:stop] *= scale
        return update

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights = {f"network.{key}": value.contiguous() for key, value in self.network.state_dict().items()}
        own = {"factor_std": self.factor_std, "factor_sizes": self.factor_sizes, "code_variance": self.code_variance}
        widths = [layer.out_channels for layer in self.network.down if isinstance(layer, nn.Conv2d)]
        return {**weights, **own}, {"shape": list(self.shape), "widths": widths}

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> AutoEncoderCodec:
        network = ConvAutoEncoder(tuple(meta["shape"]), tuple(meta["widths"]))
        weights = {key.removeprefix("network."): value for key, value in tensors.items() if key.startswith("network.")}
        network.load_state_dict(weights)
        return cls(network, tensors["factor_std"], tensors["factor_sizes"], tensors["code_variance"])

    def _to_images(self, updates: Tensor, top: int, bottom: int) -> Tensor:
        """Rows top to bottom of the updates' whitened, padded images: [units, 1, bottom - top, W]."""
        first, last = top * self.shape[1], bottom * self.shape[1]
        flat = torch.zeros(len(updates), last - first)
        for start, stop, scale in self._factors:
            start, stop = max(start, first), min(stop, last)
            if start < stop and scale > 0:
                torch.div(updates[:, start:stop], scale, out=flat[:, start - first : stop - first])
        return rearrange(flat, "units (row column) -> units 1 row column", column=self.shape[1])

    def _channel_variance(self, codes: Tensor) -> Tensor:
        """Mean square of each coordinate of codes [units, k], pooled over the positions of a channel: [k]."""
        codes = rearrange(codes, "units (channel place) -> channel (units place)", channel=RATIO)
        return codes.square().mean(1).repeat_interleave(self.code_size // RATIO)


def bands(height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Tile rows of an image in bands of about `BAND` numbers: first and last row with the neighbours they depend on, and start and stop
    of the band's own rows among these."""
    rows = height // RATIO
    step = max(BAND // (RATIO * width), 1)
    for own in range(0, rows, step):
        end = min(own + step, rows)
        first, last = max(own - 1, 0), min(end + 1, rows)
        yield first, last, own - first, end - first


def window_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The image itself where it has at most `WINDOW` numbers; else sides that are multiples of 64, as near to a square as fits."""
    if math.prod(shape) <= WINDOW:
        return shape
    short = min(min(shape), math.isqrt(WINDOW) // RATIO * RATIO)
    long = min(max(shape), WINDOW // short // RATIO * RATIO)
    return (short, long) if shape[0] <= shape[1] else (long, short)


def random_tile(room: int, generator: torch.Generator) -> int:
    """A multiple of 64 in 0 to room; nothing is drawn where there is no choice."""
    return RATIO * int(torch.randint(room // RATIO + 1, (), generator=generator)) if room else 0


def _activated(layers: list[nn.Module]) -> list[nn.Module]:
    """Layers with an activation between, none after the last."""
    return [part for layer in layers for part in (layer, nn.LeakyReLU(_SLOPE, inplace=True))][:-1]


def _initialise(network: ConvAutoEncoder, generator: torch.Generator) -> None:
    """Start as a near-orthonormal code and its adjoint, from the generator alone.

    Each convolution starts as orthonormal filters on separate 2 x 2 patches, each transposed one as the adjoint of its
    partner, each residual block as the identity. From a usual random start hundreds of steps keep nothing.
    """
    down = [layer for layer in network.down if isinstance(layer, nn.Conv2d)]
    up = [layer for layer in network.up if isinstance(layer, nn.ConvTranspose2d)]
    for encoding, decoding in zip(down, reversed(up), strict=True):
        outputs, inputs = encoding.weight.shape[:2]
        tall = torch.randn(max(outputs, 4 * inputs), min(outputs, 4 * inputs), generator=generator)
        filters = torch.linalg.qr(tall).Q if outputs >= 4 * inputs else torch.linalg.qr(tall).Q.T
        patches = rearrange(filters, "filter (channel height width) -> filter channel height width", height=2, width=2)
        weight = functional.pad(patches, (1, 1, 1, 1))
        encoding.weight.data.copy_(weight)
        decoding.weight.data.copy_(weight)
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            deviation = math.sqrt(2 / (1 + _SLOPE**2) / block.first.weight[0].numel())
            block.first.weight.data.normal_(0.0, deviation, generator=generator)
            block.second.weight.data.zero_()
