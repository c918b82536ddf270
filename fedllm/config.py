"""Reading the experiment config: YAML and `key=value` overrides into typed dataclasses. A wrong key or type is an error that names it."""

from __future__ import annotations

import difflib
import json
import operator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from fedllm.combinations import AGGREGATIONS, ENGINE_NAMES, PARALLEL_MODES, SERVER_OPTIMIZERS, check_engine, refuse_scaffold
from fedllm.errors import UserError
from fedllm.methods import METHODS, apply_method, check_method
from fedllm.schema import Config
from fedllm.validate import in_range, one_of


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and the method's parts, check it.

    Raises UserError (one line, with the nearest right key) for an unknown key, a wrong type or a combination that makes no sense.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        given = OmegaConf.load(path)
        for override in overrides:
            if "=" not in override or override.startswith("="):
                raise UserError(f"{override!r}: expected key=value, for example federation.rounds=20")
        extra = OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    if not OmegaConf.is_dict(given):
        raise UserError(f"{path}: expected a mapping of config keys, such as method: dr_encoder")
    for part, where in ((given, str(path)), (extra, "command line")):
        check_keys(OmegaConf.to_container(part), Config, where)
    try:
        check_before(OmegaConf.to_container(OmegaConf.merge(given, extra)))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given, extra))
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a mapping where the file has a list
        raise UserError(_wrong_type(error, path, given, extra)) from None
    asked = {key: operator.attrgetter(key)(config) for key in dotted(OmegaConf.to_container(extra))}
    own = dotted(OmegaConf.to_container(given)) if given.get("method") == config.method else ()
    config = apply_method(config, asked, own)
    check(config)
    return config


