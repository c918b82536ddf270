"""The method table: each published system as a combination of parts, and the one allow-list of what combines with what."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from fedllm.errors import UserError
from fedllm.schema import GENERATED, Config
from fedllm.validate import one_of


@dataclass(frozen=True)
class Method:
    """A published system or a baseline.

    parts: config keys the method fixes, `section.key` -> value; all else stays the user's.
    """

    name: str
    summary: str
    parts: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known under its name."""
    METHODS[method.name] = method
    return method


register(Method("dr_encoder", "code, clip, noise in the code, decode the mean once (arXiv 2412.17053, corrected)"))
register(
    Method(
        "full_noise",
        "no codec: noise in all n coordinates",
        {"codec.family": "identity", "codec.code_size": None, "codec.bits": 8},
    )
)
register(
    Method(
        "fedit",
        "plain federated LoRA, no codec and no privacy",
        {"codec.family": "identity", "codec.code_size": None, "codec.bits": 32, "privacy.enabled": False},
    )
)

# What a codec may be fitted on. ROWS stands for public gradients, alone or mixed with what costs nothing either.
ROWS = "public[+released][+random]"
ROW_PARTS = ("public", "released", "random")
PRIORS_OF = {
    "linear": (ROWS, "moments"),
    "kronecker": (ROWS, "moments"),
    "coordinate": (ROWS, "moments"),
    "chain": (ROWS,),
    "autoencoder": ("moments", ROWS),
    "sketch": ("none",),
    "identity": ("none",),
    "topk": ("none",),
    "powersgd": ("none",),
}
FIXED_SIZE = ("autoencoder", "identity")  # families that fix the code's size
FREE_OF_PRIOR = ("sketch", "identity", "topk", "powersgd")
NOT_SUMMABLE = ("topk", "powersgd")  # a code stands for its own update alone: no sum of codes, hence no privacy


def apply_method(config: Config) -> Config:
    """The config with the parts that its method fixes.

    Raises UserError for a method that does not exist.
    """
    one_of("method", config.method, tuple(METHODS))
    config = copy.deepcopy(config)
    for key, value in METHODS[config.method].parts.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    if not config.privacy.enabled:
        config.codec.bits = 32  # without a clip there is no public range to lay a lattice over
    if config.codec.family in FREE_OF_PRIOR:
        config.codec.prior = "none"
    if config.codec.family in NOT_SUMMABLE:
        config.codec.decode = "each"
    return config


def check_combination(config: Config) -> None:
    """Raise UserError for parts that make no sense together."""
    codec, privacy, fed = config.codec, config.privacy, config.federation
    one_of("codec.family", codec.family, tuple(PRIORS_OF))
    check_prior(config)
    check_fit_at(config)
    check_public(config)
    if codec.family in FIXED_SIZE:
        if codec.code_size is not None:
            raise UserError(f"codec.code_size={codec.code_size}: expected null with codec.family={codec.family}, which fixes it")
    elif codec.code_size != "auto" and (not isinstance(codec.code_size, int) or isinstance(codec.code_size, bool) or codec.code_size < 1):
        shown = "null" if codec.code_size is None else codec.code_size
        raise UserError(f"codec.code_size={shown}: expected a number >= 1 or auto with codec.family={codec.family}")
    if codec.code_size == "auto" and (codec.prior == "moments" or codec.family in FREE_OF_PRIOR or not privacy.enabled):
        raise UserError(
            "codec.code_size=auto: expected codec.family linear, kronecker, coordinate or chain, a prior of public gradients, and "
            "privacy.enabled=true; without a spectrum or without noise there is nothing to weigh"
        )
    if codec.family in NOT_SUMMABLE and privacy.enabled:
        raise UserError(
            f"codec.family={codec.family}: expected privacy.enabled=false; its codes cannot be summed, and which numbers it keeps "
            "would be a release of its own"
        )
    if codec.error_feedback and privacy.enabled:
        raise UserError(
            "codec.error_feedback=true: expected false with privacy.enabled=true; the residual carries un-noised data into later "
            "messages, a release that no ledger has"
        )
    most = fit_rows(codec.public_examples)
    if codec.family in ("linear", "chain") and codec.prior == "public" and codec.code_size != "auto" and codec.code_size > most:
        raise UserError(
            f"codec.code_size={codec.code_size}: expected at most {most}, four fifths of "
            f"codec.public_examples={codec.public_examples} (the rest is held out for the clip norm)"
        )
    one_of("codec.decode", codec.decode, ("mean", "each"))
    if codec.decode == "each" and privacy.enabled:
        if privacy.noise != "local" or privacy.unit != "client":
            raise UserError(
                f"codec.decode=each: expected privacy.noise=local and privacy.unit=client (here {privacy.noise}, {privacy.unit}); "
                "a model that depends on every message is protected by each message's own noise alone"
            )
        if privacy.noise_in == "update" or privacy.clip.mode == "adaptive":
            raise UserError("codec.decode=each: expected privacy.noise_in=code and privacy.clip.mode=fixed")
    if privacy.enabled and privacy.noise_in == "update" and codec.family == "autoencoder":
        raise UserError(
            "privacy.noise_in=update: expected code with codec.family=autoencoder; a nonlinear encoder of noisy updates "
            "does not commute with the sum, so only the per-message guarantee would hold"
        )
    if privacy.enabled and privacy.clip.mode == "adaptive" and privacy.noise_in == "update":
        raise UserError("privacy.clip.mode=adaptive: expected fixed with privacy.noise_in=update")
    if privacy.enabled and privacy.noise == "central" and privacy.target.adversary == "server":
        raise UserError("privacy.target.adversary=server: expected release with privacy.noise=central, where the server is trusted")
    if privacy.enabled and privacy.noise == "central" and privacy.unit == "user" and codec.bits != 32:
        raise UserError(
            f"codec.bits={codec.bits}: expected 32 with privacy.noise=central and privacy.unit=user; "
            "rounding before the noise would need a second clip per user, which the server cannot do"
        )
    if privacy.unit == "user" and fed.partition.kind == "dirichlet":
        raise UserError("federation.partition.kind=dirichlet: expected iid or column with privacy.unit=user")


