"""What a paper claims beside what came out of its runs; for the reproduce_*.sh.

python scripts/reproduce_table.py PAPER RUN_DIR...
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grid_report import interval, table, with_interval

from fedllm.compare import load_results
from fedllm.errors import UserError
from fedllm.formats import bytes_text, claim_text, epsilon_text, times_text

Runs = dict[str, dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", metavar="PAPER", help=", ".join(PAPERS))
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN_DIR")
    given = parser.parse_args(arguments)
    try:
        print(told(given.paper, given.folders))
    except UserError as error:
        sys.exit(f"reproduce: {error}")


def told(paper: str, folders: list[Path]) -> str:
    """Claims and findings of one paper, then its runs."""
    if paper not in PAPERS:
        raise UserError(f"{paper}: expected one of {', '.join(PAPERS)}")
    runs = {folder.name: load_results(folder) | {"folder": folder} for folder in folders}
    if not runs:
        return f"{paper}: no finished run yet"
    lines = [[claim, found(runs)] for claim, found in PAPERS[paper]]
    seeded = [name for name, run in runs.items() if run["seed"] is not None]
    note = [f"Fixed seeds, so not private: {', '.join(seeded)}."] if seeded else []
    return "\n\n".join([table(["the paper", "here"], lines), runs_table(runs), *note])


def runs_table(runs: Runs) -> str:
    header = ["run", "method", "claimed ε", "release ε", "server ε", "accuracy before", "after", "loss", "bytes up", "seconds"]
    header += ["norm of a matrix B (begins at 0)"]
    lines = []
    for name, run in runs.items():
        epsilon = run["epsilon"]
        claimed = epsilon.get("claimed")
        lines.append(
            [
                name,
                run["method"],
                claim_text(claimed),
                epsilon_text(epsilon["release"]["epsilon"]),
                epsilon_text(epsilon["server"]["epsilon"]),
                percent(run["accuracy_before"]),
                percent(run["accuracy"]),
                f"{run['loss_before']:.3f} -> {run['loss']:.3f}",
                bytes_text(run["uplink_bytes_per_client_round"]),
                f"{run['seconds']['total']:.0f}",
                f"{matrix_norm(run):.3g}",
            ]
        )
    return table(header, lines)


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def matrix_norm(run: dict[str, Any]) -> float:
    """Root mean square of the Frobenius norms of the saved adapter's matrices B, which begin at zero."""
    norms = [float(value.double().norm()) for value in matrices(run)]
    return math.sqrt(sum(norm**2 for norm in norms) / len(norms))


def matrices(run: dict[str, Any]) -> list[Any]:
    """The matrices B of the saved adapter."""
    from safetensors.torch import load_file

    saved = load_file(run["folder"] / "adapter" / "adapter_model.safetensors")
    return [value for name, value in saved.items() if "lora_B" in name]


# -- what the papers claim (facts and sources: README) ------------------------------------------------------------------------------------


def epsilons(name: str) -> Callable[[Runs], str]:
    def found(runs: Runs) -> str:
        if name not in runs:
            return "not run"
        epsilon = runs[name]["epsilon"]
        release, server = (epsilon_text(epsilon[side]["epsilon"]) for side in ("release", "server"))
        reason = epsilon["release"].get("reason")
        return f"claimed {claim_text(epsilon.get('claimed'))}; true: release {release}{f' ({reason})' if reason else ''}, server {server}"

    return found


def points(name: str, other: str = "no-privacy") -> Callable[[Runs], str]:
    """Accuracy (loss where there is none) of a run against another."""

    def found(runs: Runs) -> str:
        if name not in runs or other not in runs:
            return "not run"
        one, two = runs[name], runs[other]
        if one["accuracy"] is None:
            return f"{name}: loss {one['loss']:.3f} against {two['loss']:.3f} of {other}"
        return f"{name}: {100 * one['accuracy']:.2f} % against {100 * two['accuracy']:.2f} % of {other} (one seed)"

    return found


def several(*parts: Callable[[Runs], str]) -> Callable[[Runs], str]:
    return lambda runs: "; ".join(part(runs) for part in parts)


def compression(name: str) -> Callable[[Runs], str]:
    return lambda runs: times_text(runs[name]["compression_ratio"]) + " fewer bytes than the float32 update" if name in runs else "not run"


