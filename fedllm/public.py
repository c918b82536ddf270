"""What public text gives at no cost: gradients at the current model, a clip norm, and a few steps to leave LoRA's zero start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedllm.combinations import held_out_rows
from fedllm.errors import UserError
from fedllm.schema import Config, LocalConfig, ServerConfig
from fedllm.server import SCHEDULES, ServerOptimizer
from fedllm.setting import Setting
from fedllm.training.engine import Encoded, Engine


@dataclass(frozen=True)
class PublicGradients:
    """Gradients of single public examples: `fit` [most, n] for priors, `held_out` [a fifth, n] for the clip norm."""

    fit: Tensor
    held_out: Tensor


def gradients(setting: Setting, config: Config, seed: int, number: int) -> PublicGradients | None:
    """Updates of public examples at the model as it stands; which ones follows from the seed and the round. None without public text.

    Without a prior to fit (codec.prior: none) those for the clip norm alone are computed.
    """
    if setting.public is None:
        return None
    held_out = held_out_rows(config.codec.public_examples)
    wanted = held_out if config.codec.prior == "none" else config.codec.public_examples
    rows = _updates(setting, config, [seed, 2, number], wanted, config.codec.public_labels)
    return PublicGradients(rows[held_out:], rows[:held_out])


def clip_norm(
    rows: PublicGradients | None, encode: Callable[[Tensor], Tensor], config: Config, per_unit: int = 4, groups: int = 1
) -> float:
    """The clip norm C: as configured, or the quantile of the norms of public pseudo-units' vectors, shared out over the clip groups.

    per_unit: examples of a typical unit. With C / sqrt(groups) for each of `groups` >= 1 groups the sensitivity, and with it the noise,
    is that of one joint clip.
    """
    norm = config.privacy.clip.norm
    if norm != "auto":
        return float(norm)
    vectors = encode(pseudo_units(rows, per_unit))
    found = float(vectors.double().norm(dim=1).quantile(config.privacy.clip.quantile))
    if not 0 < found < float("inf"):
        raise UserError(f"privacy.clip.norm=auto: public gradients give {found}; expected a number in privacy.clip.norm")
    return found / groups**0.5


def pseudo_units(rows: PublicGradients, per_unit: int) -> Tensor:
    """Means of `per_unit` held-out gradients each [units, n], as a private unit's update is the mean of its examples'."""
    groups = rows.held_out.split(per_unit)
    return torch.stack([group.mean(0) for group in groups if len(group) == min(per_unit, len(rows.held_out))])


def warm_up(setting: Setting, config: Config, seed: int, optimizer: ServerOptimizer) -> None:
    """A few server steps along public gradients; the adapter is loaded afterwards.

    Labels are random here (or given): along gradients of the model's own labels the mean step is zero.
    """
    for step in range(config.codec.warmup_public_steps):
        mean = _updates(setting, config, [seed, 3, step], config.codec.public_examples).mean(0)
        setting.engine.load(optimizer.step(mean))


def warm_start(setting: Setting, config: Config, seed: int, advance: Callable[[int], None]) -> Tensor:
    """Train on public text before the first round (`federation.warm_start`), at no privacy cost; the adapter [n], which is loaded.

    Raises FloatingPointError where a step is not finite.
    """
    start = config.federation.warm_start
    optimizer = ServerOptimizer(setting.engine.adapter(), ServerConfig(optimizer="adam", lr=start.lr))
    for step in range(start.steps):
        mean = _updates(setting, config, [seed, 6, step], start.examples, local=LocalConfig()).mean(0)  # plain gradients
        setting.engine.load(optimizer.step(mean, SCHEDULES["linear"](step, start.steps)))
        advance(1)
    return setting.engine.adapter()


def drawn_labels(engine: Engine, data: Encoded, rng: np.random.Generator) -> np.ndarray:
    """A label of each example, drawn from the model's own prediction.

    Drawn, not the most likely one: the second moment of such gradients is the model's Fisher matrix, that of true labels where the model
    is calibrated. With its favourite label the gradient fades exactly where the model is sure, whether it is right or wrong.
    """
    below = engine.probabilities(data).cumsum(1).numpy()
    return (below[:, :-1] < rng.random(len(data))[:, None]).sum(1)


LABELS: dict[str, Callable[[Engine, Encoded, np.random.Generator], np.ndarray]] = {
    "random": lambda engine, data, rng: data.targets,  # drawn when the text was read
    "given": lambda engine, data, rng: data.targets,  # written for them
    "model": drawn_labels,
}


def _updates(
    setting: Setting, config: Config, key: list[int], count: int, labels: str = "random", local: LocalConfig | None = None
) -> Tensor:
    rng, local = np.random.default_rng(key), local or config.federation.local
    chosen = rng.permutation(len(setting.public))[:count]
    text = Encoded([setting.public.tokens[i] for i in chosen], setting.public.targets[chosen])
    data = Encoded(text.tokens, LABELS[labels](setting.engine, text, rng))
    rows = torch.empty(len(data), setting.engine.layout.size)  # once: for a large model they are the most that a run holds
    for where, updates in setting.engine.updates(data, [np.array([i]) for i in range(len(data))], local.steps, local.lr, local.prox):
        rows[where] = updates
    return rows
