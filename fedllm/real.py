"""CG-FedLLM's pre-training (TGAP, arXiv 2405.13746): raw gradients of private examples for the codec to learn. Nothing protects them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedllm.schema import Config
from fedllm.server import ServerOptimizer
from fedllm.setting import Setting


def gradients(setting: Setting, config: Config, seed: int) -> Tensor:
    """Updates of single private examples [at most codec.public_examples, n], of a share `codec.real_share` of all.

    Taken along codec.warmup_rounds plain steps: at LoRA's start A's gradient is exactly zero. The adapter is put back afterwards.
    """
    engine, local = setting.engine, config.federation.local
    count = max(1, min(config.codec.public_examples, int(config.codec.real_share * len(setting.train))))
    chosen = np.random.default_rng([seed, 7]).permutation(len(setting.train))[:count]
    start = engine.adapter()
    optimizer, rows = ServerOptimizer(start, config.federation.server), []
    for part in np.array_split(chosen, min(config.codec.warmup_rounds, count)):
        found = engine.updates(setting.train, [np.array([i]) for i in part], local.steps, local.lr)
        rows.append(torch.cat([updates for _, updates in found]))
        engine.load(optimizer.step(rows[-1].mean(0)))
    engine.load(start)
    return torch.cat(rows)
