"""The one allow-list of what combines with what."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from fedllm.errors import UserError
from fedllm.privacy.claims import CALIBRATIONS, EXACT, SOUND
from fedllm.privacy.groups import GROUPS, JOINT
from fedllm.schema import GENERATED, LABEL, Config
from fedllm.validate import in_range, one_of

# What a codec may be fitted on. ROWS stands for public gradients, alone or mixed with what costs nothing either.
ROWS = "public[+released][+random]"
ROW_PARTS = ("public", "released", "random")
REAL = "real"  # clients' own raw gradients: wherever rows may stand, but never private
CHAINS = (("coordinate", "allocation", "kronecker"), ("linear", "coordinate"))  # what may stand first and second in codec.parts
SERVER_OPTIMIZERS = ("sgd", "momentum", "adam", "adagrad", "yogi", "fedavg", "fedavgm", "fedadam", "fedadagrad", "fedyogi")
ENGINE_NAMES = ("torch", "deepspeed")
PARALLEL_MODES = ("none", "clients", "data")
AVERAGING = ("sgd", "fedavg")  # server optimisers that with lr 1 are the plain average
AGGREGATIONS = ("mean", "stack", "residual")
SCAFFOLD = (
    "its control variates are a second release of every client's data in each round, which no ledger entry would pay for, so it is not "
    "built; expected one of {}, or federation.local.prox against client drift"
)


def family_of(name: str) -> Any:
    """The codec class of a family. Raises UserError for a family that nobody registered."""
    from dr_encoder.codecs import CODECS  # torch comes with it, which what reads no config need not wait for

    one_of("codec.family", name, tuple(sorted(CODECS)))
    return CODECS[name]


def priors_of(family: str) -> tuple[str, ...]:
    """Values of codec.prior that a family may be fitted on."""
    fits = family_of(family).fits
    return (*(ROWS if kind == "rows" else kind for kind in fits), *((REAL,) if "rows" in fits else ())) or ("none",)


def settle(config: Config) -> None:
    """Set, in place, what other parts leave no choice about, or what they stand for where nothing is said."""
    fed = config.federation
    if config.privacy.unit != "client" and fed.unit_sampling_rate is None and 1 <= fed.expected_cohort <= fed.clients:
        fed.unit_sampling_rate = fed.expected_cohort / fed.clients  # in a round as large a share of the units as of clients otherwise
    if not config.privacy.enabled:
        config.codec.bits = 32  # without a clip there is no public range to lay a lattice over
    family = family_of(config.codec.family)
    if not family.fits:
        config.codec.prior = "none"
    if not family.summable or config.federation.aggregation != "mean":
        config.codec.decode = "each"
    if not steps_in_code(config):
        fed.server.space = "update"


def steps_in_code(config: Config) -> bool:
    """Whether the server may step along codes: a projection, decoded once, and Adam. (With all n numbers it would be Adam as it is.)"""
    codec, fed = config.codec, config.federation
    projection = codec.family == "chain" or (family_of(codec.family).orthonormal and codec.family != "identity")
    one_code = projection and codec.decode == "mean" and codec.prior != "moments"
    return one_code and fed.server.optimizer == "adam" and config.privacy.clip.of == "update"


def check_combination(config: Config, published: bool) -> None:
    """Raise UserError for parts that make no sense together. published: whether the method is held to its paper's claim alone."""
    codec, privacy, fed = config.codec, config.privacy, config.federation
    family = family_of(codec.family)
    check_prior(config)
    check_fit_at(config)
    check_public(config)
    check_mechanism(config, published)
    if family.fixed_size:
        if codec.code_size is not None:
            raise UserError(f"codec.code_size={codec.code_size}: expected null with codec.family={codec.family}, which fixes it")
    elif codec.code_size != "auto" and (not isinstance(codec.code_size, int) or isinstance(codec.code_size, bool) or codec.code_size < 1):
        shown = "null" if codec.code_size is None else codec.code_size
        raise UserError(f"codec.code_size={shown}: expected a number >= 1 or auto with codec.family={codec.family}")
    if codec.code_size == "auto" and (codec.prior == "moments" or not family.fits or not privacy.enabled):
        raise UserError(
            "codec.code_size=auto: expected codec.family linear, kronecker, coordinate or chain, a prior of public gradients, and "
            "privacy.enabled=true; without a spectrum or without noise there is nothing to weigh"
        )
    if not family.summable and privacy.enabled:
        raise UserError(
            f"codec.family={codec.family}: expected privacy.enabled=false; its codes cannot be summed, and which numbers it keeps "
            "would be a release of its own"
        )
    if codec.error_feedback and privacy.enabled:
        raise UserError(
            "codec.error_feedback=true: expected false with privacy.enabled=true; the residual carries un-noised data into later "
            "messages, a release that no ledger has"
        )
    if codec.family == "chain" and not (len(codec.parts) == 2 and codec.parts[0] in CHAINS[0] and codec.parts[1] in CHAINS[1]):
        first, second = (" or ".join(names) for names in CHAINS)
        raise UserError(f"codec.parts={codec.parts}: expected two families, {first}, then {second}")
    most = fit_rows(codec.public_examples)
    if codec.family in ("linear", "chain") and codec.prior == "public" and codec.code_size != "auto" and codec.code_size > most:
        raise UserError(
            f"codec.code_size={codec.code_size}: expected at most {most}, four fifths of "
            f"codec.public_examples={codec.public_examples} (the rest is held out for the clip norm)"
        )
    one_of("codec.decode", codec.decode, ("mean", "each"))
    if codec.decode == "each" and "released" in codec.prior.split("+"):
        raise UserError(f"codec.decode=each: expected mean with codec.prior={codec.prior}; a prior of released codes is one of noisy means")
    check_aggregation(config)
    if codec.decode == "each" and privacy.enabled:
        if privacy.noise != "local" or privacy.unit != "client":
            raise UserError(
                f"codec.decode=each: expected privacy.noise=local and privacy.unit=client (here {privacy.noise}, {privacy.unit}); "
                "a model that depends on every message is protected by each message's own noise alone"
            )
        if privacy.noise_in == "update" or privacy.clip.mode == "adaptive":
            raise UserError("codec.decode=each: expected privacy.noise_in=code and privacy.clip.mode=fixed")
    # Noise before such an encoder is another noise in the code than what the server adds.
    bent = [name for name in (codec.parts if codec.family == "chain" else [codec.family]) if not family_of(name).orthonormal]
    if privacy.enabled and privacy.noise_in == "update" and bent:
        raise UserError(
            f"privacy.noise_in=update: expected code with codec.family={codec.family}; {bent[0]} is no orthonormal code, so it can "
            "lengthen a clipped update, and the noise that the server adds for absent shares would be too little"
        )
    if privacy.enabled and privacy.clip.mode == "adaptive" and privacy.noise_in == "update":
        raise UserError("privacy.clip.mode=adaptive: expected fixed with privacy.noise_in=update")
    if privacy.enabled and privacy.noise == "central" and privacy.target.adversary == "server":
        raise UserError("privacy.target.adversary=server: expected release with privacy.noise=central, where the server is trusted")
    if privacy.enabled and privacy.noise == "central" and privacy.unit != "client" and codec.bits != 32:
        raise UserError(
            f"codec.bits={codec.bits}: expected 32 with privacy.noise=central and privacy.unit={privacy.unit}; "
            f"rounding before the noise would need a second clip per {privacy.unit}, which the server cannot do"
        )
    if privacy.enabled and privacy.noise == "central" and privacy.unit != "client" and privacy.noise_in == "update":
        raise UserError(
            f"privacy.noise_in=update: expected code with privacy.noise=central and privacy.unit={privacy.unit}; "
            f"a sum of {privacy.unit}s that is encoded before the noise is rounded before it"
        )
    if privacy.unit == "example" and fed.local.steps != 1:
        raise UserError(f"federation.local.steps={fed.local.steps}: expected 1 with privacy.unit=example, whose unit is one gradient")
    if privacy.unit != "client" and fed.local.batch is not None:
        raise UserError(f"federation.local.batch={fed.local.batch}: expected null with privacy.unit={privacy.unit}, whose units are drawn")
    if privacy.unit != "client" and (not family.summable or codec.error_feedback):
        raise UserError(
            f"privacy.unit={privacy.unit}: expected client with codec.family={codec.family}, codec.error_feedback={codec.error_feedback}; "
            "a client of several units sends the sum of their codes"
        )
    if privacy.unit == "user" and fed.partition.kind == "dirichlet":
        raise UserError("federation.partition.kind=dirichlet: expected iid or column with privacy.unit=user")


