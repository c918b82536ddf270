"""What a run's config makes of its model and its clients: clip groups, weights, and whether the adapter itself is clipped."""

from __future__ import annotations

from dataclasses import dataclass

from dr_encoder.layout import AdapterLayout
from fedllm.data.partition import Partition
from fedllm.privacy.groups import JOINT, Group, clip_groups
from fedllm.schema import Config


@dataclass(frozen=True)
class Mechanism:
    """Public facts that every private sum of stage 2 shares.

    groups: of coordinates that are clipped apart; none where all are clipped together, or nothing is. of_state: the new adapter itself is
    clipped and noised, not its change. weights: of each client in the sum, mean 1; None: all alike.
    """

    groups: tuple[Group, ...] = ()
    of_state: bool = False
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(cls, config: Config, layout: AdapterLayout, partition: Partition) -> Mechanism:
        clip, private = config.privacy.clip, config.privacy.enabled
        return cls(
            groups=clip_groups(layout, clip.groups) if private and clip.groups != JOINT else (),
            of_state=private and clip.of == "state",
            weights=by_examples(partition) if config.federation.weights == "examples" else None,
        )


def by_examples(partition: Partition) -> tuple[float, ...]:
    """Each client's share of all records times the number of clients."""
    counts = [len(partition.records(client)) for client in range(partition.clients)]
    mean = sum(counts) / len(counts)
    return tuple(count / mean for count in counts)
