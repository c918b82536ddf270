"""The method table: each published system as a combination of parts, and the one allow-list of what combines with what."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from fedllm.errors import UserError
from fedllm.privacy.claims import CALIBRATIONS, EXACT, SOUND
from fedllm.privacy.groups import GROUPS, JOINT
from fedllm.schema import GENERATED, Config
from fedllm.validate import in_range, one_of


@dataclass(frozen=True)
class Method:
    """A published system or a baseline.

    name: as papers call it; `name:variant` for another form of it. `:published` is the mechanism to the letter, the plain name the
    corrected one.
    parts: config keys the method fixes, `section.key` -> value; all else stays the user's.
    claim: how the paper gets the epsilon that it states, for a method that is held to this figure; None: to the true one.
    """

    name: str
    summary: str
    parts: dict[str, Any] = field(default_factory=dict)
    claim: str | None = None


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known under its name."""
    METHODS[method.name] = method
    return method


NO_CODEC = {"codec.family": "identity", "codec.code_size": None}
UNSHRUNK = {"codec.shrink": False, "codec.bits": 32}  # what arrives is averaged as it is
FEDAVG = {"federation.server.optimizer": "fedavg", "federation.server.lr": 1.0, "federation.server.schedule": "constant"}
PER_MATRIX = "sigma = C sqrt(2 ln(1.25/delta))/epsilon for each matrix in each round; matrices, rounds and replacement are not composed"

register(Method("dr_encoder", "code, clip, noise in the code, decode the mean once (arXiv 2412.17053, corrected)"))
register(
    Method(
        "dr_encoder:published",
        "auto-encoder of moments that nothing protects, every message decoded (arXiv 2412.17053)",
        {
            "codec.family": "autoencoder",
            "codec.code_size": None,
            "codec.prior": "moments",
            "codec.decode": "each",
            "privacy.noise": "local",
            "privacy.calibration": "gdp",
            "privacy.stage1_share": 0.0,
        }
        | UNSHRUNK,
        "Gaussian DP by the central limit theorem over the rounds of stage 2; the statistics of stage 1 are not counted",
    )
)
register(Method("full_noise", "no codec: noise in all n coordinates", NO_CODEC | {"codec.bits": 8}))
register(Method("fedit", "plain federated LoRA, no codec and no privacy", NO_CODEC | {"codec.bits": 32, "privacy.enabled": False}))
register(
    Method(
        "cg_fedllm",
        "auto-encoder of public gradients, mean code decoded once (arXiv 2405.13746, corrected)",
        {"codec.family": "autoencoder", "codec.code_size": None, "codec.prior": "public", "codec.decode": "mean"},
    )
)
register(
    Method(
        "cg_fedllm:published",
        "auto-encoder of clients' raw gradients, every message decoded, weighted by examples (arXiv 2405.13746)",
        {
            "codec.family": "autoencoder",
            "codec.code_size": None,
            "codec.prior": "real",
            "codec.refresh": 0,
            "codec.decode": "each",
            "federation.weights": "examples",
            "privacy.noise": "local",
            "privacy.clip.norm": 1.0,
            "privacy.calibration": "gdp",
        }
        | UNSHRUNK,
        "Gaussian DP by the central limit theorem at sensitivity 1; what the auto-encoder has learnt is not counted",
    )
)
register(
    Method(
        "dp_lora",
        "clients noise their own clipped gradient, one joint clip of A and B (arXiv 2312.17493, corrected)",
        NO_CODEC | {"federation.local.steps": 1, "privacy.noise": "local"},
    )
)
register(
    Method(
        "dp_lora:published",
        "A and B of every layer clipped and noised apart, weighted by examples (arXiv 2312.17493)",
        NO_CODEC
        | UNSHRUNK
        | {
            "federation.local.steps": 1,
            "federation.weights": "examples",
            "privacy.noise": "local",
            "privacy.clip.groups": "matrix",
            "privacy.calibration": "classic",
        },
        PER_MATRIX,
    )
)
register(
    Method(
        "dp_fedlora",
        "clients noise their own adapter's change, one joint clip (arXiv 2509.09097, corrected)",
        NO_CODEC | {"privacy.noise": "local"},
    )
)
register(
    Method(
        "dp_fedlora:published",
        # Averaged, as in the paper's experiments; it describes stacking too: federation.aggregation=stack.
        "every matrix of the adapter itself, not of its change, clipped and noised apart (arXiv 2509.09097)",
        NO_CODEC
        | UNSHRUNK
        | FEDAVG
        | {
            "privacy.noise": "local",
            "privacy.clip.groups": "matrix",
            "privacy.clip.of": "state",
            "privacy.calibration": "classic",
        },
        PER_MATRIX,
    )
)
register(Method("ffa_lora", "A stays at its start: exact averaging, half the upload (arXiv 2403.12313)", NO_CODEC | {"lora.train": "b"}))
register(
    Method(
        "fed_sb",
        "r x r numbers between fixed A and B of public gradients: exact averaging (arXiv 2502.15436)",
        NO_CODEC | {"lora.train": "core", "lora.init": "public"},
    )
)
EXACT_PRODUCT = NO_CODEC | FEDAVG | {"privacy.noise": "local"}
register(
    Method(
        "flora",
        "clients' products stacked into the frozen weights, each message noised for itself (arXiv 2409.05976)",
        EXACT_PRODUCT | {"federation.aggregation": "stack"},
    )
)
register(
    Method(
        "fedex_lora",
        "A and B averaged, what the average misses put into the frozen weights (arXiv 2410.09432)",
        EXACT_PRODUCT | {"federation.aggregation": "residual"},
    )
)
register(
    Method(
        "anadp",
        "more room for factors of larger private moments, less noise for them (after arXiv 2410.02912)",
        {"codec.family": "allocation", "codec.code_size": None, "codec.prior": "moments"},
    )
)
DP_SGD = NO_CODEC | {"federation.local.steps": 1, "privacy.unit": "example", "privacy.noise": "central", "codec.bits": 32}
register(Method("ew_tune", "example-level DP-SGD on the adapter by one trusted trainer (arXiv 2210.15042, corrected)", DP_SGD))
register(
    Method(
        "ew_tune:published",
        "the same, with the noise that the first-order Edgeworth estimate asks for (arXiv 2210.15042)",
        DP_SGD | UNSHRUNK | {"privacy.calibration": "edgeworth_1"},
        "Edgeworth accountant, first-order estimate without its error bound",
    )
)
register(Method("user_level", "users inside a few large clients, no codec (arXiv 2407.07737)", NO_CODEC | {"privacy.unit": "user"}))
register(
    Method(
        "example_level",
        "examples inside a few large clients, no codec (arXiv 2407.07737)",
        NO_CODEC | {"federation.local.steps": 1, "privacy.unit": "example"},
    )
)

