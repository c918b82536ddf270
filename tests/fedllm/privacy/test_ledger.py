"""The ledger: what a crash leaves behind, who may hold it, what counts."""

import json
import os
import subprocess
import sys

import pytest

from fedllm.errors import UserError
from fedllm.privacy import ledger as module
from fedllm.privacy.ledger import Ledger, counted, read_ledger

HEADER = {
    "run": "r",
    "data": "movie-reviews",
    "clients": 100,
    "target": {"adversary": "release", "epsilon": 8, "delta": 1e-4},
    "planned_rounds": 3,
    "private": True,
    "why_not_private": [],
    "unit": "client",
}


def entry(stage="stage2", round=0, rng="os", **changes):
    base = {
        "stage": stage,
        "round": round,
        "mechanism": "gaussian",
        "noise_multiplier": 1.0,
        "clip": 0.1,
        "sampling_rate": 0.1,
        "max_cohort": 30,
        "shares": 30,
        "noise": "distributed",
        "unit": "client",
        "relation": "add-or-remove-one",
        "codec": "linear:0123",
        "prior": "public",
        "rng": rng,
    }
    return {**base, **changes}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def start(path, count=2):
    with Ledger.create(path, HEADER) as ledger:
        for round in range(count):
            ledger.append(entry(round=round))
    return path.read_bytes()


def test_round_trip_and_attempts(path):
    start(path)
    with Ledger.open(path) as ledger:
        again = ledger.append(entry(round=1))
        first = ledger.append(entry(stage="stage1", round=1))
    assert (again["id"], again["attempt"]) == ("stage2/round1", 2)
    assert (first["id"], first["attempt"]) == ("stage1/round1", 1)
    header, entries = read_ledger(path)
    assert header == {"v": 1, **HEADER}
    assert [(e["id"], e["attempt"]) for e in entries][:3] == [
        ("stage2/round0", 1),
        ("stage2/round1", 1),
        ("stage2/round1", 2),
    ]


def test_every_crash_point_keeps_all_finished_entries(path):
    whole = start(path, 3)
    lines = whole.splitlines(keepends=True)
    header_end, last_start = len(lines[0]), len(whole) - len(lines[-1])
    for cut in [*range(header_end, header_end + 3), *range(last_start, len(whole) + 1, 7), len(whole)]:
        path.write_bytes(whole[:cut])
        finished = whole[:cut].count(b"\n") - 1
        with Ledger.open(path) as ledger:
            kept = len(ledger.entries)
            ledger.append(entry(round=9))
        # A line that lost nothing but its newline is whole and counts: over-counting is the safe side.
        assert kept == finished
        assert [e["round"] for e in read_ledger(path)[1]] == [*range(finished), 9]
    path.write_bytes(whole[:-1])
    with Ledger.open(path) as ledger:
        assert len(ledger.entries) == 3
    assert path.read_bytes() == whole


def test_torn_tail_of_zeros_is_dropped_and_reading_leaves_it(path):
    whole = start(path)
    path.write_bytes(whole + b"\0" * 40)
    assert len(read_ledger(path)[1]) == 2
    assert path.read_bytes() == whole + b"\0" * 40
    Ledger.open(path).close()
    assert path.read_bytes() == whole


def test_a_crash_before_the_header_released_nothing(path):
    path.write_bytes(b'{"v": 1, "run"')
    with pytest.raises(UserError, match="nothing was released"):
        Ledger.open(path)


@pytest.mark.parametrize("bad", [b"garbage\n", b"{}\n", b"[1]\n", b"\n", b'{"v": 2}\n'])
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_damaged_finished_line_is_refused(path, bad, position):
    lines = start(path).splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:position], bad, *lines[position:]]))
    with pytest.raises(UserError, match=f"line {position + 1}"):
        Ledger.open(path)


def test_never_overwrites(path):
    before = start(path)
    with pytest.raises(UserError, match="never overwritten"):
        Ledger.create(path, HEADER)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="cannot open"):
        Ledger.open(path.with_name("missing.jsonl"))


def test_second_holder_is_refused_until_the_first_lets_go(path):
    start(path)
    code = (
        "import sys; from fedllm.privacy.ledger import Ledger; from fedllm.errors import UserError\n"
        "try: Ledger.open(sys.argv[1])\nexcept UserError as e: print(e)\nelse: print('opened')"
    )
    command = [sys.executable, "-c", code, str(path)]
    with Ledger.open(path):
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "in use by another process" in output
        assert output.count("\n") == 1
        assert len(read_ledger(path)[1]) == 2
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "opened\n"


def test_on_disk_before_append_returns(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))
    with Ledger.create(path, HEADER) as ledger:
        synced.clear()
        ledger.append(entry())
        assert synced == [path.stat().st_ino, path.parent.stat().st_ino]
        assert json.loads(path.read_bytes().splitlines()[-1])["id"] == "stage2/round0"


def test_a_full_disk_takes_the_line_back_and_stops(path, monkeypatch):
    before = start(path)
    ledger = Ledger.open(path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        ledger.append(entry(round=2))
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="closed"):
        ledger.append(entry(round=2))


def test_incomplete_or_infinite_records_are_refused(path):
    with Ledger.create(path, HEADER) as ledger:
        short = entry()
        del short["clip"]
        with pytest.raises(ValueError, match="clip"):
            ledger.append(short)
        with pytest.raises(ValueError):
            ledger.append(entry(noise_multiplier=float("inf")))
        assert ledger.entries == []
    with pytest.raises(ValueError, match="planned_rounds"):
        Ledger.create(path.with_name("other"), {k: v for k, v in HEADER.items() if k != "planned_rounds"})


def test_what_counts():
    fresh = [{"id": "a", "attempt": 1, **entry()}, {"id": "a", "attempt": 2, **entry()}]
    assert len(counted(fresh)) == 2
    seeded = [{"id": "a", "attempt": n, **entry(rng="seeded")} for n in (1, 2)]
    assert len(counted(seeded)) == 1
    other_code = {"id": "a", "attempt": 3, **entry(rng="seeded", codec="linear:9999")}
    assert len(counted([*seeded, other_code])) == 2
