"""The noise that published methods take, by their own formula or accountant. What is true of it is for the ledger to say."""

from __future__ import annotations

import math

from fedllm.privacy import accountants
from fedllm.privacy.calibration import calibrate
from fedllm.privacy.events import Event, PoissonGaussianEvent, sampled_event

EXACT, CLASSIC = "exact", "classic"
CALIBRATIONS = (EXACT, CLASSIC, *accountants.names())
SOUND = (EXACT, "pld", "rdp", "rdp_classic")  # never less noise than the target needs; with the others a run may end early, or claim


def classic_multiplier(epsilon: float, delta: float, groups: int = 1) -> float:
    """Noise over the joint sensitivity C sqrt(groups) where each group's is sigma = C sqrt(2 ln(1.25/delta))/epsilon.

    Proven for one group, one release and epsilon < 1 (Dwork and Roth 2014, theorem A.1); DP-LoRA (arXiv 2312.17493) and DP-FedLoRA
    (arXiv 2509.09097) take it for every matrix in every round at any epsilon. epsilon > 0. delta: in (0, 1). groups: >= 1.
    """
    return math.sqrt(2 * math.log(1.25 / delta)) / epsilon / math.sqrt(groups)


def accountant_multiplier(
    accountant: str, epsilon: float, delta: float, rounds: int, sampling_rate: float, population: int, max_cohort: int | None = None
) -> float:
    """Noise of one sampled sum over its sensitivity at which an accountant answers `epsilon` after `rounds` >= 1 of them.

    accountant: a registered one; an estimate may come out with too little. sampling_rate: in (0, 1]. population: units, >= 1. max_cohort:
    where a cohort is cut, or None; left out by accountants that have no theorem for cut cohorts. Raises UserError for impossible targets.
    """

    def compose(multiplier: float) -> list[tuple[Event, int]]:
        event = sampled_event(multiplier, sampling_rate, population, max_cohort)
        if not accountants.create(accountant).supports(event):
            event = PoissonGaussianEvent(multiplier, sampling_rate)
        return [(event, rounds)]

    return calibrate(accountant, compose, epsilon, delta)[0]
