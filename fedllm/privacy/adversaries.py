"""The two epsilons of a run, from its ledger alone.

release  sees every published model or mean code: noisy sums over secretly sampled cohorts. Add/remove one unit, PLD.
server   sees every message and who sent it: no sampling helps, a unit's data are replaced (2C), exact GDP over all
rounds.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from fedllm.formats import epsilon_text
from fedllm.privacy import accountants
from fedllm.privacy.answers import BOUND, PrivacyAnswer
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    Event,
    GaussianEvent,
    MomentsEvent,
    PoissonGaussianEvent,
    TruncatedPoissonGaussianEvent,
    message_multiplier,
    sampled_event,
    sum_multiplier,
)
from fedllm.privacy.ledger import counted

# Which noise stands between a unit and the models. "gaussian": the model is a function of the noisy sum.
# "gaussian_each": every message is decoded on its own, so that only its own noise counts (absent units being stood in
# for by noise-only messages).
_RELEASED_MULTIPLIER = {"gaussian": sum_multiplier, "gaussian_each": message_multiplier}

# Mechanisms that no noise stands behind: whatever else a run does, there is no figure.
RAW_GRADIENTS, RAW_MOMENTS = "raw_gradients", "raw_moments"
_WITHOUT_NOISE = {
    RAW_GRADIENTS: "the codec is trained on clients' raw gradients, a release without noise",
    RAW_MOMENTS: "the codec is trained on clients' raw moments, a release without noise",
}

PUBLISHED = "published accounting"  # a reason in the header; `privacy_marks` puts the claim and the truth in its place
SHARE_ALONE = "each message is protected by its own noise share alone: the transport does not aggregate securely"
TRUSTED = "none: trusted"
NO_NOISE = "no noise"
CUT_IGNORED = "the cut of large cohorts is left out"
STAGE1 = (1, "stage1")
CURVES = ("pld", "rdp", "gdp", "edgeworth_1")  # accountants whose epsilon of the release is shown by round; `pld` is the one quoted


def epsilon_release(header: dict, entries: list[dict], accountant: str = "pld") -> PrivacyAnswer:
    """Epsilon at the header's target delta against whoever sees the published models, both stages, all attempts.

    accountant: a registered one; `pld` is what is quoted, calibrated and guarded. One that has no theorem for these releases answers
    without a figure and with the reason; an estimate leaves the cut of large cohorts out, and says so.
    """
    if _disabled(header):
        return _none(header, "release", ADD_REMOVE, accountant, NO_NOISE)
    if without_noise(entries):
        return _none(header, "release", ADD_REMOVE, accountant, without_noise(entries))
    collected, uncut = accountants.create(accountant, ADD_REMOVE), False
    for entry in counted(entries):
        event = _release_event(header, entry)
        if isinstance(event, TruncatedPoissonGaussianEvent) and not collected.supports(event):
            event, uncut = PoissonGaussianEvent(event.noise_multiplier, event.sampling_rate), True
        try:
            collected.compose(MomentsEvent(event) if entry["stage"] in STAGE1 else event)
        except accountants.UnsupportedEvent as error:
            return _none(header, "release", ADD_REMOVE, accountant, str(error))
    answer = replace(collected.epsilon(header["target"]["delta"]), unit=header["unit"], adversary="release")
    if uncut and answer.kind == BOUND:
        return _none(header, "release", ADD_REMOVE, accountant, f"{accountant} has no theorem for cut cohorts")
    if uncut:
        answer = replace(answer, reason="; ".join(filter(None, [answer.reason, CUT_IGNORED])))
    return answer


def epsilon_server(header: dict, entries: list[dict], participations: int | None = None) -> PrivacyAnswer:
    """Epsilon at the header's target delta against the server itself.

    participations: None for a client that took part in every round (the worst case); p >= 0 for one that took part p
    times, then in the p rounds with the least noise.
    """
    if _disabled(header):
        return _none(header, "server", REPLACE_ONE, "gdp", NO_NOISE)
    if without_noise(entries):
        return _none(header, "server", REPLACE_ONE, "gdp", without_noise(entries))
    multipliers = []
    for entry in counted(entries):
        _check_entry(header, entry)
        multiplier = message_multiplier(entry["noise"], entry["noise_multiplier"], entry["shares"])
        if multiplier is None:
            return _none(header, "server", REPLACE_ONE, "gdp", TRUSTED)
        multipliers.append(multiplier)
    if participations is not None:
        multipliers = sorted(multipliers)[:participations]
    accountant = accountants.create("gdp", REPLACE_ONE)
    for multiplier in multipliers:
        accountant.compose(GaussianEvent(multiplier))
    answer = replace(accountant.epsilon(header["target"]["delta"]), unit=header["unit"], adversary="server")
    if answer.epsilon is not None and any(entry["noise"] == "distributed" for entry in entries):
        answer = replace(answer, reason=SHARE_ALONE)
    return answer


def epsilon_by_round(header: dict, entries: list[dict], names: Sequence[str] = CURVES, most: int = 20) -> list[dict]:
    """How the epsilons grew: at up to `most` of the counted entries, the last among them.

    Each row has `releases` (entries so far), `stage`, `round`, `server`, and `release`: accountant -> epsilon, None where it has none.
    """
    spent = counted(entries)
    points = sorted({max(1, round(len(spent) * part / most)) for part in range(1, most + 1)}) if spent else []
    rows = []
    for end in points:
        so_far = spent[:end]
        rows.append(
            {
                "releases": end,
                "stage": so_far[-1]["stage"],
                "round": so_far[-1]["round"],
                "server": epsilon_server(header, so_far).epsilon,
                "release": {name: epsilon_release(header, so_far, name).epsilon for name in names},
            }
        )
    return rows


def by_stage(entries: list[dict]) -> dict[str, list[dict]]:
    """The entries of stage 1 and of stage 2, where there are any."""
    parts = {"stage 1": [entry for entry in entries if entry["stage"] in STAGE1]}
    parts["stage 2"] = [entry for entry in entries if entry["stage"] not in STAGE1]
    return {name: part for name, part in parts.items() if part}


def without_noise(entries: list[dict]) -> str | None:
    """Why these releases have no epsilon at all, where something was released as it is."""
    return next((_WITHOUT_NOISE[entry["mechanism"]] for entry in entries if entry["mechanism"] in _WITHOUT_NOISE), None)


def privacy_marks(header: dict, entries: list[dict] | None = None) -> tuple[bool, list[str]]:
    """(private, why not), which stand beside every figure: e.g. (False, ['fixed seed', 'records shared']).

    entries: what was released; a claim is then contrasted with what is true of it.
    """
    why = header["why_not_private"] or []
    why = [why] if isinstance(why, str) else list(why)
    if entries is not None and header.get("claimed"):
        why = [_contrast(header, entries) if reason == PUBLISHED else reason for reason in why]
    return bool(header["private"]) and not why, why


def _contrast(header: dict, entries: list[dict]) -> str:
    claimed = epsilon_text(header["claimed"]["epsilon"])
    release, server = (epsilon_text(found(header, entries).epsilon) for found in (epsilon_release, epsilon_server))
    return f"published: claims {claimed}, true is {release} (release), {server} (server)"


def _disabled(header: dict) -> bool:
    return "privacy disabled" in privacy_marks(header)[1]


def _release_event(header: dict, entry: dict) -> Event:
    _check_entry(header, entry)
    z = _RELEASED_MULTIPLIER[entry["mechanism"]](entry["noise"], entry["noise_multiplier"], entry["shares"])
    if z is None:
        raise ValueError(f"ledger entry {entry['id']}: mechanism {entry['mechanism']!r} needs messages that are noised")
    return sampled_event(z, entry["sampling_rate"], _population(header), entry["max_cohort"])


def _population(header: dict) -> int:
    return header["clients"] if header["unit"] == "client" else header["units"]


def _check_entry(header: dict, entry: dict) -> None:
    """A ledger that this code does not understand never gets a figure."""
    known = (
        entry["mechanism"] in _RELEASED_MULTIPLIER
        and entry["relation"] == ADD_REMOVE
        and entry["unit"] == header["unit"]
    )
    z = entry["noise_multiplier"]
    if not known or isinstance(z, bool) or not isinstance(z, int | float) or not math.isfinite(z):
        raise ValueError(
            f"ledger entry {entry.get('id')}: cannot account for mechanism {entry['mechanism']!r}, "
            f"relation {entry['relation']!r}, "
            f"unit {entry['unit']!r}, noise multiplier {z!r}"
        )


def _none(header: dict, adversary: str, relation: str, accountant: str, reason: str) -> PrivacyAnswer:
    return PrivacyAnswer(
        None, header["target"]["delta"], header["unit"], relation, accountant, "", adversary, "bound", reason
    )
