"""Text and labels of a task, from a demo asset, a hub id, or local files, as a train part and a held-out part."""

import dataclasses
import filecmp
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedllm.data import tables
from fedllm.data.assets import ASSETS, fetch
from fedllm.data.tables import Columns
from fedllm.errors import UserError
from fedllm.schema import GENERATED

_PLACE = re.compile(r"\{([^{}]+)\}")  # of a column in a template
HELD_OUT = ("test", "validation", "validation_matched")  # parts of hub datasets, the first that has labels
SPLIT_SEED = 20_170  # the held-out part is public and the same for every run, whatever the run's own seed


@dataclass(frozen=True)
class Table:
    """Examples: texts [rows]; labels [rows], indices into label_names, or None; users [rows], indices, or None."""

    texts: list[str]
    labels: np.ndarray | None
    label_names: list[str]
    users: np.ndarray | None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int] | np.ndarray) -> "Table":
        """The table of these rows, in this order."""
        rows = np.asarray(rows, dtype=np.int64)
        return Table(
            [self.texts[i] for i in rows],
            None if self.labels is None else self.labels[rows],
            self.label_names,
            None if self.users is None else self.users[rows],
        )


@dataclass(frozen=True)
class Dataset:
    """A source's two parts. `train` is private unless the source is public text; `test` is public by statement."""

    name: str
    train: Table
    test: Table


@dataclass(frozen=True)
class _Parts:
    """What a source holds before columns are chosen."""

    train: Columns
    test: Columns | None
    where: str


DATA_ASSETS: dict[str, Callable[[Path], tuple[Columns, Columns | None]]] = {
    "movie-reviews": tables.read_movie_reviews,
    "reuters-r8": tables.read_orange("reuters-r8"),
    "newsgroups": tables.read_orange("20newsgroups"),
    "drug-reviews": tables.read_drug_reviews,
}


def load(
    source: str,
    *,
    train_examples: int | None = None,
    eval_examples: int = 2000,
    labelled: bool = True,
    text: str = "text",
    label: str = "label",
    user: str | None = None,
    test: str | None = None,
) -> Dataset:
    """Read a source and hold part of it out.

    Args:
        source: a demo asset, a csv, tsv, jsonl or parquet file, a folder with train.* (and test.*) of these, or a hub
            id (`owner/name`, or `owner/name:config`).
        train_examples: the first so many, at least 1, and no more is read of a hub dataset than they and the held-out part; None for all.
        eval_examples: size of the held-out part, at least 1. A source with a test part of its own, or with `test`
            (another file) named, is not split; a larger test part is cut down to this many at random.
        labelled: whether each example needs a label; otherwise the label column may be missing.
        text, label, user: column names. Rows with blank text are left out. text may be a template over columns, such as
            "{question} {answer}".
    Raises: UserError for a missing file or column, an unknown label, an empty source, too few examples.
    """
    parts = _read(source, None if train_examples is None else train_examples + eval_examples)
    found = _split(source, parts, eval_examples, labelled, text, label, user, test)
    return found if train_examples is None else dataclasses.replace(found, train=_first(found.train, train_examples))


def _first(table: Table, count: int) -> Table:
    """The first rows; users are numbered anew."""
    kept = table.take(np.arange(min(count, len(table))))
    return kept if kept.users is None else dataclasses.replace(kept, users=np.unique(kept.users, return_inverse=True)[1].astype(np.int64))