def noise_of_adapters(runs: Runs) -> str:
    """Norms of the adapters, beside what noise alone would give the published one."""
    if "published" not in runs:
        return "not run"
    norms = ", ".join(f"{name} {matrix_norm(run):.3g}" for name, run in runs.items())
    return f"norm of a matrix B at the end: {norms}; of the published noise alone: {noise_norm(runs['published']):.3g}"


def noise_norm(run: dict[str, Any]) -> float:
    """Root mean square norm of the noise in the mean of one round's matrices B, by the published formula."""
    from fedllm.config import load_config
    from fedllm.privacy.claims import classic_multiplier

    config = load_config(run["folder"] / "config.yaml")
    target, clip = config.privacy.target, config.privacy.clip.norm
    sigma = clip * classic_multiplier(target.epsilon, target.delta) / config.federation.expected_cohort**0.5
    sizes = [value.numel() for value in matrices(run)]
    return sigma * math.sqrt(sum(sizes) / len(sizes))


def reseeding(runs: Runs) -> str:
    """Accuracy at the noise of each accountant, paired by seed: is a difference within that of reseeding?"""
    by: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        accountant, _, seed = name.partition("-")
        by.setdefault(accountant, {})[seed] = 100 * run["accuracy"]
    parts = [f"{name} {with_interval(interval(list(values.values()))).lstrip('+')} %" for name, values in by.items()]
    for other in ("PRV", "RDP"):
        shared = sorted(by.get("EW", {}).keys() & by.get(other, {}).keys())
        if shared:
            gain = interval([by["EW"][seed] - by[other][seed] for seed in shared])
            verdict = "unknown of one seed" if gain["half_width"] is None else within(gain)
            parts.append(f"EW against {other}, paired: {with_interval(gain)} points: {verdict}")
    return "; ".join(parts)


def within(gain: dict[str, Any]) -> str:
    return "within the noise of reseeding" if abs(gain["mean"]) <= gain["half_width"] else "more than the noise of reseeding"


def true_at_edgeworth(runs: Runs) -> str:
    """What a run at the noise of the first-order estimate claims, and what is true of it."""
    name = next((name for name in runs if name.startswith("EW")), "EW")
    return epsilons(name)(runs)


PAPERS: dict[str, list[tuple[str, Callable[[Runs], str]]]] = {
    "dr_encoder": [
        ("end-to-end client-level DP; epsilon by GDP of stage 2 alone, clip, delta and sigma not published", epsilons("published")),
        ("the encoder saves bytes, 1/64", compression("published")),
        ("a random Gaussian prior is enough to fit the encoder", points("corrected-autoencoder")),
        ("accuracy on MMLU and C-Eval survives (which hardly move under LoRA at all)", points("published")),
        ("(not in the paper) an encoder that knows public gradients, against noise in all n", points("corrected-kronecker", "no-encoder")),
    ],
    "cg_fedllm": [
        ("1/64 of the bytes", compression("published")),
        ("accuracy with the encoder as good as without (C-Eval 25.5 - 26.8 %, chance for four answers)", points("published-no-noise")),
        ("GDP, epsilon 8 (0.25 and 2 too), sensitivity 1; the encoder has seen real gradients", epsilons("published")),
        ("and still as good with the noise", several(points("published"), points("corrected"))),
    ],
    "dp_lora": [
        ("epsilon 2", epsilons("published")),
        ("Llama-7B on LiveQA: 69.4 -> 55.9 at epsilon 2", several(points("published"), points("corrected"))),
        ("(not in the paper) the corrected form, 1370 clients in the place of five nodes, cohorts of 50", points("corrected-many-clients")),
    ],
    "dp_fedlora": [
        ("epsilon 25 a round", epsilons("published")),
        ("MMLU 44.64 -> 42.45, BBH 38.96 -> 38.52, CRASS 38.09 -> 22.73", several(points("published"), points("corrected"))),
        ("adapters clipped to 0.1, noised, averaged", noise_of_adapters),
        ("(not in the paper) the corrected form, 1370 clients, cohorts of 50", points("corrected-many-clients")),
    ],
    "ew_tune": [
        ("epsilon 8 (8.29 to 9.60 is true of its seven settings)", true_at_edgeworth),
        ("up to 1.1 % better: SST-2 92.19 / 91.83 / 91.61, MNLI 81.74 / 81.71 / 81.38 with EW / PRV / RDP", reseeding),
    ],
}

if __name__ == "__main__":
    main()
