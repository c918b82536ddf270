"""`fedllm privacy epsilon` and `calibrate`: one question, every accountant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fedllm.cli.output import JsonFlag, print_json, print_table
from fedllm.cli.privacy import flags
from fedllm.cli.privacy.flags import (
    AccountantFlag,
    CheckFlag,
    CohortFlag,
    DeltaFlag,
    EpsilonFlag,
    GroupFlag,
    NoiseFlag,
    PhaseFlag,
    PopulationFlag,
    RateFlag,
    RelationFlag,
    StepsFlag,
    UnitFlag,
)
from fedllm.errors import UserError
from fedllm.formats import delta_text, epsilon_text, seconds_text
from fedllm.privacy.answers import PrivacyAnswer
from fedllm.privacy.questions import Refusal


def epsilon(
    noise_multiplier: NoiseFlag = None,
    sampling_rate: RateFlag = None,
    steps: StepsFlag = None,
    delta: DeltaFlag = None,
    epsilon: EpsilonFlag = None,
    phase: PhaseFlag = None,
    accountant: AccountantFlag = "pld",
    relation: RelationFlag = "add-remove",
    group: GroupFlag = 1,
    population: PopulationFlag = None,
    cohort: CohortFlag = None,
    unit: UnitFlag = "client",
    check: CheckFlag = False,
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Epsilon at --delta, delta at --epsilon, or (with both, without --steps) how many steps the budget allows."""
    from fedllm.privacy import questions
    from fedllm.privacy.second_opinion import second_opinion

    names, between = questions.members(accountant), flags.relation_of(relation)
    drawn = flags.sampling(sampling_rate, population, cohort, group, phase)
    asked = flags.query(
        noise_multiplier=noise_multiplier, sampling_rate=sampling_rate, steps=steps, phases=phase, population=population, cohort=cohort,
        delta=delta, epsilon=epsilon, relation=relation, group=group, unit=unit, accountant=accountant,
    )  # fmt: skip
    if delta is None and epsilon is None:
        raise UserError("--delta is missing: expected --delta (to learn epsilon), --epsilon (to learn delta), or both without --steps")
    if delta is not None:
        flags.check_delta(delta)
    if epsilon is not None:
        flags.check_epsilon(epsilon)
    if check and (delta is None or epsilon is not None):
        raise UserError("--check: expected with --delta and without --epsilon; it compares epsilons")
    counts: dict[str, int | None] = {}
    if delta is not None and epsilon is not None:
        if steps is not None or phase:
            raise UserError("--steps: expected without it where both --epsilon and --delta are given (the steps are then the answer)")
        flags.check_noise("--noise-multiplier", noise_multiplier)

        def question(name: str) -> PrivacyAnswer:
            counts[name], found = questions.most_steps(name, drawn.event(noise_multiplier), between, epsilon, delta)
            return found
    else:
        phases = flags.phases_of(phase, drawn, noise_multiplier, steps)

        def question(name: str) -> PrivacyAnswer:
            return questions.ask(name, phases, between, delta=delta, epsilon=epsilon)

    answers, refusals = _asked(names, question, unit)
    quoted = _quote_steps(answers, counts) if counts else questions.to_quote(answers)
    opinion = second_opinion(phases, between, delta, quoted and quoted.epsilon) if check else None
    if as_json:
        rows = [answer.as_json() | ({"steps": counts[answer.accountant]} if counts else {}) for answer in answers]
        refused = [vars(refusal) for refusal in refusals]
        found = {"query": asked, "answers": rows, "quote": quoted and quoted.accountant, "refused": refused}
        print_json(found | ({"check": opinion} if check else {}))
        return
    what = "steps" if counts else "ε" if epsilon is None else "δ"
    header = ("accountant", what, "kind", "direction", "certain interval", "conversion", "seconds", "remark")
    rows = [_row(answer, what, counts) for answer in answers]
    rows += [[refusal.accountant, "refused", "", "", "", "", "", refusal.reason] for refusal in refusals]
    notes = [_quote_line(quoted, what, counts), *([_opinion_line(opinion)] if opinion else [])]
    print_table(flags.text(asked), header, rows, notes, (0, 2, 3, 4, 5, 7))