# What a codec may be fitted on. ROWS stands for public gradients, alone or mixed with what costs nothing either.
ROWS = "public[+released][+random]"
ROW_PARTS = ("public", "released", "random")
REAL = "real"  # clients' own raw gradients: wherever rows may stand, but never private
PRIORS_OF = {
    "linear": (ROWS, "moments", REAL),
    "kronecker": (ROWS, "moments", REAL),
    "coordinate": (ROWS, "moments", REAL),
    "allocation": ("moments", ROWS, REAL),
    "chain": (ROWS, REAL),
    "autoencoder": ("moments", ROWS, REAL),
    "sketch": ("none",),
    "identity": ("none",),
    "topk": ("none",),
    "powersgd": ("none",),
}
CHAINS = (("coordinate", "allocation", "kronecker"), ("linear", "coordinate"))  # what may stand first and second in codec.parts
FIXED_SIZE = ("autoencoder", "identity", "allocation")  # families that fix the code's size
FREE_OF_PRIOR = ("sketch", "identity", "topk", "powersgd")
NOT_SUMMABLE = ("topk", "powersgd")  # a code stands for its own update alone: no sum of codes, hence no privacy

SERVER_OPTIMIZERS = ("sgd", "momentum", "adam", "adagrad", "yogi", "fedavg", "fedavgm", "fedadam", "fedadagrad", "fedyogi")
AVERAGING = ("sgd", "fedavg")  # server optimisers that with lr 1 are the plain average
AGGREGATIONS = ("mean", "stack", "residual")
SCAFFOLD = (
    "its control variates are a second release of every client's data in each round, which no ledger entry pays for; "
    "expected one of {}, or federation.local.prox against client drift"
)