def check_mechanism(config: Config, published: bool) -> None:
    """Raise UserError for a clip, a noise formula or weights that do not fit the rest, or that only a published claim may have."""
    codec, privacy, clip, weights = config.codec, config.privacy, config.privacy.clip, config.federation.weights
    one_of("privacy.clip.groups", clip.groups, tuple(GROUPS))
    one_of("privacy.clip.of", clip.of, ("update", "state"))
    one_of("privacy.calibration", privacy.calibration, CALIBRATIONS)
    one_of("federation.weights", weights, ("uniform", "examples"))
    in_range("codec.real_share", codec.real_share, 0, 1, open_low=True)
    if weights != "uniform" and privacy.unit != "client":
        raise UserError(f"federation.weights={weights}: expected uniform with privacy.unit={privacy.unit}; a client sends its units' sum")
    if not privacy.enabled:
        return
    if clip.groups != JOINT and (clip.mode == "adaptive" or (codec.family != "identity" and privacy.noise_in != "update")):
        raise UserError(
            f"privacy.clip.groups={clip.groups}: expected privacy.clip.mode=fixed, and codec.family=identity or privacy.noise_in=update; "
            "groups are coordinates of the update"
        )
    if clip.of == "state" and (codec.family != "identity" or privacy.noise_in == "update" or clip.mode == "adaptive"):
        raise UserError("privacy.clip.of=state: expected codec.family=identity, privacy.noise_in=code and privacy.clip.mode=fixed")
    noised_moments = codec.prior == "moments" and privacy.stage1_share > 0
    if privacy.calibration != EXACT and (noised_moments or (privacy.target.adversary == "server" and not published)):
        raise UserError(
            f"privacy.calibration={privacy.calibration}: expected {EXACT} with codec.prior={codec.prior} and "
            f"privacy.target.adversary={privacy.target.adversary}; the others solve for one kind of release alone"
        )
    if codec.prior == "moments" and not noised_moments and not published:
        raise UserError("privacy.stage1_share=0: expected a share above 0 with codec.prior=moments; moments without noise are a release")
    if privacy.calibration not in SOUND and not published:
        raise UserError(
            f"privacy.calibration={privacy.calibration}: expected one of {', '.join(SOUND)}, or a :published method; "
            "its noise can be too little for the target"
        )
    if codec.prior == REAL and not published:
        raise UserError(f"codec.prior={REAL}: expected another with privacy.enabled=true; its training set is a release without noise")
    if weights != "uniform" and not published:
        raise UserError(
            f"federation.weights={weights}: expected uniform with privacy.enabled=true; the heaviest client would move the sum most, "
            "which only a :published method may claim otherwise"
        )
    if weights != "uniform" and (privacy.noise != "local" or (codec.decode == "each" and codec.prior != REAL)):
        raise UserError(
            f"federation.weights={weights}: expected privacy.noise=local and codec.decode=mean; a stand-in for an absent client would show "
            "by its weight"
        )


