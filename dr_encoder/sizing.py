"""How long a code should be: the length that is expected to lose least signal to truncation and to noise together.

With u the mean update (the signal) of energy S, P_k the code's projection and noise of variance s^2 in each of its k numbers every round:
    f(k) = sum |P_k h|^2 / sum |h|^2     over *held-out* public gradients h
    N_k = k s^2 / rounds
    error(k) = 1 - f(k) + f(k) N_k / (S f(k) + N_k)
The first part is what the projection loses, the second what is left of signal and noise after the best shrink, a Wiener decoder's error.
Equivalently 1 - error is the squared cosine of decoded and true mean update, so that the length does not depend on the learning rate.
Noise is drawn afresh each round and averages out over them, the lost part is lost in every round: hence the division by `rounds`.

f stands in for the share of the signal that the code keeps. Squares of single gradients do not mind the sign that a wrong public label
gives them, where products of two would cancel (measured on SmolLM2, trained for some rounds, with random public labels: f is .65, .76,
.79 at 16, 128, 256 numbers, the share of true signal kept .61, .73, .77). Held-out ones, because a basis always keeps the energy of the
rows it was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from dr_encoder.codecs.base import Codec
from dr_encoder.codecs.linear import principal_subspace

Energy = float | Callable[[int], float]  # one, or one for each code size


def code_size_auto(
    fit_rows: Tensor,
    held_out_rows: Tensor,
    noise_energy_per_coordinate: Energy,
    rounds: int,
    candidates: Sequence[int],
    signal_energy: Energy,
    fit: Callable[[int], Codec] | None = None,
) -> int:
    """The candidate with the smallest expected error; of equals the smallest.

    Formal guarantees: a function of public rows and public settings alone, so it costs no privacy.

    Args:
        fit_rows: public gradients [rows, n] that the code is fitted to; unused where `fit` is given.
        held_out_rows: other public gradients [at least 1, n].
        noise_energy_per_coordinate: s^2 >= 0, of one number of the mean code in one round, in the unit of an update squared; or a
            function of k, for a clip norm that follows the length of the code.
        rounds: over which noise averages out, >= 1.
        candidates: code sizes >= 1.
        signal_energy: S > 0, energy of the true mean update in the same unit; an assumption, or a function of k.
        fit: k -> a codec, orthonormal in its own metric; None for the principal subspace of `fit_rows`, whose projections are nested: one
            fit serves all.
    Raises:
        ValueError: for arguments out of range, and for rows that span fewer directions than the largest candidate.
    """
    errors = expected_errors(fit_rows, held_out_rows, noise_energy_per_coordinate, rounds, candidates, signal_energy, fit)
    return min(errors, key=lambda size: (errors[size], size))


def expected_errors(
    fit_rows: Tensor,
    held_out_rows: Tensor,
    noise_energy_per_coordinate: Energy,
    rounds: int,
    candidates: Sequence[int],
    signal_energy: Energy,
    fit: Callable[[int], Codec] | None = None,
) -> dict[int, float]:
    """Expected error of each candidate as a share of the signal, 0 to 1: the curve that `code_size_auto` takes the minimum of."""
    if not candidates or min(candidates) < 1 or rounds < 1:
        raise ValueError(f"Expected rounds={rounds} >= 1 and at least one candidate, all >= 1, got {list(candidates)}")
    noise, signal = (_by_size(energy) for energy in (noise_energy_per_coordinate, signal_energy))
    least = min(signal(size) for size in candidates)
    energy = float(held_out_rows.double().square().sum())
    if not (math.isfinite(energy) and energy > 0 and least > 0):
        raise ValueError(f"Expected held-out rows and signal_energy={least} above 0, got {len(held_out_rows)} rows of energy {energy}")
    kept = _nested(fit_rows, held_out_rows, candidates) if fit is None else {k: _kept(fit(k), held_out_rows) for k in candidates}
    return {size: wiener_error(kept[size], size * noise(size) / rounds / signal(size)) for size in candidates}


def _by_size(energy: Energy) -> Callable[[int], float]:
    return energy if callable(energy) else lambda size: energy


def wiener_error(signal: float, noise: float) -> float:
    """Lost signal plus what shrinking leaves of signal and noise, for shares of the whole signal: see the formula above."""
    signal = min(max(signal, 0.0), 1.0)  # rounding may leave the range
    return 1 - signal + (signal * noise / (signal + noise) if signal + noise > 0 else 0.0)


def _nested(fit_rows: Tensor, held_out_rows: Tensor, candidates: Sequence[int]) -> dict[int, float]:
    """Share of the rows' energy that each size keeps."""
    basis, _ = principal_subspace(fit_rows, max(candidates))
    sums = (held_out_rows @ basis.T).double().square().sum(0).cumsum(0) / held_out_rows.double().square().sum()
    return {size: float(sums[size - 1]) for size in candidates}


def _kept(codec: Codec, rows: Tensor) -> float:
    if not (codec.linear and codec.summable):
        raise ValueError(f"Expected a linear codec to size, got {codec.name}")
    return float(codec.encode(rows).double().square().sum() / codec.metric(rows).double().square().sum())
