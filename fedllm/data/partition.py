"""Who holds which records: a partition gives every client its privacy units, and every unit its records.

Clients are index ranges into one order of the items; nothing is kept for each client but, at most, one offset.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedllm.errors import UserError

UNITS = ("client", "user", "example")


@dataclass(frozen=True)
class Assignment:
    """An order of the items and where each client's range begins; None stands for ranges as even as can be."""

    order: np.ndarray  # [items]
    offsets: np.ndarray | None = None  # [clients + 1]


@dataclass(frozen=True)
class Items:
    """What a partition method may look at. An item is a record, or with unit=user a user."""

    count: int
    labels: np.ndarray | None  # [items]
    users: np.ndarray | None  # [items]


Method = Callable[[Items, int, np.random.Generator, dict], Assignment]
PARTITIONS: dict[str, Method] = {}


def register(name: str) -> Callable[[Method], Method]:
    """Add a partition method: (items, clients, generator, options) -> Assignment."""

    def add(method: Method) -> Method:
        PARTITIONS[name] = method
        return method

    return add


class Partition:
    """Records by client and by privacy unit.

    `clients` is their number; `shared` says that there are more clients than items, so that clients hold the same ones
    (for research only: no epsilon then covers a record).
    """

    def __init__(self, assignment: Assignment, clients: int, unit: str, user_records: "_Groups | None"):
        self.clients = clients
        self.unit = unit
        self._order = assignment.order
        self._offsets = assignment.offsets
        self._user_records = user_records
        self.shared = assignment.offsets is None and clients > len(assignment.order)

    def records(self, client: int) -> np.ndarray:
        """Indices of the client's records [records]."""
        items = self._items(client)
        if self._user_records is None:
            return items
        return np.concatenate([self._user_records[item] for item in items]) if len(items) else items

    def unit_ids(self, client: int) -> np.ndarray:
        """Identities of the client's privacy units [units], distinct over all clients unless `shared`."""
        return np.array([client], dtype=np.int64) if self.unit == "client" else self._items(client)

    def units(self, client: int, some: np.ndarray | slice = slice(None)) -> list[np.ndarray]:
        """The records of each of the client's units, in the order of `unit_ids`; of `some`, positions in it, only those are touched."""
        if self.unit == "client":
            return [self.records(client) for _ in self.unit_ids(client)[some]]
        items = self._items(client)[some]
        if self._user_records is not None:
            return [self._user_records[item] for item in items]
        return [np.array([item], dtype=np.int64) for item in items]

    @property
    def unit_count(self) -> int:
        """Privacy units over all clients."""
        return self.clients if self.unit == "client" else len(self._order)

    def _items(self, client: int) -> np.ndarray:
        if not 0 <= client < self.clients:
            raise IndexError(f"client {client} of {self.clients}")
        if self.shared:
            return self._order[[client % len(self._order)]]
        if self._offsets is not None:
            return self._order[self._offsets[client] : self._offsets[client + 1]]
        begin, end = (position * len(self._order) // self.clients for position in (client, client + 1))
        return self._order[begin:end]


class _Groups:
    """Records by group, as one order and offsets."""

    def __init__(self, group_of: np.ndarray):
        self.order = np.argsort(group_of, kind="stable").astype(np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(group_of))])

    def __getitem__(self, group: int) -> np.ndarray:
        return self.order[self.offsets[group] : self.offsets[group + 1]]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def make_partition(
    kind: str,
    *,
    records: int,
    clients: int,
    unit: str = "client",
    labels: np.ndarray | None = None,
    users: np.ndarray | None = None,
    seed: int = 0,
    **options: float,
) -> Partition:
    """Split records over clients.

    Args:
        kind: a name in PARTITIONS.
        records: how many there are, at least 1.
        clients: how many to split over, at least 1.
        unit: 'client'; 'user': users are what is split, whole, and each is a unit of its client; 'example'.
        labels: [records] class of each record (for dirichlet).
        users: [records] user of each record, 0 .. users-1 (for column, and for unit=user).
        seed: the split is a function of it and the other arguments. It is no secret.
        options: of the method, such as alpha.
    Raises: UserError for an unknown kind or unit, or what the method needs and lacks.
    """
    if kind not in PARTITIONS:
        raise UserError(f"federation.partition.kind={kind}: expected one of {', '.join(PARTITIONS)}")
    if unit not in UNITS:
        raise UserError(f"privacy.unit={unit}: expected one of {', '.join(UNITS)}")
    if records < 1 or clients < 1:
        raise UserError(f"federation.clients={clients} over {records} records: expected at least one of each")
    user_records = None
    items = Items(records, labels, users)
    if unit == "user":
        if users is None:
            raise UserError("privacy.unit=user: expected task.columns.user, the column that says whose each record is")
        user_records = _Groups(users)
        items = Items(len(user_records), _majority(labels, user_records), np.arange(len(user_records)))
    assignment = PARTITIONS[kind](items, clients, np.random.default_rng(seed), options)
    return Partition(assignment, clients, unit, user_records)