def check_aggregation(config: Config) -> None:
    """Raise UserError for parts that an aggregation cannot have, products or the plain average."""
    fed = config.federation
    where, server = f"federation.aggregation={fed.aggregation}", fed.server
    if fed.aggregation == "mean":
        if server.optimizer == "fedavg" and server.lr != 1:
            raise UserError(
                f"federation.server.optimizer=fedavg: expected federation.server.lr=1 with it, the plain average, not {server.lr:g}; "
                "sgd takes any rate"
            )
        return
    if config.lora.train != "both":
        raise UserError(f"{where}: expected lora.train=both, not {config.lora.train}, with which the plain mean is exact already")
    if server.optimizer not in AVERAGING or server.lr != 1 or server.schedule != "constant":
        raise UserError(
            f"{where}: expected federation.server.optimizer=fedavg, lr=1 and schedule=constant (here {server.optimizer}, {server.lr:g}, "
            f"{server.schedule}); the sum of the clients' products leaves nothing for another optimiser to do"
        )
    if config.privacy.unit != "client":
        raise UserError(f"{where}: expected privacy.unit=client, not {config.privacy.unit}; a product is made of one client's adapter")
    if config.privacy.enabled and config.privacy.noise != "local":
        raise UserError(f"{where}: expected privacy.noise=local, not {config.privacy.noise}; the model depends on every message")
    if fed.aggregation == "stack" and config.lora.init == "public":
        raise UserError(f"{where}: expected lora.init=random; after each round A begins at random again")


