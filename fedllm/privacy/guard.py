"""May the next round run? Asked before every release, answered from the ledger."""

from fedllm.privacy import adversaries
from fedllm.privacy.answers import PrivacyAnswer

_ADVERSARIES = {"release": adversaries.epsilon_release, "server": adversaries.epsilon_server}


def epsilon_of_target(header: dict, entries: list[dict]) -> PrivacyAnswer:
    """The epsilon of the adversary that the header's target names. Raises ValueError for an unknown adversary."""
    name = header["target"]["adversary"]
    if name not in _ADVERSARIES:
        raise ValueError(f"Expected target adversary={name!r} to be one of {', '.join(_ADVERSARIES)}")
    return _ADVERSARIES[name](header, entries)


def may_run(header: dict, entries: list[dict], next_entry: dict) -> bool:
    """Whether the target adversary's epsilon stays within the target with one more release.

    next_entry: as for `Ledger.append`. Always true where privacy is disabled, and where the target is a published claim, which the
    truth may exceed from the first round on; never true where there is no finite figure to hold.
    """
    if {"privacy disabled", adversaries.PUBLISHED} & set(adversaries.privacy_marks(header)[1]):
        return True
    answer = epsilon_of_target(header, [*entries, {"id": "next", **next_entry}])
    return answer.epsilon is not None and answer.epsilon <= header["target"]["epsilon"]
