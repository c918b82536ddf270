"""`fedllm privacy tradeoff` and `variance`: what an attacker can tell, and what noise on both LoRA factors does to their product."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from fedllm.cli.output import JsonFlag, print_json, print_table
from fedllm.cli.privacy import flags
from fedllm.cli.privacy.flags import (
    AccountantFlag,
    CohortFlag,
    GroupFlag,
    NoiseFlag,
    PhaseFlag,
    PopulationFlag,
    RateFlag,
    RelationFlag,
    StepsFlag,
)
from fedllm.errors import UserError

FALSE_POSITIVES = 0.01  # where the false-negative rate is stated
MAX_ENTRIES = 2 * 10**7  # of B, A and their product together: the simulation holds several of each
LARGEST = 1e50  # of norms and noise: the variance takes products of four
MAX_NUMBERS = 2 * 10**10  # multiplied and drawn in all: more would take minutes


def tradeoff(
    noise_multiplier: NoiseFlag = None,
    sampling_rate: RateFlag = None,
    steps: StepsFlag = None,
    phase: PhaseFlag = None,
    accountant: AccountantFlag = "all",
    relation: RelationFlag = "add-remove",
    group: GroupFlag = 1,
    population: PopulationFlag = None,
    cohort: CohortFlag = None,
    mu: Annotated[float | None, typer.Option("--mu", help="Draw mu-GDP beside them, or alone.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for tradeoff.png and tradeoff.csv.")] = Path("tradeoff"),
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """The attacker's type I against type II error by each accountant: PNG, CSV, advantage, misses at 1 % false alarms."""
    from fedllm.privacy import questions
    from fedllm.privacy import tradeoff as curves_of
    from fedllm.privacy.tradeoff_plot import tradeoff_figure

    names, between = questions.members(accountant), flags.relation_of(relation)
    alone = mu is not None and noise_multiplier is None and sampling_rate is None and steps is None and not phase and cohort is None
    if mu is not None and not 0 < mu < math.inf:
        raise UserError(f"--mu {mu:g}: expected a finite number > 0")
    curves, refusals = [], []
    if not alone:
        phases = flags.phases_of(phase, flags.sampling(sampling_rate, population, cohort, group, phase), noise_multiplier, steps)
        curves, refusals = questions.ask_each(names, lambda name: curves_of.curve_of(questions.composed(name, phases, between)))
        if not curves:
            raise UserError("; ".join(f"--accountant {refusal.accountant}: {refusal.reason}" for refusal in refusals))
    if mu is not None:
        curves.append(curves_of.gdp_curve(mu, f"{mu:g}-GDP"))
    asked = flags.query(
        noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps, phases=phase, population=population, cohort=cohort,
        relation=relation, group=group, mu=mu, accountant=accountant,
    )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        picture = tradeoff_figure(curves, out / "tradeoff.png", flags.text(asked))
        table = curves_of.write_csv(curves, out / "tradeoff.csv")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; expected a folder that can be written") from None
    rows = [
        {
            "curve": curve.name,
            "kind": curve.kind,
            "direction": curve.direction,
            "advantage": curve.advantage,
            "false_negatives_at_1_percent": curve.beta_at(FALSE_POSITIVES),
        }
        for curve in curves
    ]
    if as_json:
        refused = [vars(refusal) for refusal in refusals]
        print_json({"query": asked, "curves": rows, "refused": refused, "png": str(picture), "csv": str(table)})
        return
    header = ("curve", "kind", "stands on the side", "attacker's advantage", "missed at 1 % false alarms")
    cells = [[row["curve"], row["kind"], row["direction"], *(f"{100 * row[key]:.2f} %" for key in list(row)[3:])] for row in rows]
    cells += [[refusal.accountant, "refused", refusal.reason, "", ""] for refusal in refusals]
    print_table(flags.text(asked), header, cells, [f"{picture}, {table}"], (0, 1, 2))


def variance(
    m: Annotated[int, typer.Option("--m", help="Rows of B [m, r].")],
    n: Annotated[int, typer.Option("--n", help="Columns of A [r, n].")],
    r: Annotated[int, typer.Option("--r", help="LoRA rank.")],
    noise_b: Annotated[float, typer.Option("--noise-b", help="Standard deviation of the noise on B's entries.")],
    noise_a: Annotated[float, typer.Option("--noise-a", help="Standard deviation of the noise on A's entries.")],
    norm_b: Annotated[float, typer.Option("--norm-b", help="Frobenius norm of B, such as its clip norm.")] = 1.0,
    norm_a: Annotated[float, typer.Option("--norm-a", help="Frobenius norm of A.")] = 1.0,
    draws: Annotated[int, typer.Option("--draws", help="Draws of the simulation.")] = 1000,
    seed: Annotated[int, typer.Option("--seed", help="Of the simulation.")] = 0,
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """DP-FedLoRA's unbiasedness and variance: the published expression and the exact one beside a simulation."""
    from fedllm.privacy.lora_variance import lora_variance

    for flag, size in (("--m", m), ("--n", n), ("--r", r)):
        if size < 1:
            raise UserError(f"{flag} {size}: expected a whole number >= 1")
    for flag, value in (("--noise-b", noise_b), ("--noise-a", noise_a), ("--norm-b", norm_b), ("--norm-a", norm_a)):
        flags.check_noise(flag, value)
        if value > LARGEST:
            raise UserError(f"{flag} {value:g}: expected a number in [0, {LARGEST:g}]")
    if m * n + m * r + r * n > MAX_ENTRIES:
        raise UserError(f"--m {m}, --n {n}, --r {r}: expected at most {MAX_ENTRIES:,} entries in B, A and B A together")
    most = max(MAX_NUMBERS // (m * n * r + 20 * (m * n + m * r + r * n)), 2)
    if not 2 <= draws <= most:
        raise UserError(f"--draws {draws}: expected at least 2 and at most {most:,} for these shapes")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected a whole number >= 0")
    found = lora_variance(m, n, r, norm_b, norm_a, noise_b, noise_a, draws=draws, seed=seed)
    if as_json:
        query = {"m": m, "n": n, "r": r, "noise_b": noise_b, "noise_a": noise_a, "norm_b": norm_b, "norm_a": norm_a, "draws": draws}
        print_json({"query": query | {"seed": seed}, **found.as_json()})
        return
    parts = ", ".join(f"{term:.4g}" for term in found.terms)
    rows = [
        ["exact, E‖B̃Ã − BA‖²", f"{found.exact:.6g}", f"of noise on A, on B, on both: {parts}"],
        ["published bound", f"{found.published:.6g}", "holds" if found.published_is_bound else "no: below the exact value here"],
        ["simulated", f"{found.monte_carlo:.6g}", f"standard error {found.standard_error:.2g}, {draws} draws"],
        ["squared norm of the mean error", f"{found.bias:.4g}", f"an unbiased product gives about {found.bias_expected:.4g}"],
        ["noise over signal", "∞" if math.isinf(found.relative) else f"{found.relative:.4g}", "root of exact over ‖BA‖"],
    ]
    print_table(f"B [{m}, {r}] and A [{r}, {n}] with independent noise", ("", "value", "meaning"), rows)
