"""The method table: each published system as a combination of parts. What combines with what stands in combinations.py."""

from __future__ import annotations

import copy
import json
import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fedllm.combinations import check_combination, settle
from fedllm.errors import UserError
from fedllm.schema import Config
from fedllm.validate import one_of


@dataclass(frozen=True)
class Method:
    """A published system or a baseline.

    name: as papers call it; `name:variant` for another form of it. `:published` is the mechanism to the letter, the plain name the
    corrected one.
    parts: config keys the method fixes, `section.key` -> value; all else stays the user's.
    defaults: config keys that it sets like `parts`, but that somebody may ask for otherwise: by name, or in a file that names the method.
    claim: how the paper gets the epsilon that it states, for a method that is held to this figure; None: to the true one.
    """

    name: str
    summary: str
    parts: dict[str, Any] = field(default_factory=dict)
    claim: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known under its name."""
    METHODS[method.name] = method
    return method


NO_CODEC = {"codec.family": "identity", "codec.code_size": None}
UNSHRUNK = {"codec.shrink": False, "codec.bits": 32}  # what arrives is averaged as it is
FEDAVG = {"federation.server.optimizer": "fedavg", "federation.server.lr": 1.0, "federation.server.schedule": "constant"}
UPDATE_AT_ONCE = {"privacy.clip.of": "update", "privacy.clip.groups": "joint"}  # what the corrected forms correct
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
            "codec.fit_at": "server",
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
            "codec.fit_at": "server",
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
        NO_CODEC | UPDATE_AT_ONCE | {"federation.local.steps": 1, "privacy.noise": "local"},
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
        NO_CODEC | UPDATE_AT_ONCE | {"privacy.noise": "local"},
    )
)
register(
    Method(
        "dp_fedlora:published",
        # Averaged, as in most of the paper's experiments; its table has FedAvgM, FedAdagrad, FedYogi and FedAdam too, and it describes
        # stacking: federation.server.optimizer=fedyogi federation.server.lr=1e-2, federation.aggregation=stack.
        "every matrix of the adapter itself, not of its change, clipped and noised apart (arXiv 2509.09097)",
        NO_CODEC
        | UNSHRUNK
        | {
            "privacy.noise": "local",
            "privacy.clip.groups": "matrix",
            "privacy.clip.of": "state",
            "privacy.calibration": "classic",
        },
        PER_MATRIX,
        FEDAVG,
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
        {"codec.family": "allocation", "codec.code_size": None, "codec.prior": "moments", "codec.fit_at": "server"},
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


def apply_method(config: Config, asked: dict[str, Any] | None = None, own: Collection[str] = ()) -> Config:
    """The config with the parts that its method fixes.

    asked: config keys, `section.key` -> value, that somebody asked for by name: these a method may not replace. What stands in a config
    file it does replace, so that one file serves every method. own: keys of a file that names this very method, such as a run's own
    config.yaml: its defaults do not replace these.
    Raises UserError for a method, or a variant of one, that does not exist, and for a key asked for that it fixes otherwise.
    """
    base = config.method.partition(":")[0]
    forms = [name for name in METHODS if name.partition(":")[0] == base]
    if config.method not in METHODS and len(forms) == 1:
        raise UserError(f"method={config.method}: expected {base}, which has one form alone")
    one_of("method", config.method, forms or tuple(METHODS))
    config = copy.deepcopy(config)
    method = METHODS[config.method]
    defaults = {key: value for key, value in method.defaults.items() if key not in (asked or {}) and key not in own}
    for key, value in (method.parts | defaults).items():
        if asked and asked.get(key, value) != value:
            other, fixed = (json.dumps(item).strip('"') for item in (asked[key], value))  # as one writes it in the config: null, true
            raise UserError(f"{key}={other}: method={config.method} fixes {key}={fixed}; leave it out or take another method")
        *sections, name = key.split(".")
        part = config
        for section in sections:
            part = getattr(part, section)
        setattr(part, name, value)
    settle(config)
    for key in ("codec.prior", "codec.decode", "federation.server.space"):  # what other parts leave no choice about, `settle` has undone
        value = operator.attrgetter(key)(config)
        if asked and asked.get(key, value) != value:
            raise UserError(
                f"{key}={asked[key]}: expected {value} with method={config.method}, codec.family={config.codec.family}, "
                f"codec.decode={config.codec.decode}, federation.aggregation={config.federation.aggregation}, "
                f"federation.server.optimizer={config.federation.server.optimizer}"
            )
    return config


def claim_of(config: Config) -> dict[str, Any] | None:
    """The epsilon a published method states of itself, {epsilon, delta, against, statement}; None where the true one is what is promised.

    against: the adversaries it is stated for, who see the model (release) or every message too (server, where clients add the noise).
    """
    statement, target = METHODS[config.method].claim, config.privacy.target
    if statement is None or not config.privacy.enabled:
        return None
    against = ["release"] if config.privacy.noise == "central" else ["release", "server"]
    return {"epsilon": target.epsilon, "delta": target.delta, "against": against, "statement": statement}


def check_method(config: Config) -> None:
    """Raise UserError for parts that make no sense together, or that only a published claim may have."""
    check_combination(config, claim_of(config) is not None)
