"""How long a code should be: the length that is expected to lose least signal to truncation and to noise together.

With u the mean update (the signal), P_k the code's projection and noise of variance s^2 in each of its k numbers every round:
    S = <u1, u2>,   S_k = <P_k u1, P_k u2>      u1, u2 independent estimates of u: the mean over pairs of *held-out* public gradients
    N_k = k s^2 / rounds
    error(k) = (S - S_k) + S_k N_k / (S_k + N_k)
The first part is what the projection loses, the second what is left of signal and noise after the best shrink S_k / (S_k + N_k), a
Wiener decoder's error. Equivalently 1 - error / S is the squared cosine of decoded and true mean update, so that the length does not
depend on the learning rate. Noise is drawn afresh each round and averages out over them, the lost part is lost in every round: hence
the division by `rounds`.

Products of two *different* examples are used because the squares |P u|^2 of one and the same mean count its sampling noise as signal and
make long codes look good; and held-out ones because a basis always keeps the energy of the rows it was fitted to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dr_encoder.codecs.base import Codec
from dr_encoder.codecs.linear import principal_subspace

Noise = float | Callable[[int], float]


def code_size_auto(
    fit_rows: Tensor,
    held_out_rows: Tensor,
    noise_energy_per_coordinate: Noise,
    rounds: int,
    candidates: Sequence[int],
    fit: Callable[[int], Codec] | None = None,
) -> int:
    """The candidate with the smallest expected error; of equals the smallest.

    Formal guarantees: a function of public rows and public settings alone, so it costs no privacy.

    Args:
        fit_rows: public gradients [rows, n] that the code is fitted to; unused where `fit` is given.
        held_out_rows: other public gradients [at least 2, n].
        noise_energy_per_coordinate: s^2 >= 0, of one number of the mean code in one round, in the unit of an update squared; or a
            function of k, for a clip norm that follows the length of the code.
        rounds: over which noise averages out, >= 1.
        candidates: code sizes >= 1.
        fit: k -> an orthonormal codec; None for the principal subspace of `fit_rows`, whose projections are nested: one fit serves all.
    Raises:
        ValueError: for arguments out of range, for rows that span fewer directions than the largest candidate, and for held-out
            rows that have no direction in common.
    """
    errors = expected_errors(fit_rows, held_out_rows, noise_energy_per_coordinate, rounds, candidates, fit)
    return min(errors, key=lambda size: (errors[size], size))


def expected_errors(
    fit_rows: Tensor,
    held_out_rows: Tensor,
    noise_energy_per_coordinate: Noise,
    rounds: int,
    candidates: Sequence[int],
    fit: Callable[[int], Codec] | None = None,
) -> dict[int, float]:
    """Expected error of each candidate as a share of the signal, 0 to 1: the curve that `code_size_auto` takes the minimum of."""
    if not candidates or min(candidates) < 1 or rounds < 1:
        raise ValueError(f"Expected rounds={rounds} >= 1 and at least one candidate, all >= 1, got {list(candidates)}")
    if len(held_out_rows) < 2:
        raise ValueError(f"Expected at least 2 held-out rows, got {len(held_out_rows)}")
    total = float(sum(common_energy(piece).sum() for piece in held_out_rows.split(65_536, dim=1)))
    if not total > 0:
        raise ValueError(f"Expected held-out rows with a direction in common, got {len(held_out_rows)} without: more public text is needed")
    kept = _nested(fit_rows, held_out_rows, candidates) if fit is None else {k: _kept(fit(k), held_out_rows) for k in candidates}
    noise = noise_energy_per_coordinate if callable(noise_energy_per_coordinate) else lambda size: noise_energy_per_coordinate
    return {size: wiener_error(kept[size] / total, size * noise(size) / rounds / total) for size in candidates}


def common_energy(codes: Tensor) -> Tensor:
    """For each column of [rows, k] the mean of x_a x_b over all pairs of different rows, float64 [k].

    This is the average over every way to split the rows into two halves: an unbiased estimate of the mean row's square.
    """
    codes = codes.double()
    return (codes.sum(0).square() - codes.square().sum(0)) / (len(codes) * (len(codes) - 1))


def wiener_error(signal: float, noise: float) -> float:
    """Lost signal plus what shrinking leaves of signal and noise, for shares of the whole signal: see the formula above."""
    signal = min(max(signal, 0.0), 1.0)  # an estimate may leave the range
    return 1 - signal + (signal * noise / (signal + noise) if signal + noise > 0 else 0.0)


def _nested(fit_rows: Tensor, held_out_rows: Tensor, candidates: Sequence[int]) -> dict[int, float]:
    basis, _ = principal_subspace(fit_rows, max(candidates))
    sums = common_energy(held_out_rows @ basis.T).cumsum(0)
    return {size: float(sums[size - 1]) for size in candidates}


def _kept(codec: Codec, rows: Tensor) -> float:
    if not codec.orthonormal:
        raise ValueError(f"Expected an orthonormal codec to size, got {codec.name}")
    return float(common_energy(codec.encode(rows)).sum())
