"""What a codec keeps of real updates.

Two independent half cohorts give mean updates u1 = mu + e1 and u2 = mu + e2 with independent sampling errors, so that products across
them are free of these errors: <P u1, P u2> / <u1, u2> is the share of the *signal* mu that is kept, where the energy of one mean,
|P u1|^2 / |u1|^2, mostly counts sampling noise.

The *total error* is what a private step misses of mu. Codes of the whole cohort are clipped as a run clips them and get its noise; with x
what their mean is decoded to, it is the least E |f x - mu|^2 over factors f that do not see the noise, |mu|^2 - (E <x, mu>)^2 / E |x|^2.
Of any length, since the clip shortens x by far and an optimiser such as Adam does not mind: 0 is the signal's own direction without noise,
|mu|^2 nothing of it. Clipped shares of units that point elsewhere count, and so do sampling and DP noise. Here mu is what two halves of
*other* clients say, o1 and o2, in both parts: <x, o1> <x, o2> and <o1, o2> have no bias, and their errors cancel to first order.

Everything is told in two metrics: the plain one, and that of an Adam server, sum g_i h_i / rms_i, in which a product with the gradient is
what a step gains: Adam moves small factors as far as large ones, so what is lost of them counts as much.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from dr_encoder.codecs import Codec
from dr_encoder.codecs.linear import principal_subspace
from fedllm.privacy.clipping import clip_units

SINGLES = 16  # updates whose own energy is looked at


@dataclass(frozen=True)
class Cohorts:
    """Real updates of one round: two half cohorts and other clients, each [units, n].

    private: of yet other clients, for priors that are made of private updates: what a codec was fitted on tells nothing about it.
    weights: [n] of a coordinate in Adam's metric, 1 / rms of its factor; None for the plain one.
    """

    first: Tensor
    second: Tensor
    others: Tensor
    private: Tensor | None = None
    weights: Tensor | None = None

    @property
    def signal(self) -> float:
        """<u1, u2>: an unbiased estimate of |mu|^2, which may come out negative in a round of little signal."""
        return dot(self.first.mean(0), self.second.mean(0))


@dataclass
class Score:
    """Sums over rounds; ratios are taken at the end, so that a round with little signal weighs little."""

    signal: float = 0.0
    signal_kept: float = 0.0
    adam_signal: float = 0.0
    adam_kept: float = 0.0
    adam_error: float = 0.0
    mean: float = 0.0
    mean_kept: float = 0.0
    single: float = 0.0
    single_kept: float = 0.0
    error: float = 0.0
    error_signal: float = 0.0
    adam_error_signal: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    fit_seconds: float = 0.0
    fits: int = 0
    rounds: int = 0

    def row(self) -> dict[str, float | None]:
        """Ratios, and seconds: encode of one update, decode of one mean (of one update where codes have no sum), one fit."""
        return {
            "signal_energy": ratio(self.signal_kept, self.signal),
            "signal_energy_adam": ratio(self.adam_kept, self.adam_signal),
            "kept_energy_mean": ratio(self.mean_kept, self.mean),
            "kept_energy_single": ratio(self.single_kept, self.single),
            "total_error": ratio(self.error, self.error_signal),
            "total_error_adam": ratio(self.adam_error, self.adam_error_signal),
            "fit_seconds": ratio(self.fit_seconds, self.fits),
            "encode_seconds": ratio(self.encode_seconds, self.rounds),
            "decode_seconds": ratio(self.decode_seconds, self.rounds),
        }


def add(
    score: Score,
    codec: Codec,
    cohorts: Cohorts,
    noise_std: float,
    rng: np.random.Generator,
    clip: float | None = None,
    shrink: bool = True,
) -> Tensor | None:
    """Add one round's figures of a fitted codec; returns the noisy mean code of the whole cohort (None where codes have no sum).

    noise_std: DP noise of the mean code's numbers, for the whole cohort. clip: norm that each code is clipped to before that noise (the
    signal kept is of codes as they are); None: none, and none where codes have no sum. shrink: whether the decoder knows of the noise.
    """
    u1, u2 = cohorts.first.mean(0), cohorts.second.mean(0)
    begun = time.perf_counter()
    codes = codec.encode(cohorts.first)
    score.encode_seconds += (time.perf_counter() - begun) / len(codes)
    other_codes = codec.encode(cohorts.second)
    p1, p2 = decoded(codec, codes), decoded(codec, other_codes)
    score.signal += dot(u1, u2)
    score.signal_kept += dot(p1, p2)
    score.adam_signal += dot(u1, u2, cohorts.weights)
    score.adam_kept += dot(p1, p2, cohorts.weights)
    score.mean += dot(u1, u1)
    score.mean_kept += dot(p1, p1)
    score.single += float(cohorts.first[:SINGLES].double().square().sum())
    score.single_kept += sum(float(codec.decode(code).double().square().sum()) for code in codes[:SINGLES])
    noisy, told = None, noise_std if shrink and codec.summable else 0.0
    if codec.summable:
        sent = torch.cat([codes, other_codes])
        mean = (sent if clip is None else clip_units(sent, clip)).mean(0)
        noise = torch.from_numpy(rng.standard_normal(codec.code_size)).float() * noise_std
        noisy = mean + noise
        found = [codec.decode(code, told) for code in (noisy, mean - noise)]  # mirror images: no draw is along the signal by chance
    else:
        found = [(p1 + p2) / 2]
    begun = time.perf_counter()
    codec.decode(codes[0] if noisy is None else noisy, told)
    score.decode_seconds += time.perf_counter() - begun
    o1, o2 = (half.mean(0) for half in cohorts.others.chunk(2))
    score.error += missed(found, o1, o2)
    score.error_signal += dot(o1, o2)
    score.adam_error += missed(found, o1, o2, cohorts.weights)
    score.adam_error_signal += dot(o1, o2, cohorts.weights)
    score.rounds += 1
    return noisy


def missed(found: Sequence[Tensor], one: Tensor, other: Tensor, weights: Tensor | None = None) -> float:
    """What equally likely updates [n] miss of the signal's energy, all of them times the one best factor.

    one, other: the signal [n] with independent errors, which tell <x, mu> twice: the product has no bias.
    """
    energy = fmean(dot(x, x, weights) for x in found)
    along = [fmean(dot(x, mean, weights) for x in found) for mean in (one, other)]
    return dot(one, other, weights) - (along[0] * along[1] / energy if energy > 0 else 0.0)


def add_oracle(scores: Sequence[tuple[Score, int]], cohorts: Cohorts) -> None:
    """The same of the oracle at the size of each score: the principal subspace of other clients' true updates of this very round.

    It has no more directions than `others`: a longer code is compared with all of them.
    """
    if not scores:
        return
    most = min(max(size for _, size in scores), len(cohorts.others))
    u1, u2 = cohorts.first.mean(0), cohorts.second.mean(0)
    kept = _along(cohorts.others, u1, u2, most)
    root = None if cohorts.weights is None else cohorts.weights.sqrt()
    adam_kept = kept if root is None else _along(cohorts.others * root, u1 * root, u2 * root, most)
    for score, size in scores:
        score.signal += cohorts.signal
        score.signal_kept += float(kept[min(size, most) - 1])
        score.adam_signal += dot(u1, u2, cohorts.weights)
        score.adam_kept += float(adam_kept[min(size, most) - 1])


def _along(rows: Tensor, one: Tensor, other: Tensor, most: int) -> Tensor:
    """Product of two vectors within the first 1, 2, ... `most` principal directions of rows [units, n]."""
    basis, _ = principal_subspace(rows, most)
    return ((basis @ one).double() * (basis @ other).double()).cumsum(0)


def decoded(codec: Codec, codes: Tensor) -> Tensor:
    """The mean update [n] that codes [units, k] stand for: decoded once, or one by one where they have no sum."""
    if codec.summable:
        return codec.decode(codes.mean(0))
    total = torch.zeros(codec.update_size)
    for code in codes:
        total += codec.decode(code)
    return total / len(codes)


def stored_bytes(codec: Codec) -> int:
    """Size of what the codec keeps."""
    return sum(tensor.numel() * tensor.element_size() for tensor in codec.state()[0].values())


def dot(one: Tensor, other: Tensor, weights: Tensor | None = None) -> float:
    """Inner product in float64, of coordinates with these weights."""
    return float(one.double() @ (other.double() if weights is None else other.double() * weights))


def ratio(part: float, whole: float) -> float | None:
    """part / whole; None where the whole is not positive."""
    return part / whole if whole > 0 else None