def check_keys(given: Any, schema: type, where: str, prefix: str = "") -> None:
    """Raise UserError with the nearest right key for any key the dataclass `schema` does not have."""
    known = {item.name: item for item in fields(schema)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise UserError(f"{where}: unknown config key {prefix}{key}; {hint}")
        factory = known[key].default_factory
        if is_dataclass(factory):
            if not isinstance(value, dict):
                first = f"{prefix}{key}.{fields(factory)[0].name}"
                raise UserError(f"{where}: {prefix}{key} expected a mapping, got {value!r}; set {first}, say")
            check_keys(value, factory, where, f"{prefix}{key}.")


def check_before(given: dict[str, Any]) -> None:
    """Raise UserError where what the types alone would say of a value does not tell what would be right. given: nested, not yet typed."""
    method, ranks = given.get("method", Config.method), given.get("lora", {}).get("r")
    if not isinstance(method, str | int | float):
        shown = f"{next(iter(method))}:" if isinstance(method, dict) and len(method) == 1 else json.dumps(method)
        raise UserError(f"method={shown}: expected one of {', '.join(METHODS)}")
    refuse_scaffold("method", str(method), METHODS)
    if isinstance(ranks, list):
        fixed = METHODS[method].parts if method in METHODS else {}
        aggregation = fixed.get("federation.aggregation", given.get("federation", {}).get("aggregation"))
        why = "stacking takes one rank here" if aggregation == "stack" else "adapters of mixed ranks have no average"
        raise UserError(f"lora.r={ranks}: expected one rank for all clients; {why}")


def dotted(given: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys of nested mappings, `section.key`."""
    inner = {f"{prefix}{key}": value for key, value in given.items()}
    return [key for name, value in inner.items() for key in (dotted(value, f"{name}.") if isinstance(value, dict) else [name])]


def check(config: Config) -> None:
    """Raise UserError for a value out of range, or a combination that makes no sense (combinations.py)."""
    fed, privacy, codec, task = config.federation, config.privacy, config.codec, config.task
    one_of("model.dtype", config.model.dtype, ("auto", "float32", "bfloat16"))
    one_of("task.kind", task.kind, ("labels", "classify", "text"))
    one_of("lora.train", config.lora.train, ("both", "b", "core"))
    one_of("lora.init", config.lora.init, ("random", "public"))
    one_of("federation.transport", fed.transport, ("simulation",))
    one_of("federation.partition.kind", fed.partition.kind, ("iid", "dirichlet", "column"))
    refuse_scaffold("federation.server.optimizer", fed.server.optimizer, SERVER_OPTIMIZERS)
    refuse_scaffold("federation.aggregation", fed.aggregation, AGGREGATIONS)
    one_of("federation.server.optimizer", fed.server.optimizer, SERVER_OPTIMIZERS)
    one_of("federation.server.space", fed.server.space, ("update", "code"))
    one_of("federation.server.schedule", fed.server.schedule, ("constant", "linear"))
    one_of("federation.aggregation", fed.aggregation, AGGREGATIONS)
    one_of("codec.bits", codec.bits, (8, 16, 32))
    one_of("privacy.unit", privacy.unit, ("client", "user", "example"))
    one_of("privacy.noise", privacy.noise, ("distributed", "local", "central"))
    one_of("privacy.noise_in", privacy.noise_in, ("code", "update"))
    one_of("privacy.clip.mode", privacy.clip.mode, ("fixed", "adaptive"))
    one_of("privacy.target.adversary", privacy.target.adversary, ("release", "server"))
    one_of("engine.name", config.engine.name, ENGINE_NAMES)
    one_of("parallel.mode", config.parallel.mode, PARALLEL_MODES)
    check_engine(config)
    in_range("federation.clients", fed.clients, 1)
    in_range("federation.rounds", fed.rounds, 1)
    in_range("federation.local.steps", fed.local.steps, 1)
    in_range("federation.local.lr", fed.local.lr, 0, open_low=True)
    in_range("federation.local.prox", fed.local.prox, 0)
    if fed.local.prox > 0 and fed.local.steps == 1:
        raise UserError(f"federation.local.prox={fed.local.prox:g}: expected 0 with one local step, which nothing draws back")
    if fed.local.batch is not None:
        in_range("federation.local.batch", fed.local.batch, 1)
    in_range("federation.server.lr", fed.server.lr, 0, open_low=True)
    in_range("federation.server.tau", fed.server.tau, 0, open_low=True)
    in_range("federation.server.momentum", fed.server.momentum, 0, 1, open_high=True)
    in_range("federation.partition.alpha", fed.partition.alpha, 0, open_low=True)
    in_range("lora.r", config.lora.r, 1)
    in_range("lora.alpha", config.lora.alpha, 0, open_low=True)
    in_range("task.eval_examples", task.eval_examples, 1)
    if task.train_examples is not None:
        in_range("task.train_examples", task.train_examples, 1)
    in_range("task.monitor_examples", task.monitor_examples, 1)
    in_range("task.max_length", task.max_length, 8)
    in_range("task.generate.count", task.generate.count, 1)
    in_range("task.generate.max_new_tokens", task.generate.max_new_tokens, 1)
    in_range("federation.warm_start.steps", fed.warm_start.steps, 0)
    in_range("federation.warm_start.lr", fed.warm_start.lr, 0, open_low=True)
    in_range("federation.warm_start.examples", fed.warm_start.examples, 1)
    in_range("engine.batch_tokens", config.engine.batch_tokens, 64)
    in_range("codec.refresh", codec.refresh, 0)
    in_range("codec.public_examples", codec.public_examples, 5)
    in_range("codec.public_memory", codec.public_memory, 0)
    in_range("codec.warmup_rounds", codec.warmup_rounds, 1)
    in_range("codec.warmup_public_steps", codec.warmup_public_steps, 0)
    in_range("codec.fit_steps", codec.fit_steps, 1)
    in_range("codec.fit_lr", codec.fit_lr, 0, open_low=True)
    if privacy.target.epsilon == float("inf"):
        raise UserError("privacy.target.epsilon=inf: expected a number above 0; privacy.enabled=false trains without privacy")
    in_range("privacy.target.epsilon", privacy.target.epsilon, 0, open_low=True)
    in_range("privacy.target.delta", privacy.target.delta, 0, 1, open_low=True, open_high=True)
    in_range("privacy.stage1_share", privacy.stage1_share, 0, 1, open_high=True)
    in_range("privacy.clip.quantile", privacy.clip.quantile, 0, 1, open_low=True, open_high=True)
    in_range("privacy.clip.lr", privacy.clip.lr, 0, open_low=True)
    in_range("privacy.clip.bit_multiplier", privacy.clip.bit_multiplier, 0.5, open_low=True)
    if len(fed.server.betas) != 2 or not all(0 <= beta < 1 for beta in fed.server.betas):
        raise UserError(f"federation.server.betas={fed.server.betas}: expected two numbers, 0 <= beta < 1")
    if config.seed is not None:
        in_range("seed", config.seed, 0, 2**62)
    norm = privacy.clip.norm
    if norm != "auto" and (isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm < float("inf")):
        raise UserError(f"privacy.clip.norm={norm}: expected auto or a number above 0")
    if privacy.unit == "client":
        if not 1 <= fed.expected_cohort <= fed.clients:
            raise UserError(
                f"federation.expected_cohort={fed.expected_cohort}: expected 1 <= expected_cohort <= {fed.clients}, the number of clients"
            )
        if fed.max_cohort is not None and not fed.expected_cohort <= fed.max_cohort <= fed.clients:
            raise UserError(
                f"federation.max_cohort={fed.max_cohort}: expected between expected_cohort={fed.expected_cohort} and clients={fed.clients}"
            )
    else:
        if fed.unit_sampling_rate is None:
            raise UserError(
                f"federation.unit_sampling_rate=null: expected a rate in (0, 1] with privacy.unit={privacy.unit}, or an expected_cohort "
                f"of 1 to {fed.clients}, the number of clients (here {fed.expected_cohort}), whose share of them it then is"
            )
        in_range("federation.unit_sampling_rate", fed.unit_sampling_rate, 0, 1, open_low=True)
        if privacy.unit == "user" and task.columns.user is None:
            raise UserError("task.columns.user: expected the column that names the user with privacy.unit=user, got null")
    if fed.partition.kind == "column" and task.columns.user is None:
        raise UserError("federation.partition.kind=column: expected task.columns.user, the column that names the client, got null")
    if not config.lora.targets:
        raise UserError("lora.targets=[]: expected the names of one linear layer or more, such as [q_proj,v_proj]")
    if task.public is not None and task.public == task.source:
        raise UserError(f"task.public={task.public}: expected a source other than the task's own; private text is never public")
    if task.public is None:
        if config.lora.init == "public":
            raise UserError("lora.init=public: expected task.public to take gradients of, got null")
        if codec.family != "identity":
            raise UserError(f"task.public: expected a source of public text for codec.prior={codec.prior}, got null")
        if privacy.enabled and norm == "auto":
            raise UserError("privacy.clip.norm=auto: expected task.public to take it from, or a number")
    check_method(config)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load_config` reads back."""
    from omegaconf import OmegaConf

    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _wrong_type(error: Exception, path: Path, given: Any, extra: Any) -> str:
    """One line on a value of the wrong type: where it stands, and what would be right. given, extra: of the file, of the command line."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError

    key = getattr(error, "full_key", None)
    expected = _EXPECTED.get(_type_of(key) if key else "")
    if expected is None or isinstance(error, InterpolationKeyError):
        return f"{path}: {key + ': ' if key else ''}{_first_line(error)}"
    asked = dotted(OmegaConf.to_container(extra))
    value = OmegaConf.select(extra if key in asked else given, key)
    shown = "null" if value is None else value
    return f"{'command line' if key in asked else path}: {key}={shown}: expected {expected}"


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a word or text",
    "list[str]": "a list in brackets, such as [q_proj,v_proj]",
    "list[float]": "a list of numbers in brackets, such as [0.9,0.999]",
}


def _type_of(key: str) -> str:
    """The type of a config key, `section.key`, as the schema writes it, without None."""
    part: Any = Config
    *sections, name = key.split(".")
    for section in sections:
        part = next((item.default_factory for item in fields(part) if item.name == section), None)
        if part is None or not is_dataclass(part):
            return ""
    return next((str(item.type).removesuffix(" | None") for item in fields(part) if item.name == name), "")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