def calibrate(
    epsilon: EpsilonFlag = None,
    sampling_rate: RateFlag = None,
    steps: StepsFlag = None,
    delta: DeltaFlag = None,
    accountant: AccountantFlag = "pld",
    relation: RelationFlag = "add-remove",
    group: GroupFlag = 1,
    population: PopulationFlag = None,
    cohort: CohortFlag = None,
    unit: UnitFlag = "client",
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """The least noise multiplier that meets --epsilon at --delta, rounded up and checked back."""
    from fedllm.privacy import calibration, questions
    from fedllm.privacy.accountants import UnsupportedEvent, names

    if accountant not in names():
        raise UserError(f"--accountant {accountant}: expected one of {', '.join(names())}")
    between = flags.relation_of(relation)
    drawn = flags.sampling(sampling_rate, population, cohort, group)
    flags.check_epsilon(epsilon, positive=True)
    flags.check_delta(delta)
    flags.check_steps("--steps", steps)
    if steps == 0 or sampling_rate == 0:
        raise UserError("--steps and --sampling-rate: expected more than 0; a release that never happens needs no noise")
    asked = flags.query(
        epsilon=epsilon, sampling_rate=sampling_rate, steps=steps, delta=delta, population=population, cohort=cohort, relation=relation,
        group=group, unit=unit,
    )  # fmt: skip

    def phases(noise_multiplier: float) -> list:
        return [(drawn.event(noise_multiplier), steps)]

    try:
        noise_multiplier, found = calibration.calibrate(accountant, phases, epsilon, delta, between)
    except UnsupportedEvent as error:
        raise UserError(str(error)) from None
    except UserError as error:
        raise UserError(f"--epsilon {epsilon:g}: {error}") from None
    others = [name for name in questions.members("all") if name != accountant]
    answers, refusals = _asked(others, lambda name: questions.ask(name, phases(noise_multiplier), between, delta=delta), unit, some=False)
    if as_json:
        rows = [answer.as_json() | {"off_by": _off(answer, found)} for answer in answers]
        print_json(
            {
                "query": asked, "accountant": accountant, "noise_multiplier": noise_multiplier, "epsilon": found.epsilon,
                "answer": replace(found, unit=unit).as_json(), "others": rows, "refused": [vars(refusal) for refusal in refusals],
            }
        )  # fmt: skip
        return
    title = f"noise multiplier {noise_multiplier:g}: ε {epsilon_text(found.epsilon)} by {accountant} ({found.kind}), target {epsilon:g}"
    rows = [[answer.accountant, epsilon_text(answer.epsilon), _off_text(_off(answer, found)), _kind(answer)] for answer in answers]
    rows += [[refusal.accountant, "refused", "", refusal.reason] for refusal in refusals]
    notes = []
    if found.kind != "bound" or found.direction == "lower":
        notes.append(f"{accountant} is no guarantee here: calibrate with pld for a noise that keeps the promise")
    print_table(title, ("at this noise", "ε", f"against {accountant}", "kind"), rows, notes, (0, 3))


def _asked(names: Sequence[str], question: Any, unit: str, some: bool = True) -> tuple[list[PrivacyAnswer], list[Refusal]]:
    """Answers with their unit and adversary, and refusals; UserError where `some` is wanted and every accountant refuses."""
    from fedllm.privacy import questions

    answers, refusals = questions.ask_each(names, question)
    if some and not answers:
        raise UserError("; ".join(f"--accountant {refusal.accountant}: {refusal.reason}" for refusal in refusals))
    return [replace(answer, unit=unit, adversary="release") for answer in answers], refusals


def _quote_steps(answers: Sequence[PrivacyAnswer], counts: dict[str, int | None]) -> PrivacyAnswer | None:
    """Of the bounds, the one that allows the most steps."""
    bounds = [answer for answer in answers if answer.kind == "bound" and answer.direction in ("upper", "exact")]
    return max(bounds, key=lambda answer: counts[answer.accountant] or 0, default=None)


def _row(answer: PrivacyAnswer, what: str, counts: dict[str, int | None]) -> list[str]:
    figure = {"ε": epsilon_text(answer.epsilon), "δ": "none" if answer.delta is None else delta_text(answer.delta)}
    if what == "steps":
        figure["steps"] = _steps_text(counts[answer.accountant])
    interval = ""
    if answer.interval is not None:
        text = epsilon_text if what != "δ" else delta_text
        vacuous = ("0", "1" if what == "δ" else "∞")
        interval = " to ".join(none if end is None else text(end) for end, none in zip(answer.interval, vacuous, strict=True))
    return [
        answer.accountant,
        figure[what],
        answer.kind,
        answer.direction,
        interval,
        answer.conversion,
        seconds_text(answer.seconds or 0.0),
        answer.reason or "",
    ]


def _quote_line(quoted: PrivacyAnswer | None, what: str, counts: dict[str, int | None]) -> str:
    if quoted is None:
        return "quote: nothing; no accountant here gives a bound"
    if what == "steps":
        return f"quote: {_steps_text(counts[quoted.accountant])} steps by {quoted.accountant}, a bound"
    figure = f"ε = {epsilon_text(quoted.epsilon)} at δ = {delta_text(quoted.delta)}"
    what_it_is = f"bound, {quoted.relation}, one {quoted.unit}"
    return f"quote: {figure} by {quoted.accountant} ({what_it_is}): the least figure that is never below the truth"


def _steps_text(steps: int | None) -> str:
    from fedllm.privacy.questions import MAX_STEPS

    return f"{MAX_STEPS:,} or more" if steps is None else f"{steps:,}"


def _opinion_line(opinion: dict[str, Any]) -> str:
    if opinion["epsilon"] is None:
        return "check: dp-accounting has no figure for such releases, or cannot lay out losses so large"
    apart = "" if opinion["difference"] is None else f"; what is quoted here differs by {100 * opinion['difference']:+.4f} %"
    return f"check: dp-accounting's own PLD says {opinion['epsilon']:.6g}{apart}"


def _off(answer: PrivacyAnswer, against: PrivacyAnswer) -> float | None:
    """By what share another accountant's epsilon differs from the one calibrated with."""
    return None if answer.epsilon is None or not against.epsilon else answer.epsilon / against.epsilon - 1


def _off_text(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.1f} %"


def _kind(answer: PrivacyAnswer) -> str:
    return f"{answer.kind}, {answer.direction}" + (f"; {answer.reason}" if answer.reason else "")