def apply_method(config: Config) -> Config:
    """The config with the parts that its method fixes.

    Raises UserError for a method, or a variant of one, that does not exist.
    """
    base = config.method.partition(":")[0]
    one_of("method", config.method, [name for name in METHODS if name.partition(":")[0] == base] or tuple(METHODS))
    config = copy.deepcopy(config)
    for key, value in METHODS[config.method].parts.items():
        *sections, name = key.split(".")
        part = config
        for section in sections:
            part = getattr(part, section)
        setattr(part, name, value)
    if not config.privacy.enabled:
        config.codec.bits = 32  # without a clip there is no public range to lay a lattice over
    if config.codec.family in FREE_OF_PRIOR:
        config.codec.prior = "none"
    if config.codec.family in NOT_SUMMABLE or config.federation.aggregation != "mean":
        config.codec.decode = "each"
    return config


def claim_of(config: Config) -> dict[str, Any] | None:
    """The epsilon a published method states of itself, {epsilon, delta, statement}; None where the true one is what is promised."""
    statement, target = METHODS[config.method].claim, config.privacy.target
    if statement is None or not config.privacy.enabled:
        return None
    return {"epsilon": target.epsilon, "delta": target.delta, "statement": statement}


def check_combination(config: Config) -> None:
    """Raise UserError for parts that make no sense together."""
    codec, privacy, fed = config.codec, config.privacy, config.federation
    one_of("codec.family", codec.family, tuple(PRIORS_OF))
    check_prior(config)
    check_fit_at(config)
    check_public(config)
    check_mechanism(config)
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
    check_aggregation(config)
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
    if privacy.enabled and privacy.noise == "central" and privacy.unit != "client" and codec.bits != 32:
        raise UserError(
            f"codec.bits={codec.bits}: expected 32 with privacy.noise=central and privacy.unit={privacy.unit}; "
            f"rounding before the noise would need a second clip per {privacy.unit}, which the server cannot do"
        )
    if privacy.unit == "example" and fed.local.steps != 1:
        raise UserError(f"federation.local.steps={fed.local.steps}: expected 1 with privacy.unit=example, whose unit is one gradient")
    if privacy.unit != "client" and (codec.family in NOT_SUMMABLE or codec.error_feedback):
        raise UserError(
            f"privacy.unit={privacy.unit}: expected client with codec.family={codec.family}, codec.error_feedback={codec.error_feedback}; "
            "a client of several units sends the sum of their codes"
        )
    if privacy.unit == "user" and fed.partition.kind == "dirichlet":
        raise UserError("federation.partition.kind=dirichlet: expected iid or column with privacy.unit=user")


def check_mechanism(config: Config) -> None:
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
    published = claim_of(config) is not None
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
    """Raise UserError for parts that an aggregation of products cannot have."""
    fed = config.federation
    where, server = f"federation.aggregation={fed.aggregation}", fed.server
    if fed.aggregation == "mean":
        return
    if config.lora.train != "both":
        raise UserError(f"{where}: expected lora.train=both, not {config.lora.train}, with which the plain mean is exact already")
    if server.optimizer not in AVERAGING or server.lr != 1:
        raise UserError(
            f"{where}: expected federation.server.optimizer=fedavg and federation.server.lr=1 (here {server.optimizer}, {server.lr:g}); "
            "the sum of the clients' products leaves nothing for another optimiser to do"
        )
    if config.privacy.unit != "client":
        raise UserError(f"{where}: expected privacy.unit=client, not {config.privacy.unit}; a product is made of one client's adapter")
    if config.privacy.enabled and config.privacy.noise != "local":
        raise UserError(f"{where}: expected privacy.noise=local, not {config.privacy.noise}; the model depends on every message")
    if fed.aggregation == "stack" and config.lora.init == "public":
        raise UserError(f"{where}: expected lora.init=random; after each round A begins at random again")


def refuse_scaffold(config: Config) -> None:
    """Raise UserError where SCAFFOLD is asked for."""
    fed = config.federation
    asked = {"server.optimizer": (fed.server.optimizer, SERVER_OPTIMIZERS), "aggregation": (fed.aggregation, AGGREGATIONS)}
    for key, (value, allowed) in asked.items():
        if value.lower() == "scaffold":
            raise UserError(f"federation.{key}={value}: {SCAFFOLD.format(', '.join(allowed))}")


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
