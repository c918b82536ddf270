"""EW-Tune's noise (arXiv 2210.15042, table 2 and the authors' logs), accounted again: what Edgeworth said and what is true.

    python scripts/reproduce_ew_tune.py [--task MNLI ...] [--json] [--out DIR]

RoBERTa-base is fine-tuned for 20 epochs with batches of 2000, clip 10, target epsilon 8; the noise is chosen by the Edgeworth
accountant of order 1, by PRV or by RDP. For each noise multiplier that Edgeworth chose: what orders 1, 2, 3 say here, the epsilon
that holds (PLD, Poisson sampling, add or remove one example), the noise that epsilon 8 needs, and how well the finite-sample
bounds know the privacy loss's CDF, against the delta it would have to be known to. Published figures stand in brackets.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fedllm.privacy import accountants
from fedllm.privacy.accountants.berry_esseen import normal_error
from fedllm.privacy.accountants.cumulants import Phase
from fedllm.privacy.accountants.expansion import expand, largest_value
from fedllm.privacy.calibration import calibrate
from fedllm.privacy.events import PoissonGaussianEvent

BATCH, EPOCHS, TARGET = 2000, 20, 8.0
EXAMPLES = {"MNLI": 392_702, "QQP": 363_849, "QNLI": 104_743, "SST-2": 67_349}
ORDERS = (1, 2, 3)
CHOOSERS = ("edgeworth_1", "pld", "rdp_classic")  # of the noise, as the paper has them; its PRV and PLD are one thing computed in two ways
# task, delta, sigma chosen by (Edgeworth, PRV, RDP), accuracy with each; then, recomputed from the logs for this project: the
# epsilon that holds at the first sigma, and orders 1, 2, 3 there.
PUBLISHED = (
    ("MNLI", 1e-5, (0.557, 0.581, 0.6255), (81.74, 81.71, 81.38), 9.14, (8.00, 8.53, 8.97)),
    ("MNLI", 1e-6, (0.573, 0.607, 0.650), (81.81, 81.22, 81.25), 9.60, (7.99, 8.49, 8.92)),
    ("QNLI", 1e-5, (0.711, 0.7295, 0.793), (87.36, 87.30, 87.15), 8.46, (8.00, 8.41, 8.72)),
    ("QNLI", 1e-6, (0.7395, 0.768, 0.829), (87.18, 86.79, 86.63), 8.71, (7.99, 8.39, 8.70)),
    ("QQP", 1e-5, (0.5635, 0.587, 0.6325), (84.97, 85.08, 84.84), 9.10, (7.99, 8.52, 8.95)),
    ("QQP", 1e-6, (0.580, 0.6135, 0.6575), (84.68, 84.79, 84.61), 9.54, (7.98, 8.48, 8.90)),
    ("SST-2", 1e-5, (0.7865, 0.817, 0.8775), (92.19, 91.83, 91.61), 8.29, (7.99, 8.37, 8.63)),
)


def epsilon(name: str, sigma: float, task: str, delta: float) -> float:
    """What an accountant says of a run on `task`: 20 epochs of Poisson batches of expected size 2000."""
    event = PoissonGaussianEvent(sigma, BATCH / EXAMPLES[task])
    return accountants.create(name).compose(event, EPOCHS * (EXAMPLES[task] // BATCH)).epsilon(delta).epsilon


def needed_noise(name: str, task: str, delta: float) -> float:
    """The least noise multiplier of 4 digits at which an accountant's epsilon is within the target."""

    def run(sigma: float):
        return [(PoissonGaussianEvent(sigma, BATCH / EXAMPLES[task]), EPOCHS * (EXAMPLES[task] // BATCH))]

    return calibrate(name, run, TARGET, delta)[0]


def known_to(sigma: float, task: str, order: int) -> dict[str, float]:
    """How far the expansion may be from the CDF of the loss with the example: by Berry-Esseen, and by the best bound here."""
    phase = Phase(1 / sigma, BATCH / EXAMPLES[task], EPOCHS * (EXAMPLES[task] // BATCH))
    moments = phase.pair.with_unit
    expansion = expand([phase], order, with_unit=True, negated=False)
    normal = normal_error([(phase.count, moments.cumulants[1], moments.third)])
    return {"berry_esseen": normal + largest_value(expansion.correction), "best": expansion.error}


def row(published: tuple) -> dict[str, Any]:
    """One line of the table; every figure not under `published` is computed here."""
    task, delta, sigmas, accuracy, true_epsilon, orders = published
    print(f"{task}, delta {delta:g} ...", file=sys.stderr, flush=True)
    errors = known_to(sigmas[0], task, 1)
    needed = {name: needed_noise(name, task, delta) for name in CHOOSERS}
    return {
        "task": task,
        "delta": delta,
        "sampling_rate": BATCH / EXAMPLES[task],
        "steps": EPOCHS * (EXAMPLES[task] // BATCH),
        "published": {
            "sigma": dict(zip(("edgeworth", "prv", "rdp"), sigmas, strict=True)),
            "accuracy": dict(zip(("edgeworth", "prv", "rdp"), accuracy, strict=True)),
            "true_epsilon": true_epsilon,
            "edgeworth": list(orders),
        },
        "edgeworth": [epsilon(f"edgeworth_{order}", sigmas[0], task, delta) for order in ORDERS],
        "true_epsilon": epsilon("pld", sigmas[0], task, delta),
        "needed_sigma": needed,
        "missing_noise": needed["pld"] / sigmas[0] - 1,
        "cdf_error": errors,
        "cdf_error_over_delta": {name: error / delta for name, error in errors.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, and what it means in three sentences."""
    lines = [
        "| task, delta | sigma by EW / PRV / RDP | Edgeworth 1 / 2 / 3 at the EW sigma (published) | true epsilon there (published) "
        "| sigma for epsilon 8 by Edgeworth 1 / PLD / classic RDP, here | noise missing | CDF known to: Berry-Esseen, here | over delta |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        published, errors, over = r["published"], r["cdf_error"], r["cdf_error_over_delta"]
        cells = (
            f"{r['task']} {r['delta']:.0e}".replace("e-0", "e-"),
            " / ".join(f"{s:g}" for s in published["sigma"].values()),
            " / ".join(f"{e:.2f}" for e in r["edgeworth"]) + " (" + " / ".join(f"{e:.2f}" for e in published["edgeworth"]) + ")",
            f"**{r['true_epsilon']:.2f}** ({published['true_epsilon']:.2f})",
            " / ".join(f"{sigma:.4f}" for sigma in r["needed_sigma"].values()),
            f"{100 * r['missing_noise']:.1f} %",
            f"{errors['berry_esseen']:.3f}, {errors['best']:.4f}",
            f"{over['berry_esseen']:,.0f}, {over['best']:,.0f} times",
        )
        lines.append("| " + " | ".join(cells) + " |")
    low, high = (pick(r["true_epsilon"] for r in rows) for pick in (min, max))
    least = min(r["cdf_error_over_delta"]["best"] for r in rows)
    lines += [
        "",
        f"The noise was chosen for epsilon {TARGET:g} by order 1, an estimate; what holds is {low:.2f} to {high:.2f}.",
        f"The finite-sample bound would have told: it is vacuous, at least {least:,.0f} times delta even by the sharpest bound here.",
    ]
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> Path:
    """Left: epsilon by each order and by PLD at the EW sigma; right: the noise chosen and the noise needed. Returns `path`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fedllm.plots import COLOURS, MARKERS, STYLE, WARNING

    places = range(len(rows))
    names = [f"{r['task']}\n{r['delta']:.0e}".replace("e-0", "e-") for r in rows]
    with rc_context(STYLE):
        drawn = Figure(figsize=(10.5, 4.4), dpi=130, layout="constrained")
        left, right = drawn.subplots(1, 2)
        left.axhline(TARGET, color="#888888", linestyle="--", linewidth=1, label="target")
        for order in ORDERS:
            values = [r["edgeworth"][order - 1] for r in rows]
            left.plot(places, values, MARKERS[order - 1], color=COLOURS[order - 1], label=f"Edgeworth, order {order}")
        left.plot(places, [r["true_epsilon"] for r in rows], "_", color=WARNING, markersize=18, markeredgewidth=2.5, label="true (PLD)")
        left.set_ylabel("ε at the noise that order 1 chose")
        left.set_title("What the accountant said")
        for number, (key, label) in enumerate((("edgeworth", "Edgeworth"), ("prv", "PRV"), ("rdp", "RDP"))):
            values = [r["published"]["sigma"][key] for r in rows]
            right.plot(places, values, MARKERS[number], color=COLOURS[number], label=f"chosen by {label}")
        needed = [r["needed_sigma"]["pld"] for r in rows]
        right.plot(places, needed, "_", color=WARNING, markersize=18, markeredgewidth=2.5, label="needed (PLD)")
        right.set_ylabel("noise multiplier for ε = 8")
        right.set_title("What it would have taken")
        for axis in (left, right):
            axis.set_xticks(list(places), names)
            axis.legend(loc="best")
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, format="png")
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", nargs="+", choices=list(EXAMPLES), help="only these (all)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for ew_tune.png")
    given = parser.parse_args(arguments)
    rows = [row(published) for published in PUBLISHED if given.task is None or published[0] in given.task]
    if given.out:
        print(f"plot: {figure(rows, given.out / 'ew_tune.png')}", file=sys.stderr)
    print(json.dumps({"target": TARGET, "rows": rows}, indent=2) if given.json else markdown(rows))


if __name__ == "__main__":
    main()
