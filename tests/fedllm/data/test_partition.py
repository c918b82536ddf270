"""One class of rules for every registered partition, then what each promises of its own."""

import tracemalloc

import numpy as np
import pytest

from fedllm.data.partition import PARTITIONS, make_partition
from fedllm.errors import UserError

RECORDS, LABELS, USERS = 600, 4, 30
_generator = np.random.default_rng(0)
LABEL_OF = _generator.integers(0, LABELS, RECORDS)
USER_OF = np.concatenate([np.arange(USERS), _generator.integers(0, USERS, RECORDS - USERS)])


def build(kind: str, unit: str = "client", clients: int | None = None, seed: int = 1, **options):
    if clients is None:
        clients = USERS if kind == "column" else 23
    return make_partition(
        kind, records=RECORDS, clients=clients, unit=unit, labels=LABEL_OF, users=USER_OF, seed=seed, **options
    )


@pytest.mark.parametrize("unit", ["client", "user", "example"])
@pytest.mark.parametrize("kind", list(PARTITIONS))
class TestEveryPartition:
    def test_every_record_is_used_exactly_once(self, kind, unit):
        partition = build(kind, unit)
        assert not partition.shared
        held = np.concatenate([partition.records(client) for client in range(partition.clients)])
        assert sorted(held) == list(range(RECORDS))

    def test_units_part_the_clients_records(self, kind, unit):
        partition = build(kind, unit)
        ids = []
        for client in range(partition.clients):
            units = partition.units(client)
            ids += list(partition.unit_ids(client))
            assert len(units) == len(partition.unit_ids(client))
            some = np.arange(len(units))[::2]
            assert [list(unit) for unit in partition.units(client, some)] == [list(unit) for unit in units[::2]]
            together = np.concatenate(units) if units else []
            assert sorted(together) == sorted(partition.records(client))
        assert len(set(ids)) == len(ids) == partition.unit_count

    def test_the_unit_is_what_it_is_called(self, kind, unit):
        partition = build(kind, unit)
        for client in range(partition.clients):
            for identity, records in zip(partition.unit_ids(client), partition.units(client), strict=True):
                if unit == "user":
                    assert set(USER_OF[records]) == {identity}
                    assert len(records) == (identity == USER_OF).sum()
                elif unit == "example":
                    assert list(records) == [identity]
                else:
                    assert identity == client

    def test_a_seed_makes_one_partition(self, kind, unit):
        one, same, other = build(kind, unit), build(kind, unit), build(kind, unit, seed=2)
        lists = [[list(p.records(c)) for c in range(p.clients)] for p in (one, same, other)]
        assert lists[0] == lists[1]
        assert kind == "column" or lists[0] != lists[2]

    def test_no_client_outside_the_range(self, kind, unit):
        partition = build(kind, unit)
        for client in (-1, partition.clients):
            with pytest.raises(IndexError):
                partition.records(client)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
@pytest.mark.parametrize("clients", [1, 7, 599, 600])
def test_sizes_are_as_even_as_can_be(kind, clients):
    partition = build(kind, clients=clients)
    sizes = [len(partition.records(client)) for client in range(clients)]
    assert sum(sizes) == RECORDS and max(sizes) - min(sizes) <= 1


def skew(partition) -> float:
    """Mean over clients of the total-variation distance between its label mix and the overall one."""
    overall = np.bincount(LABEL_OF, minlength=LABELS) / RECORDS
    mixes = [
        np.bincount(LABEL_OF[partition.records(c)], minlength=LABELS) / len(partition.records(c))
        for c in range(partition.clients)
    ]
    return float(np.mean([np.abs(mix - overall).sum() / 2 for mix in mixes]))


def test_dirichlet_skew_follows_alpha():
    iid = skew(build("iid", clients=20))
    by_alpha = [skew(build("dirichlet", clients=20, alpha=alpha)) for alpha in (0.05, 1.0, 1000.0)]
    assert by_alpha[0] > 0.5 > by_alpha[1] > 0.2 > by_alpha[2]
    assert abs(by_alpha[2] - iid) < 0.05


def test_more_clients_than_records_share_them_evenly():
    partition = build("iid", clients=4 * RECORDS)
    assert partition.shared
    held = np.concatenate([partition.records(client) for client in range(partition.clients)])
    assert set(np.bincount(held)) == {4}


def test_a_million_clients_cost_what_the_records_cost():
    def peak(clients: int) -> int:
        tracemalloc.start()
        partition = make_partition("iid", records=8000, clients=clients, seed=0)
        for client in range(0, clients, clients // 20):
            partition.records(client)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(1_000_000) < 1.1 * peak(1000)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "idd"}, "expected one of iid"),
        ({"kind": "iid", "clients": 0}, "at least one"),
        ({"kind": "iid", "unit": "patient"}, "expected one of client, user, example"),
        ({"kind": "column", "clients": 23}, f"has {USERS} values"),
        ({"kind": "dirichlet", "clients": RECORDS + 1}, f"at most {RECORDS}"),
        ({"kind": "dirichlet", "alpha": 0.0}, "above 0"),
    ],
)
def test_what_makes_no_sense_is_one_line(arguments, says):
    with pytest.raises(UserError, match=says) as error:
        build(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "unit"), [("dirichlet", "client"), ("column", "client"), ("iid", "user")])
def test_a_missing_column_is_named(kind, unit):
    with pytest.raises(UserError, match=r"task with labels|task.columns.user"):
        make_partition(kind, records=10, clients=2, unit=unit)
