"""The ledger: append-only JSON lines of what was released, on disk *before* the noise is drawn. Imports stdlib only."""

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path

from fedllm.errors import UserError

VERSION = 1
PART_NAME = ".ledger.jsonl.part"  # a ledger whose header is being written
HEADER_KEYS = ("v", "run", "data", "clients", "target", "planned_rounds", "private", "why_not_private", "unit")
ENTRY_KEYS = tuple(
    [
        "v",
        "id",
        "attempt",
        "stage",
        "round",
        "mechanism",
        "noise_multiplier",
        "clip",
        "sampling_rate",
        "max_cohort",
        "shares",
        "noise",
        "unit",
        "relation",
        "codec",
        "prior",
        "rng",
    ]
)
_BOOKKEEPING = ("v", "id", "attempt")


def counted(entries: Iterable[dict]) -> list[dict]:
    """The entries that cost privacy. Fresh noise from the operating system costs at every attempt; an identical repeat
    under a fixed seed draws the very same noise on the very same sum and counts once."""
    kept, seen = [], set()
    for entry in entries:
        if entry["rng"] == "seeded":
            what = json.dumps({k: v for k, v in entry.items() if k not in _BOOKKEEPING}, sort_keys=True)
            if what in seen:
                continue
            seen.add(what)
        kept.append(entry)
    return kept


def read_ledger(path: str | Path) -> tuple[dict, list[dict]]:
    """(header, entries) of a ledger, read only and without the lock; an unfinished last line is ignored, not cut."""
    header, entries, _ = _parse(_read(Path(path)), path)
    return header, entries


class Ledger:
    """An open ledger, locked against every other process until `close` (or the end of a `with` block)."""

    def __init__(self, path: Path, descriptor: int, header: dict, entries: list[dict]) -> None:
        """Use `create` or `open`."""
        self.path, self.header, self._entries, self._fd = path, header, entries, descriptor

    @classmethod
    def create(cls, path: str | Path, header: dict) -> "Ledger":
        """Start a ledger. header: HEADER_KEYS without `v`, or more (`units`). Raises UserError if the file exists."""
        path = Path(path)
        header = {"v": VERSION, **header}
        _require(header, HEADER_KEYS, "ledger header")
        line = _line(header)
        part = path.with_name(PART_NAME)
        try:
            # Linked into place whole: a kill at any moment leaves either no ledger or one with its header.
            with part.open("wb") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            os.link(part, path)
            part.unlink()
        except FileExistsError:
            part.unlink()
            raise UserError(
                f"{path} exists: a ledger is never overwritten; resume the run or choose another output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"cannot create {path}: {error.strerror}") from None
        ledger = cls.open(path)
        ledger._sync()
        return ledger

    @classmethod
    def open(cls, path: str | Path) -> "Ledger":
        """Continue a ledger, cutting off an unfinished last line: its fsync never returned, so no noise was drawn.

        Raises UserError for a missing file, a second process, or a damaged line anywhere else.
        """
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise UserError(f"cannot open the ledger {path}: {error.strerror}") from None
        ledger = cls(path, descriptor, {}, [])
        try:
            _lock(descriptor, path)
            text = _read(path)
            ledger.header, ledger._entries, end = _parse(text, path)
            if end < len(text):
                os.ftruncate(descriptor, end)
                ledger._sync()
            elif not text.endswith(b"\n"):
                ledger._write(b"\n")
        except BaseException:
            ledger.close()
            raise
        return ledger

    @property
    def entries(self) -> list[dict]:
        """All entries, in order (a copy)."""
        return list(self._entries)

    def append(self, entry: dict) -> dict:
        """Record a release; when this returns, it is on disk and the noise may be drawn.

        entry: ENTRY_KEYS without v, id and attempt, which are filled in; any others besides. Returns the full entry.
        Raises UserError where the disk refuses: then nothing may be released.
        """
        name = f"{entry['stage']}/round{entry['round']}"
        attempt = 1 + sum(1 for earlier in self._entries if earlier["id"] == name)
        full = {"v": VERSION, "id": name, "attempt": attempt, **entry}
        _require(full, ENTRY_KEYS, "ledger entry")
        self._write(_line(full))
        self._entries.append(full)
        return full

    def close(self) -> None:
        """Release the lock; harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: bytes) -> None:
        if self._fd < 0:
            raise ValueError(f"the ledger {self.path} is closed")
        before = os.fstat(self._fd).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._fd, line[written:])
            self._sync()
        except OSError as error:
            # What reached the disk is unknown: take the line back where possible and never write again.
            try:
                os.ftruncate(self._fd, before)
            finally:
                self.close()
            raise UserError(f"cannot write the ledger {self.path}: {error.strerror}; nothing was released") from None

    def _sync(self) -> None:
        os.fsync(self._fd)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{path} is in use by another process: wait for it or stop it") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the ledger {path}: {error.strerror}") from None


def _parse(text: bytes, path: str | Path) -> tuple[dict, list[dict], int]:
    """(header, entries, length of the sound part). Only a last line without newline may be unsound."""
    lines = text.split(b"\n")
    tail = lines.pop()
    records = [_record(line, HEADER_KEYS if number == 0 else ENTRY_KEYS) for number, line in enumerate(lines)]
    if None in records:
        raise UserError(
            f"{path}, line {records.index(None) + 1}: not a ledger line of version {VERSION}; restore it from a copy"
        )
    end = len(text) - len(tail)
    last = _record(tail, ENTRY_KEYS) if records else None
    if last is not None:
        records.append(last)
        end = len(text)
    if not records:
        raise UserError(f"{path} has no complete first line: nothing was released under it; delete it and start again")
    return records[0], records[1:], end


def _record(line: bytes, keys: tuple[str, ...]) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    sound = isinstance(record, dict) and record.get("v") == VERSION and all(key in record for key in keys)
    return record if sound else None


def _line(record: dict) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _require(record: dict, keys: tuple[str, ...], what: str) -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
