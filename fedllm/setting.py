"""From a config to what a run works on: the model, the encoded examples, the clients and their units."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from fedllm.data import generated, prompts, sources
from fedllm.data.partition import Partition, make_partition
from fedllm.errors import UserError
from fedllm.monitor import Display, Phase
from fedllm.schema import GENERATED, Config
from fedllm.training.engine import Encoded, Engine
from fedllm.training.engines import ENGINES
from fedllm.training.objectives import ClassHead, LabelWords, NextToken
from fedllm.training.public_start import public_start

PARTITION_SEED = 0  # the same in every run: a client then is the same client in all of them, and their costs compose


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, and by whom.

    train is private (one part a client); test and public are public by statement. fixed: LoRA factors that are neither trained nor
    drawn from the seed, by name.
    """

    engine: Engine
    tokenizer: object
    train: Encoded
    test: Encoded
    public: Encoded | None
    partition: Partition
    fixed: dict[str, Tensor] = field(default_factory=dict)


def build(config: Config, public_seed: int, adapter: Path | None = None, phase: Phase | None = None) -> Setting:
    """Load the model and the data, and split the data over clients.

    public_seed: of LoRA's start and the choice of public examples. adapter: folder of a saved adapter to look at;
    no public text then. phase: shows what takes long, as of `Monitor`.
    Raises UserError for anything the config names that is not there.
    """
    from fedllm.models import load_model, load_writer, resolve

    task = config.task
    make_engine = ENGINES[config.engine.name](config)
    data = load_task(config)
    names = data.train.label_names if task.kind != "text" else []
    words = prompts.label_words(names, task.words) if names else ()  # what these two refuse they refuse before anything takes long
    partition = make_partition(
        config.federation.partition.kind,
        records=len(data.train.texts),
        clients=config.federation.clients,
        unit=config.privacy.unit,
        labels=data.train.labels,
        users=data.train.users,
        seed=PARTITION_SEED,
        alpha=config.federation.partition.alpha,
    )
    model, tokenizer = load_model(
        config.model.name,
        task.kind,
        labels=max(2, len(names)),
        dtype=config.model.dtype,
        r=config.lora.r,
        alpha=config.lora.alpha,
        targets=config.lora.targets,
        train=config.lora.train,
        seed=public_seed,
        adapter=adapter,
    )
    objective, encode = make_objective(config, tokenizer, names)
    public = None
    if task.public is not None and adapter is None:
        if task.public == GENERATED:
            source = resolve(task.generate.model or config.model.name)
            # LoRA's start changes nothing of what the base writes.
            own = task.generate.model is None
            writer = (lambda: (model.get_base_model(), tokenizer)) if own else (lambda: load_writer(task.generate.model))
            texts, labels = generated.texts(writer, source, task.generate, phase or Display().phase, words)
        else:
            texts, labels = sources.load(task.public, eval_examples=1, labelled=False, text=task.columns.public).train.texts, None
        public = public_examples(config, encode, len(names), public_seed, texts, labels)
    side = "right" if task.kind == "classify" else "left"
    engine = make_engine(model, objective, tokenizer.pad_token_id or 0, config.engine.batch_tokens, side)
    fixed = {}
    if config.lora.init == "public" and adapter is None:
        fixed = public_start(engine, public, config.codec.public_examples, public_seed)
    train, test = (Encoded(encode(table.texts), _targets(table)) for table in (data.train, data.test))
    return Setting(engine, tokenizer, train, test, public, partition, fixed)


def load_task(config: Config) -> sources.Dataset:
    """The task's own data."""
    task = config.task
    if task.public is not None:
        sources.check_public(task.public, task.source, task.test)
    return sources.load(
        task.source,
        train_examples=task.train_examples,
        eval_examples=task.eval_examples,
        labelled=task.kind != "text" or config.federation.partition.kind == "dirichlet",
        test=task.test,
        text=task.columns.text,
        label=task.columns.label,
        user=task.columns.user,
    )


def make_objective(config: Config, tokenizer, label_names: list[str]):
    """What the task asks of the model, and texts -> token ids."""
    task = config.task
    if task.kind == "labels":
        prompt = prompts.label_prompt(task.source, label_names, task.prompt, task.words)
        return LabelWords(prompt.word_ids(tokenizer)), lambda texts: prompt.encode(tokenizer, texts, task.max_length)
    objective = ClassHead() if task.kind == "classify" else NextToken()
    return objective, lambda texts: prompts.encode_plain(tokenizer, texts, task.max_length)


def public_examples(
    config: Config, encode, labels: int, seed: int, texts: list[str], given: np.ndarray | None = None, most: int = 4000
) -> Encoded:
    """Public text in the task's own prompt. Labels are drawn at random, or those given with the text: see `codec.public_labels`."""
    rng = np.random.default_rng([seed, 1])
    chosen = rng.permutation(len(texts))[:most]
    texts = [texts[i] for i in chosen]
    if len(texts) < config.codec.public_examples:
        raise UserError(
            f"task.public={config.task.public}: {len(texts)} texts, expected at least codec.public_examples={config.codec.public_examples}"
        )
    targets = given[chosen] if config.codec.public_labels == "given" else rng.integers(0, max(labels, 1), len(texts))
    return Encoded(encode(texts), targets)


def _targets(table: sources.Table) -> np.ndarray:
    return table.labels.astype(np.int64) if table.labels is not None else np.zeros(len(table.texts), np.int64)
