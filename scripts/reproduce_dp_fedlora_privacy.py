"""What DP-FedLoRA's published noise protects: its own setting (arXiv 2509.09097), accounted exactly.

    python scripts/reproduce_dp_fedlora_privacy.py [--json] [--out DIR]

Published: LLaMA-2-7B, 128 LoRA matrices, each clipped to C = 0.1 and noised with sigma = C sqrt(2 ln(1.25/delta))/epsilon at
epsilon = 25; 20 clients, 2 in each of 200 rounds. The delta is not published: of the powers of ten, 1e-5 is the one at which
one matrix costs 34.6, the figure known for it. A Markdown table goes to standard output (`--json`: one JSON object); `--out`
writes both, as dp_fedlora_privacy.md and .json.

Accounting: exact Gaussian DP against the server, which sees every message and who sent it, so that no sampling helps. A
client's matrices are clipped one by one, hence move together by up to sqrt(128) C. "Add or remove" is the convention of the
claim; "replace" (one client's data for others, 2C) is the one this project reports for the server.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedllm.privacy import accountants
from fedllm.privacy.accountants.gdp import gdp_mu
from fedllm.privacy.claims import classic_multiplier
from fedllm.privacy.events import ADD_REMOVE, REPLACE_ONE, GaussianEvent

NAME = "dp_fedlora_privacy"
DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True)
class Setting:
    """The published setting. one_matrix: the epsilon of one matrix that identifies the unpublished delta."""

    epsilon: float = 25.0
    clip: float = 0.1
    matrices: int = 128
    clients: int = 20
    clients_per_round: int = 2
    rounds: int = 200
    one_matrix: float = 34.6


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"also write {NAME}.md and {NAME}.json there")
    options = parser.parse_args(arguments)
    found = reproduce(Setting())
    text = markdown(found)
    print(json.dumps(found, indent=2) if options.json else text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{NAME}.md").write_text(text + "\n")
        (options.out / f"{NAME}.json").write_text(json.dumps(found, indent=2) + "\n")
        print(f"written: {options.out / NAME}.md, .json", file=sys.stderr)


def true_epsilon(multiplier: float, releases: int, delta: float, relation: str) -> float:
    """Exact epsilon of so many clipped and noised matrices of one client, in any number of rounds."""
    answer = accountants.create("gdp", relation).compose(GaussianEvent(multiplier), releases).epsilon(delta)
    return answer.epsilon


def likely_delta(setting: Setting) -> float:
    """The power of ten at which one matrix comes closest to its known epsilon."""

    def distance(delta: float) -> float:
        multiplier = classic_multiplier(setting.epsilon, delta)
        return abs(true_epsilon(multiplier, 1, delta, ADD_REMOVE) - setting.one_matrix)

    return min(DELTAS, key=distance)


def reproduce(setting: Setting) -> dict[str, Any]:
    """The setting, what follows from it, and one row for each scope from one matrix to the whole run."""
    delta = likely_delta(setting)
    multiplier = classic_multiplier(setting.epsilon, delta)
    expected = setting.rounds * setting.clients_per_round // setting.clients
    scopes = [
        ("one matrix, one round", 1, setting.epsilon),
        (f"one client-round: all {setting.matrices} matrices", setting.matrices, setting.epsilon),
        (f"whole run, a client of {expected} rounds (the expected number)", setting.matrices * expected, setting.epsilon * expected),
        (f"whole run, a client of all {setting.rounds} rounds (worst case)", setting.matrices * setting.rounds, None),
    ]
    return {
        "setting": asdict(setting),
        "delta": delta,
        "noise_multiplier": multiplier,
        "sigma": multiplier * setting.clip,
        "expected_participations": expected,
        "accountant": "gdp",
        "kind": "bound",
        "adversary": "server",
        "rows": [_row(scope, releases, claimed, multiplier, delta, setting.epsilon) for scope, releases, claimed in scopes],
    }


def _row(scope: str, releases: int, claimed: float | None, multiplier: float, delta: float, target: float) -> dict[str, Any]:
    """claimed: the sum of the published epsilons over the rounds, where it was added up. needed_multiplier: for `target`."""
    return {
        "scope": scope,
        "releases": releases,
        "claimed": claimed,
        "epsilon": {relation: true_epsilon(multiplier, releases, delta, relation) for relation in (ADD_REMOVE, REPLACE_ONE)},
        "needed_multiplier": math.sqrt(releases) / gdp_mu(target, delta),
    }


def markdown(found: dict[str, Any]) -> str:
    setting = found["setting"]
    lines = [
        f"DP-FedLoRA as published: noise multiplier {found['noise_multiplier']:.4f} (sigma {found['sigma']:.5f}) for every matrix; "
        f"delta {found['delta']:g}, the power of ten at which one matrix costs {setting['one_matrix']}.",
        "",
        f"| what the server sees of a client | claimed epsilon | true, add or remove | true, replace "
        f"| multiplier for epsilon {setting['epsilon']:g} |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        claimed = "-" if row["claimed"] is None else f"{row['claimed']:g}"
        add, replaced = (_figure(row["epsilon"][relation]) for relation in (ADD_REMOVE, REPLACE_ONE))
        lines.append(f"| {row['scope']} | {claimed} | {add} | {replaced} | {row['needed_multiplier']:.3g} |")
    lines += [
        "",
        "True figures are exact Gaussian DP (bounds that are attained), without amplification: the server knows who takes part. "
        "The multiplier is what each of the matrices would need (add or remove).",
    ]
    return "\n".join(lines)


def _figure(epsilon: float) -> str:
    return f"{epsilon:.1f}" if epsilon < 1000 else f"{epsilon:,.0f}"


if __name__ == "__main__":
    main()