def check_engine(config: Config) -> None:
    """Raise UserError for ranks that no engine lets work together, or parts that one of several ranks cannot have."""
    engine, mode = config.engine, config.parallel.mode
    if engine.name != "deepspeed":
        if engine.deepspeed is not None:
            raise UserError(f"engine.deepspeed={engine.deepspeed}: expected engine.name=deepspeed with it, not {engine.name}")
        if mode == "data":
            raise UserError(f"parallel.mode=data: expected engine.name=deepspeed, not {engine.name}; through it ranks share a client")
        return
    if engine.deepspeed is None:
        raise UserError("engine.name=deepspeed: expected engine.deepspeed, such as configs/deepspeed/zero2.json, got null")
    if mode not in ("none", "data"):
        raise UserError(f"engine.name=deepspeed: expected parallel.mode=data, not {mode}; or engine.name=torch")
    if config.federation.aggregation != "mean":
        raise UserError(
            f"federation.aggregation={config.federation.aggregation}: expected mean with engine.name=deepspeed; its dense matrices are "
            "on one rank alone"
        )
    if config.lora.init != "random":
        raise UserError(f"lora.init={config.lora.init}: expected random with engine.name=deepspeed; no rank sees all gradients")


def refuse_scaffold(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UserError where SCAFFOLD is asked for. allowed: what `key` may be."""
    if value.lower() == "scaffold":
        raise UserError(f"{key}={value}: {SCAFFOLD.format(', '.join(allowed))}")


def check_prior(config: Config) -> None:
    """Raise UserError for a prior that its codec cannot use, or for weights that do not fit it."""
    codec = config.codec
    names, allowed = codec.prior.split("+"), priors_of(codec.family)
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
    if codec.fit_at == "client" and codec.prior == REAL:
        raise UserError(f"codec.fit_at=client: expected server with codec.prior={REAL}; clients do not hold one another's gradients")
    if codec.fit_at == "client" and codec.public_memory > 0:
        raise UserError(
            f"codec.fit_at=client: expected server with codec.public_memory={codec.public_memory}; a client that comes new "
            "has not seen the earlier models"
        )
    if codec.fit_at == "client" and "released" in codec.prior.split("+"):
        raise UserError(
            f"codec.fit_at=client: expected server with codec.prior={codec.prior}; a client would need every code released so far "
            "and the codec that each was decoded with"
        )


def check_public(config: Config) -> None:
    """Raise UserError for labels or public text that the model cannot give, too little text, or gradients kept for no prior."""
    task, needed, memory = config.task, config.codec.public_examples, config.codec.public_memory
    if memory > 0 and "public" not in config.codec.prior.split("+"):
        raise UserError(f"codec.public_memory={memory}: expected 0 with codec.prior={config.codec.prior}, which has no public gradients")
    labels = config.codec.public_labels
    one_of("codec.public_labels", labels, ("random", "model", "given"))
    if labels != "random" and task.kind == "text":
        raise UserError(f"codec.public_labels={labels}: expected random with task.kind=text, which has no labels")
    asked = task.public == GENERATED and LABEL in task.generate.prompt
    if labels == "given" and not asked:
        raise UserError(f"codec.public_labels=given: expected task.public={GENERATED} and {LABEL} in task.generate.prompt")
    if LABEL in task.generate.prompt and task.kind == "text":
        raise UserError(f"task.generate.prompt: expected no {LABEL} with task.kind=text, which has no labels")
    if config.federation.warm_start.steps and task.public is None:
        raise UserError("federation.warm_start.steps: expected 0 without task.public")
    if config.federation.warm_start.steps and task.kind != "text" and labels != "given":
        raise UserError(f"federation.warm_start.steps: expected codec.public_labels=given, not {labels}, which teaches nothing")
    if task.public != GENERATED:
        return
    if task.kind == "classify" and task.generate.model is None:
        raise UserError(f"task.public={GENERATED}: expected task.generate.model with task.kind=classify, whose own model writes no text")
    if task.generate.count < needed:
        raise UserError(f"task.generate.count={task.generate.count}: expected at least codec.public_examples={needed}")


def fit_rows(public_examples: int) -> int:
    """How many of the public gradients fit the codec; the others are held out for the clip norm."""
    return public_examples - held_out_rows(public_examples)


def held_out_rows(public_examples: int) -> int:
    """A fifth of the public gradients, at least one."""
    return max(1, public_examples // 5)
