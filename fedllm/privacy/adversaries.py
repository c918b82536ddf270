"""The two epsilons of a run, from its ledger alone.

release  sees every published model or mean code: noisy sums over secretly sampled cohorts. Add/remove one unit, PLD.
server   sees every message and who sent it: no sampling helps, a unit's data are replaced (2C), exact GDP over all
rounds.
"""

import math
from dataclasses import replace

from fedllm.privacy import accountants
from fedllm.privacy.answers import PrivacyAnswer
from fedllm.privacy.events import (
    ADD_REMOVE,
    REPLACE_ONE,
    Event,
    GaussianEvent,
    message_multiplier,
    sampled_event,
    sum_multiplier,
)
from fedllm.privacy.ledger import counted

# Which noise stands between a unit and the models. "gaussian": the model is a function of the noisy sum.
# "gaussian_each": every message is decoded on its own, so that only its own noise counts (absent units being stood in
# for by noise-only messages).
_RELEASED_MULTIPLIER = {"gaussian": sum_multiplier, "gaussian_each": message_multiplier}

SHARE_ALONE = "each message is protected by its own noise share alone: the transport does not aggregate securely"
TRUSTED = "none: trusted"
NO_NOISE = "no noise"


def epsilon_release(header: dict, entries: list[dict]) -> PrivacyAnswer:
    """Epsilon at the header's target delta against whoever sees the published models, both stages, all attempts."""
    if _disabled(header):
        return _none(header, "release", ADD_REMOVE, "pld", NO_NOISE)
    accountant = accountants.create("pld", ADD_REMOVE)
    for entry in counted(entries):
        accountant.compose(_release_event(header, entry))
    return replace(accountant.epsilon(header["target"]["delta"]), unit=header["unit"], adversary="release")


def epsilon_server(header: dict, entries: list[dict], participations: int | None = None) -> PrivacyAnswer:
    """Epsilon at the header's target delta against the server itself.

    participations: None for a client that took part in every round (the worst case); p >= 0 for one that took part p
    times, then in the p rounds with the least noise.
    """
    if _disabled(header):
        return _none(header, "server", REPLACE_ONE, "gdp", NO_NOISE)
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


def epsilon_by_round(header: dict, entries: list[dict]) -> list[tuple[str, int, float | None, float | None]]:
    """(stage, round, release epsilon, server epsilon) after each counted entry; None where there is no figure."""
    spent = counted(entries)
    rows = []
    for end, entry in enumerate(spent, start=1):
        so_far = spent[:end]
        rows.append(
            (
                entry["stage"],
                entry["round"],
                epsilon_release(header, so_far).epsilon,
                epsilon_server(header, so_far).epsilon,
            )
        )
    return rows


def privacy_marks(header: dict) -> tuple[bool, list[str]]:
    """(private, why not), which stand beside every figure: e.g. (False, ['fixed seed', 'records shared'])."""
    why = header["why_not_private"] or []
    why = [why] if isinstance(why, str) else list(why)
    return bool(header["private"]) and not why, why


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