@register("iid")
def iid(items: Items, clients: int, generator: np.random.Generator, options: dict) -> Assignment:
    """At random and as evenly as can be. With more clients than items each client has one, several the same."""
    return Assignment(generator.permutation(items.count))


@register("dirichlet")
def dirichlet(items: Items, clients: int, generator: np.random.Generator, options: dict) -> Assignment:
    """Equal shares whose label mix is drawn from a Dirichlet distribution (Hsu, Qi, Brown 2019, section 3).

    Client c's mix is Dirichlet(alpha * labels * overall mix), which is the symmetric Dirichlet(alpha) for balanced
    labels: a small `alpha` (0.1) gives almost one label a client, a large one (100) the overall mix. Each place of a
    client asks for a label by that mix; places whose label has run out take what is left, at random.
    """
    alpha = float(options.get("alpha", 0.5))
    if not alpha > 0:
        raise UserError(f"federation.partition.alpha={alpha}: expected a number above 0")
    if items.labels is None:
        raise UserError("federation.partition.kind=dirichlet: expected a task with labels")
    if clients > items.count:
        raise UserError(f"federation.clients={clients}: expected at most {items.count}, one record each, for dirichlet")
    label_of = np.unique(items.labels, return_inverse=True)[1]
    share = np.bincount(label_of) / items.count
    place_offsets = np.arange(clients + 1) * items.count // clients
    client_of = np.repeat(np.arange(clients), np.diff(place_offsets))
    mixes = generator.dirichlet(np.maximum(alpha * len(share) * share, 1e-3), size=clients)
    asked = (generator.random(items.count)[:, None] > np.cumsum(mixes, 1)[client_of, :-1]).sum(1)
    order = np.full(items.count, -1, dtype=np.int64)
    left = []
    for label in range(len(share)):
        places = generator.permutation(np.flatnonzero(asked == label))
        holders = generator.permutation(np.flatnonzero(label_of == label))
        served = min(len(places), len(holders))
        order[places[:served]] = holders[:served]
        left.append(holders[served:])
    order[order < 0] = generator.permutation(np.concatenate(left))
    return Assignment(order, place_offsets)


@register("column")
def column(items: Items, clients: int, generator: np.random.Generator, options: dict) -> Assignment:
    """One client for each distinct value of the user column."""
    if items.users is None:
        raise UserError("federation.partition.kind=column: expected task.columns.user, the column that names clients")
    groups = _Groups(items.users)
    if len(groups) != clients:
        raise UserError(
            f"federation.clients={clients}: the user column has {len(groups)} values; expected as many clients"
        )
    return Assignment(groups.order, groups.offsets)


def _majority(labels: np.ndarray | None, groups: _Groups) -> np.ndarray | None:
    if labels is None:
        return None
    return np.array([np.bincount(labels[groups[group]]).argmax() for group in range(len(groups))])
