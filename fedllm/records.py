"""Figures of a round for its record: functions of the ledger and of the noisy mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedllm.privacy import adversaries
from fedllm.privacy.ledger import Ledger
from fedllm.release import PrivateSum


def epsilons(ledger: Ledger) -> dict[str, Any]:
    """What the run has cost so far: both adversaries, and the release by the other accountants."""
    header, entries = ledger.header, ledger.entries
    return {
        "epsilon_release": adversaries.epsilon_release(header, entries).epsilon,
        "epsilon_server": adversaries.epsilon_server(header, entries).epsilon,
        "epsilon_release_by": {name: adversaries.epsilon_release(header, entries, name).epsilon for name in adversaries.CURVES[1:]},
    }


def noise(spec: PrivateSum, code: Tensor) -> dict[str, Any]:
    """Size of a round's noisy mean code [k], and of the noise in it."""
    norm, std = float(torch.linalg.vector_norm(code, dtype=torch.float64)), spec.mean_std * len(code) ** 0.5
    signal = 0.0 if spec.each else max(norm**2 - std**2, 0.0) ** 0.5  # decoding one by one leaves no noise of known size
    return {
        "noise_to_signal": std / signal if signal > 0 else None,
        "aggregate_norm": norm,
        "clip": spec.clip if spec.private else None,
    }
