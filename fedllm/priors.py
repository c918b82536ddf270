"""The prior of a fit: public gradients, what was released so far, fresh random directions, or a mixture. None of them costs privacy.

A prior is named by its parts, joined by '+': `public+released+random`. A part is one function here and one line in ROW_PRIORS.
`real` stands alone: clients' raw gradients, as CG-FedLLM has it. It is a release without noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dr_encoder.codecs import Codec, decoded_noise_energy
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import (
    GaussianPrior,
    factor_rms,
    from_public_gradients,
    from_released,
    from_rows,
    mixture,
    random_directions,
    recency_weights,
)
from fedllm.errors import UserError
from fedllm.schema import GENERATED, Config

RANDOM_ROWS = 16
MOST_RELEASED = 20  # rounds that are remembered
HALF_LIFE = 1.0  # refits after which public gradients weigh half
REAL_COST = "everything: raw gradients of private data"


@dataclass
class Past:
    """What earlier rounds left, oldest first, all of it public: decoded noisy mean codes (the ledger has them), and public gradients."""

    updates: list[Tensor] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)  # expected energy of the noise in each
    gradients: list[Tensor] = field(default_factory=list)  # of earlier refits, [count, n] each

    def add(self, codec: Codec, code: Tensor, noise_std: float) -> None:
        """Remember one round by its noisy mean code [k], decoded without shrinking; noise_std: of each of its numbers."""
        self.updates = [*self.updates, codec.decode(code)][-MOST_RELEASED:]
        self.noise = [*self.noise, decoded_noise_energy(codec, code, noise_std)][-MOST_RELEASED:]

    def keep(self, gradients: Tensor, most: int) -> None:
        """Remember the public gradients [count, n] of a refit, and forget all but the `most` newest."""
        self.gradients = [*self.gradients, gradients][-most:] if most else []

    def state(self) -> dict[str, Tensor]:
        """Named tensors for a checkpoint."""
        found = {f"gradients.{number}": rows for number, rows in enumerate(self.gradients)}
        if self.updates:
            found |= {"released": torch.stack(self.updates), "released_noise": torch.tensor(self.noise, dtype=torch.float64)}
        return found

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor]) -> Past:
        """Inverse of `state`."""
        numbers = itertools.takewhile(lambda number: f"gradients.{number}" in tensors, itertools.count())
        past = cls(gradients=[tensors[f"gradients.{number}"] for number in numbers])
        if "released" in tensors:
            past.updates, past.noise = list(tensors["released"]), tensors["released_noise"].tolist()
        return past


@dataclass(frozen=True)
class Given:
    """What a prior may be made of: gradients of public text at the model as it stands, what earlier rounds left, a public seed.

    generated: whether a language model wrote that text. real: clients' own gradients, for `real` alone.
    """

    layout: AdapterLayout
    public: Tensor
    past: Past
    seed: int
    generated: bool = False
    real: Tensor | None = None


def _public(given: Given) -> GaussianPrior:
    found = [from_public_gradients(given.layout, rows, given.generated) for rows in (*given.past.gradients, given.public)]
    return found[0] if len(found) == 1 else mixture(found, recency_weights(len(found), HALF_LIFE))


def _released(given: Given) -> GaussianPrior | None:
    if not given.past.updates:
        return None
    noise_std = torch.tensor(given.past.noise, dtype=torch.float64).sqrt()
    try:
        return from_released(given.layout, torch.stack(given.past.updates), noise_std, 1)
    except ValueError:  # not above their noise: they tell nothing yet
        return None


def _random(given: Given) -> GaussianPrior:
    return random_directions(given.layout, RANDOM_ROWS, given.seed, factor_rms(given.layout, given.public))


def _real(given: Given) -> GaussianPrior:
    return from_rows("real", given.layout, given.real, REAL_COST, "clients' gradients")


ROW_PRIORS: dict[str, tuple[Callable[[Given], GaussianPrior | None], float]] = {  # name -> (how it is made, its weight unless set)
    "public": (_public, 1.0),
    "released": (_released, 1.0),
    "random": (_random, 0.05),
    "real": (_real, 1.0),
}


def of_config(
    config: Config, layout: AdapterLayout, public: Tensor, past: Past, seed: int, real: Tensor | None = None
) -> GaussianPrior | None:
    """What the config's codec is fitted on, or None for a family that needs no prior. Arguments as of `Given`."""
    codec = config.codec
    if codec.prior == "none":
        return None
    given = Given(layout, public, past, seed, config.task.public == GENERATED, real)
    try:
        return build(codec.prior, codec.weights, given)
    except ValueError as error:  # gradients that are not finite, or all zero
        raise UserError(f"codec.prior={codec.prior}: {error}") from None


def build(name: str, weights: list[float] | None, given: Given) -> GaussianPrior:
    """The prior that `name` describes; a part that has nothing to tell yet is left out.

    weights: shares of the total second moment, one a part; None for the usual ones.
    """
    names = name.split("+")
    shares = weights if weights is not None else [ROW_PRIORS[part][1] for part in names]
    made = [(ROW_PRIORS[part][0](given), share) for part, share in zip(names, shares, strict=True)]
    found = [(prior, share) for prior, share in made if prior is not None]
    return found[0][0] if len(found) == 1 else mixture(*zip(*found, strict=True))
