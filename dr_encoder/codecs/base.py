"""The codec protocol, its registry, and its file format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior


class Codec:
    """A map of updates to codes and of the mean noisy code back.

    Attributes:
        name: the registered family.
        update_size, code_size: n and k.
        linear: whether decode is linear for noise_std 0, so that decoding a mean equals the mean of decoded codes.
        orthonormal: whether the rows of the encoder are orthonormal (then noise before or after encoding is the same in the code).
        summable: whether codes may be added. If not, `decode` takes ONE update's code, the mean is taken over decoded updates,
            and no noise can be put into a code: such a codec is for runs without DP.

    These three are of the class where they hold for a whole family, and of the instance where they depend on its parts (`chain`).

        fits: what `fit` takes for a prior: `rows` (samples), `moments` (scales alone); the first named is its own. Empty: None.
        fixed_size: whether the family fixes k itself, so that `fit` takes None for it.
    """

    name: ClassVar[str]
    linear: bool = False
    orthonormal: bool = False
    summable: bool = True
    fits: ClassVar[tuple[str, ...]] = ("rows",)
    fixed_size: ClassVar[bool] = False
    update_size: int
    code_size: int

    @classmethod
    def fit(
        cls, prior: GaussianPrior | None, layout: AdapterLayout, code_size: int, noise_std: float, seed: int, **options: Any
    ) -> Codec:
        """Fit to a prior: sees the prior and a seed, nothing else. `noise_std`: DP noise of a mean code's coordinate in clip norms."""
        raise NotImplementedError

    def encode(self, updates: Tensor) -> Tensor:
        """Updates [units, n] -> codes [units, k], float32."""
        raise NotImplementedError

    def decode(self, mean_code: Tensor, noise_std: float = 0.0) -> Tensor:
        """Mean code [k], with noise of `noise_std` in each coordinate, -> update [n]. One update's code where not `summable`."""
        raise NotImplementedError

    def decode_rows(self, codes: Tensor) -> Tensor:
        """Codes [rows, k] without noise, each decoded by itself -> updates [rows, n]."""
        return torch.stack([self.decode(code) for code in codes])

    def metric(self, updates: Tensor) -> Tensor:
        """Updates [units, n] -> the same in the coordinates in which the code is an orthonormal projection, where there are any."""
        return updates

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the JSON-able values that define the codec."""
        raise NotImplementedError

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Codec:
        """Inverse of `state`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """16 hex digits over everything that defines the codec: equal on every party that holds the same one."""
        tensors, meta = self.state()
        digest = hashlib.sha256(json.dumps([self.name, meta], sort_keys=True).encode())
        for key in sorted(tensors):
            digest.update(key.encode())
            digest.update(tensors[key].contiguous().numpy())
        return digest.hexdigest()[:16]


CODECS: dict[str, type[Codec]] = {}


def register(name: str) -> Callable[[type[Codec]], type[Codec]]:
    """Make a codec family known under `name`."""

    def add(cls: type[Codec]) -> type[Codec]:
        cls.name = name
        CODECS[name] = cls
        return cls

    return add


def save(codec: Codec, path: Path) -> None:
    """Write a codec as one safetensors file."""
    tensors, meta = codec.state()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, {"codec": codec.name, "meta": json.dumps(meta)})


def load(path: Path) -> Codec:
    """Read a codec that `save` wrote."""
    with safe_open(path, "pt") as file:
        header, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    return CODECS[header["codec"]].from_state(tensors, json.loads(header["meta"]))


def check_code_size(code_size: int, update_size: int) -> None:
    """Raise ValueError unless 1 <= code_size <= update_size."""
    if not 1 <= code_size <= update_size:
        raise ValueError(f"Expected 1 <= code_size={code_size} <= {update_size}, the size of the update")


def require_prior(prior: GaussianPrior | None, family: str, *, rows: bool = False) -> GaussianPrior:
    """The prior; raises ValueError where there is none, or none with rows (samples, not just scales) where `rows` are needed."""
    if prior is None:
        raise ValueError(f"Expected a prior for codec family {family}, got none")
    if rows and prior.rows is None:
        raise ValueError(f"Expected a prior with rows for codec family {family}, got the {prior.structure} prior {prior.name}")
    return prior


def require_no_noise(noise_std: float, family: str) -> None:
    """Raise ValueError unless noise_std is 0: for families whose codes cannot be summed, so that none can be private."""
    if noise_std != 0:
        raise ValueError(f"Expected noise_std={noise_std} = 0: codes of family {family} cannot be summed, so they carry no noise")


NOISE_DRAWS = 16


def decoded_noise_energy(codec: Codec, code: Tensor, noise_std: float, seed: int = 0) -> float:
    """Expected energy of what noise of `noise_std` in each number of a code [k] becomes when it is decoded, E |D(c + z) - D(c)|^2.

    k s^2 for an orthonormal code; for another, which may stretch it, the mean over NOISE_DRAWS draws of a public seed around this code.
    """
    if codec.orthonormal or noise_std == 0:
        return len(code) * noise_std**2
    generator, centre = torch.Generator().manual_seed(seed), codec.decode(code)
    draws = (codec.decode(code + noise_std * torch.randn(len(code), generator=generator)) - centre for _ in range(NOISE_DRAWS))
    return fmean(float(draw.double().square().sum()) for draw in draws)


_PART = 1 << 20  # numbers that are summed in float64 at once


def wiener_gain(mean_code: Tensor, noise_std: float, prior_variance: Tensor, least: float = 0.1) -> Tensor:
    """Shrink factor v_j / (v_j + s^2) of each coordinate of a noisy mean code: free post-processing.

    mean_code: the noisy mean code [k]; noise_std: s, its noise; prior_variance: [k], of one unit's code, known up to scale.
    The cohort mean's variance is v = a * prior_variance, with one scale a matched to the noisy code itself, sum(c^2 - s^2) = a sum(prior),
    but not below the a that would shrink the whole code to `least`.
    """
    if noise_std == 0:
        return torch.ones_like(mean_code)
    if not prior_variance.any():
        return torch.zeros_like(mean_code)
    noise = noise_std**2
    floor = least * noise * len(mean_code)
    energy = sum(float(part.double().square().sum()) for part in mean_code.split(_PART)) - noise * len(mean_code)
    scale = max(energy, floor) / sum(float(part.double().sum()) for part in prior_variance.split(_PART))
    ratio = prior_variance.reciprocal().mul_(max(noise / scale, torch.finfo(torch.float32).tiny))  # s^2 / v, infinite where v is zero
    return ratio.add_(1).reciprocal_()  # in place: with no codec at all this is as long as the update