def check_prior(config: Config) -> None:
    """Raise UserError for a prior that its codec cannot use, or for weights that do not fit it."""
    codec = config.codec
    names, allowed = codec.prior.split("+"), PRIORS_OF[codec.family]
    of_rows = names[0] == "public" and len(set(names)) == len(names) and set(names) <= set(ROW_PARTS)
    if codec.prior not in allowed and not (of_rows and ROWS in allowed):
        raise UserError(f"codec.prior={codec.prior}: expected one of {', '.join(allowed)} with codec.family={codec.family}")
    if codec.weights is not None and (len(codec.weights) != len(names) or not all(0 <= weight < math.inf for weight in codec.weights)):
        raise UserError(f"codec.weights={codec.weights}: expected {len(names)} numbers >= 0, one a part of codec.prior={codec.prior}")
    if codec.weights is not None and codec.weights[0] == 0:
        raise UserError(f"codec.weights={codec.weights}: expected the first, of public gradients, above 0")


def check_fit_at(config: Config) -> None:
    """Raise UserError where clients would have to fit a codec to what they do not hold."""
    codec = config.codec
    one_of("codec.fit_at", codec.fit_at, ("server", "client"))
    if codec.fit_at == "client" and codec.prior == "moments":
        raise UserError("codec.fit_at=client: expected server with codec.prior=moments; clients do not hold the noisy moments of stage 1")
    if codec.fit_at == "client" and "released" in codec.prior.split("+"):
        raise UserError(
            f"codec.fit_at=client: expected server with codec.prior={codec.prior}; a client would need every code released so far "
            "and the codec that each was decoded with"
        )


def check_public(config: Config) -> None:
    """Raise UserError for labels or public text that the model cannot give, or too little text."""
    task, needed = config.task, config.codec.public_examples
    one_of("codec.public_labels", config.codec.public_labels, ("random", "model"))
    if config.codec.public_labels == "model" and task.kind == "text":
        raise UserError("codec.public_labels=model: expected random with task.kind=text, which has no labels")
    if task.public != GENERATED:
        return
    if task.kind == "classify":
        raise UserError(f"task.public={GENERATED}: expected a source of text with task.kind=classify, whose model writes none")
    if task.generate.count < needed:
        raise UserError(f"task.generate.count={task.generate.count}: expected at least codec.public_examples={needed}")


def fit_rows(public_examples: int) -> int:
    """How many of the public gradients fit the codec; the others are held out for the clip norm."""
    return public_examples - held_out_rows(public_examples)


def held_out_rows(public_examples: int) -> int:
    """A fifth of the public gradients, at least one."""
    return max(1, public_examples // 5)