def _split(
    source: str, parts: _Parts, eval_examples: int, labelled: bool, text: str, label: str, user: str | None, test: str | None
) -> Dataset:
    """Training and held-out part of what was read."""
    train = _table(parts.train, parts.where, labelled, text, label, user, names=None)
    held_out = parts.test
    if test is not None:
        held_out = _read(test).train
    if held_out is not None:
        where = test or f"{parts.where} (test part)"
        table = _table(held_out, where, labelled, text, label, None, names=train.label_names)
        return Dataset(source, train, _sample(table, eval_examples))
    if len(train) <= eval_examples:
        raise UserError(
            f"{source}: {len(train)} examples, too few to hold out task.eval_examples={eval_examples}; "
            "expected fewer held-out examples or a task.test file"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    if train.users is None:
        return Dataset(source, train.take(np.sort(order[eval_examples:])), train.take(order[:eval_examples]))
    return _split_users(source, train, eval_examples)


def _split_users(source: str, table: Table, eval_examples: int) -> Dataset:
    """Hold out whole users, at random until there are enough examples: no unit is private and public at once."""
    users = np.random.default_rng(SPLIT_SEED).permutation(table.users.max() + 1)
    reached = np.cumsum(np.bincount(table.users)[users])
    held_out = np.isin(table.users, users[: np.searchsorted(reached, eval_examples) + 1])
    if held_out.all():
        raise UserError(f"{source}: too few users to hold out task.eval_examples={eval_examples} in whole users; expected fewer")
    train = table.take(np.flatnonzero(~held_out))
    renumbered = np.unique(train.users, return_inverse=True)[1].astype(np.int64)
    test = _sample(table.take(np.flatnonzero(held_out)), eval_examples)
    return Dataset(source, dataclasses.replace(train, users=renumbered), test)


def check_public(public: str, source: str, test: str | None = None) -> None:
    """Raise UserError where the public text is the task's own data: its gradients would then not be free."""
    for private in (source, test):
        if private is not None and _same(public, private):
            raise UserError(
                f"task.public={public} is the task's own data; expected another source, such as "
                f"{next(name for name in DATA_ASSETS if name not in (source, public))}"
            )


def _same(one: str, other: str) -> bool:
    """Whether two sources share data: by name (a hub id without its config), by path, or by a file's content."""
    if one.strip().lower().partition(":")[0] == other.strip().lower().partition(":")[0]:
        return True
    first, second = (Path(name).expanduser() for name in (one, other))
    if not (first.exists() and second.exists()):
        return False
    first, second = first.resolve(), second.resolve()
    if first == second or first in second.parents or second in first.parents:
        return True
    return any(filecmp.cmp(a, b, shallow=False) for a in _files(first) for b in _files(second))


def _files(path: Path) -> list[Path]:
    """The data files of a source: itself, or those of a folder."""
    return [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix.lower() in tables.READERS]


def _read(source: str, rows: int | None = None) -> _Parts:
    """Columns of a source; rows: of a hub dataset's training part no more than the first so many."""
    if source in DATA_ASSETS:
        return _Parts(*DATA_ASSETS[source](fetch(source)), source)
    if source == GENERATED:
        raise UserError(f"{GENERATED}: text that a language model writes is no task; expected it in task.public alone")
    if source in ASSETS:
        raise UserError(f"{source} is a model; expected a data source such as {', '.join(DATA_ASSETS)}")
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() in tables.READERS or path.exists():
        return _Parts(tables.read_file(path), None, source)
    return _read_hub(source, rows)


def _read_folder(folder: Path) -> _Parts:
    found = {}
    for part in ("train", "test"):
        matches = [path for path in sorted(folder.glob(f"{part}.*")) if path.suffix.lower() in tables.READERS]
        if len(matches) > 1:
            names = ", ".join(path.name for path in matches)
            raise UserError(f"{folder}: several {part} files ({names}); expected one")
        found[part] = matches[0] if matches else None
    if found["train"] is None:
        raise UserError(f"{folder}: no train file; expected train{', train'.join(tables.READERS)}")
    test = None if found["test"] is None else tables.read_file(found["test"])
    return _Parts(tables.read_file(found["train"]), test, str(found["train"]))


def _read_hub(source: str, rows: int | None) -> _Parts:
    import datasets
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    name, _, config = source.partition(":")
    try:
        parts = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub client raises many types; each means: this source cannot be had
        raise UserError(
            f"{source}: not a demo asset ({', '.join(DATA_ASSETS)}), no such file or folder, and as a hub id: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    if "train" not in parts:
        raise UserError(f"{source}: no part named train; it has {', '.join(parts)}")
    test = next((part for part in HELD_OUT if part in parts and not _unlabelled(parts[part])), None)
    if rows is not None:
        parts["train"] = parts["train"].select(range(min(rows, len(parts["train"]))))
    columns = [_hub_columns(parts[part]) if part else None for part in ("train", test)]
    return _Parts(columns[0], columns[1], source)


def _unlabelled(part) -> bool:
    """Whether a part of a hub dataset has classes but tells none, as the test parts of GLUE: there every number is -1."""
    classes = [name for name, feature in part.features.items() if hasattr(feature, "int2str")]
    return any(all(i is None or i < 0 for i in part[name]) for name in classes)


def _hub_columns(part) -> Columns:
    """A hub dataset's columns, with class numbers replaced by the class names that it carries."""
    columns = {name: list(part[name]) for name in part.column_names}
    for name, feature in part.features.items():
        if hasattr(feature, "int2str"):
            columns[name] = [feature.int2str(i) if i is not None and i >= 0 else None for i in columns[name]]
    return columns


def _table(
    columns: Columns, where: str, labelled: bool, text: str, label: str, user: str | None, names: list[str] | None
) -> Table:
    texts = _texts(columns, text, where)
    rows = [i for i, value in enumerate(texts) if isinstance(value, str) and value.strip()]
    if not rows:
        raise UserError(f"{where}: empty: no row has text in column {text!r}")
    labels = None
    label_names: list[str] = []
    if labelled:
        values = _column(columns, label, "label", where)
        strings = [None if values[i] is None else str(values[i]).strip() for i in rows]
        label_names = names if names is not None else _label_names(strings, label, where)
        index = {name: i for i, name in enumerate(label_names)}
        for i, value in zip(rows, strings, strict=True):
            if value not in index:
                raise UserError(f"{where}: unknown label {value!r} in row {i + 1}; expected {', '.join(label_names)}")
        labels = np.array([index[value] for value in strings], dtype=np.int64)
    users = None
    if user is not None:
        values = _column(columns, user, "user", where)
        users = np.unique(np.array([str(values[i]) for i in rows]), return_inverse=True)[1].astype(np.int64)
    return Table([texts[i].strip() for i in rows], labels, label_names, users)


def _texts(columns: Columns, text: str, where: str) -> list:
    """The text column, or a template filled from several; a row in which all of these are blank is blank."""
    names = _PLACE.findall(text)
    if text in columns or not names:
        return _column(columns, text, "text", where)
    found = {name: [str(value or "").strip() for value in _column(columns, name, "text", where)] for name in names}
    rows = (dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True))
    filled = (_PLACE.sub(lambda place: row[place[1]], text) if any(row.values()) else None for row in rows)  # noqa: B023
    return [re.sub(r"\n{3,}", "\n\n", each) if each is not None else None for each in filled]  # an empty column leaves no gap


def _column(columns: Columns, name: str, role: str, where: str) -> list:
    if name not in columns:
        there = ", ".join(repr(column) for column in columns if column)
        raise UserError(f"{where}: no column {name!r} (task.columns.{role}); it has {there or 'no columns'}")
    return columns[name]


def _label_names(values: list[str | None], label: str, where: str) -> list[str]:
    names = {value for value in values if value}
    if len(names) < 2:
        raise UserError(f"{where}: column {label!r} holds {len(names)} labels; expected at least 2")
    return sorted(names, key=lambda name: (int(name), name) if all(map(_is_int, names)) else (0, name))


def _is_int(value: str) -> bool:
    return value.lstrip("-").isdecimal()


def _sample(table: Table, count: int) -> Table:
    """At most `count` rows in random order: the first of them are looked at after every round, and a file may be sorted by label."""
    return table.take(np.random.default_rng(SPLIT_SEED).permutation(len(table))[:count])
