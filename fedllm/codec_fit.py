"""Fitting the codec of the rounds to come: sees a prior, public gradients and a public seed, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dr_encoder import codecs
from dr_encoder.codecs import Codec
from dr_encoder.codecs.chain import WIDER
from dr_encoder.codecs.linear import check_dense
from dr_encoder.layout import AdapterLayout
from dr_encoder.priors import GaussianPrior
from dr_encoder.sizing import code_size_auto
from fedllm import priors, public
from fedllm.code_adam import MOST_CARRIED, too_long_to_carry
from fedllm.errors import RunStopped, UserError
from fedllm.schema import Config

LEAST_AUTO = 4  # the shortest is two to this power
MOST_AUTO = 16_384  # longest code that `code_size: auto` considers
SIGNAL_SHARE = 0.01  # of a unit's energy is taken to be the mean update's; .013 was measured on SmolLM2 after some rounds, more before


@dataclass(frozen=True)
class Announcement:
    """What the server tells of a codec: with the model as broadcast and the public text, all that a client's own fit needs.

    codec: fingerprint of the server's fit; round: whose public gradients it was fitted on; size, noise_std: as for `fit_codec`;
    seed: the run's public seed.
    """

    codec: str
    round: int
    size: int | None
    noise_std: float
    seed: int


def check_sizes(config: Config, update_size: int) -> None:
    """Raise UserError for a code longer than the update, or one that would need too large a dense matrix: known before any gradient is."""
    codec, size = config.codec, config.codec.code_size
    if not isinstance(size, int):
        return
    if size > update_size:
        raise UserError(f"codec.code_size={size}: expected at most {update_size}, the number of trained parameters")
    if carried(config) and size > MOST_CARRIED:
        raise too_long_to_carry(size)
    outer, family = codec.parts if codec.family == "chain" else (None, codec.family)
    if family == "linear" and codec.prior != "moments":
        try:
            check_dense(size, min(WIDER * size, update_size) if outer in ("coordinate", "kronecker") else update_size)
        except ValueError as error:
            raise UserError(f"codec.family={codec.family}: {error}") from None


def carried(config: Config) -> bool:
    """Whether moments of a code's numbers have to follow the codec from one fit to the next."""
    fed = config.federation
    return fed.server.space == "code" and 0 < config.codec.refresh < fed.rounds


def client_fit(config: Config, layout: AdapterLayout, rows: public.PublicGradients | None, announced: Announcement) -> Codec:
    """A client's own fit of the announced codec. `rows`: public gradients of that round; no private data is touched.

    Raises as `fit_codec` does.
    """
    seed = announced.seed + announced.round
    prior = None if rows is None else priors.of_config(config, layout, rows.fit, priors.Past(), seed)
    return fit_codec(config, layout, prior, announced.size, announced.noise_std, seed)


def fit_codec(config: Config, layout: AdapterLayout, prior: GaussianPrior | None, size: int | None, noise_std: float, seed: int) -> Codec:
    """The config's codec of `size` numbers (None: what its family fixes), fitted to a prior.

    noise_std: DP noise of a mean code's number, in clip norms.
    Raises UserError where the prior does not suffice, RunStopped where fitting fails.
    """
    try:
        return _fit(config, layout, prior, size, noise_std, seed)
    except ValueError as error:  # public text that spans too few directions, say
        raise UserError(f"codec.family={config.codec.family}: {error}") from None
    except FloatingPointError as error:
        raise RunStopped(str(error)) from None


def whole(updates: Tensor) -> Tensor:
    """What is clipped with `noise_in: update`: the update itself."""
    return updates


def choose_size(
    config: Config,
    layout: AdapterLayout,
    prior: GaussianPrior,
    rows: public.PublicGradients,
    noise_std: float,
    seed: int,
    unit_examples: int,
    groups: int = 1,
) -> int:
    """`codec.code_size: auto`: the power of two that is expected to lose least to projection and noise, by held-out public gradients.

    Arguments as for `fit_codec`; unit_examples: examples of a typical unit, groups: clip groups, both for the clip norm.
    Raises UserError where the gradients tell nothing.
    """
    fitted, noise, signal = {}, {}, {}  # noise of one number of the mean code: it follows the clip norm, and that the code's length
    units = public.pseudo_units(rows, unit_examples)
    most = min(layout.size, MOST_CARRIED if carried(config) else MOST_AUTO)
    for size in (2**power for power in range(LEAST_AUTO, 30) if 2**power <= most):
        try:
            codec = fitted[size] = _fit(config, layout, prior, size, noise_std, seed)
        except ValueError:  # the prior spans no more directions
            break
        clipped = whole if config.privacy.noise_in == "update" else codec.encode
        norm = public.clip_norm(rows, clipped, config, unit_examples, groups)
        noise[size] = (noise_std * norm) ** 2
        within = (norm * groups**0.5 / clipped(units).double().norm(dim=1)).clamp(max=1)  # clipping shortens the signal too
        signal[size] = SIGNAL_SHARE * float((codec.metric(units).double().norm(dim=1) * within).square().mean())
    if not fitted:
        raise UserError(
            f"codec.code_size=auto: expected an update of {2**LEAST_AUTO} numbers or more and public gradients that span as many "
            f"directions (here {layout.size:,} and {len(rows.fit)} gradients); or a number in codec.code_size"
        )
    try:
        return code_size_auto(rows.fit, rows.held_out, noise.get, config.federation.rounds, list(fitted), signal.get, fitted.get)
    except ValueError as error:
        raise UserError(f"codec.code_size=auto: {error}; or a number in codec.code_size") from None


def _fit(config: Config, layout: AdapterLayout, prior: GaussianPrior | None, size: int | None, noise_std: float, seed: int) -> Codec:
    more: dict[str, Any] = {"parts": tuple(config.codec.parts)} if config.codec.family == "chain" else {}
    more |= {"steps": config.codec.fit_steps, "learning_rate": config.codec.fit_lr}
    return codecs.CODECS[config.codec.family].fit(prior, layout, size, noise_std, seed, **more)
