"""Files as columns: csv, tsv, jsonl and parquet, and the demo assets' own formats."""

import csv
import html
import json
from collections.abc import Callable
from pathlib import Path

from fedllm.errors import UserError

Columns = dict[str, list]  # column name -> one value a row; all columns equally long

FIELD_LIMIT = 1 << 26  # characters in one csv field


def read_file(path: Path) -> Columns:
    """The columns of one csv, tsv, jsonl or parquet file, chosen by its suffix.

    Raises: UserError for a missing file, an unknown suffix or a line that cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected one that exists ({', '.join(READERS)})")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; expected {', '.join(READERS)}")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_delimited(path: Path, delimiter: str, skip: int = 0) -> Columns:
    """The columns of a delimited file with a header line; `skip` lines after the header are left out."""
    csv.field_size_limit(FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            rows = [row for row in csv.reader(stream, delimiter=delimiter) if row]
        except csv.Error as error:
            raise UserError(f"{path}: {error}") from error
    if not rows:
        raise UserError(f"{path}: empty file; expected a header line with column names")
    header, body = rows[0], rows[1 + skip :]
    for number, row in enumerate(body, 2 + skip):
        if len(row) != len(header):
            raise UserError(f"{path}: row {number} has {len(row)} fields, expected {len(header)} as in the header")
    return {name: [row[j] for row in body] for j, name in enumerate(header)}


def read_jsonl(path: Path) -> Columns:
    """The columns of a file with one JSON object a line; a key that a line lacks is None there."""
    rows = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}: line {number} is {type(row).__name__}, expected an object")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def read_parquet(path: Path) -> Columns:
    """The columns of a Parquet file."""
    import pyarrow.parquet
    from pyarrow.lib import ArrowException

    try:
        return pyarrow.parquet.read_table(path).to_pydict()
    except ArrowException as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error


READERS: dict[str, Callable[[Path], Columns]] = {
    ".csv": lambda path: read_delimited(path, ","),
    ".tsv": lambda path: read_delimited(path, "\t"),
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}


def read_movie_reviews(folder: Path) -> tuple[Columns, None]:
    """Rated review snippets; the sign of the mean rating is the label, ratings of exactly 0 have none."""
    text = (folder / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines() if line.count("\t") == 2]
    rated = [(float(rating), html.unescape(snippet).strip()) for _, rating, snippet in rows if float(rating) != 0]
    return {
        "text": [snippet for _, snippet in rated],
        "label": ["positive" if rating > 0 else "negative" for rating, _ in rated],
    }, None


def read_drug_reviews(folder: Path) -> tuple[Columns, Columns]:
    """Patient reviews rated negative, neutral or positive, with the columns drugName and condition to group by."""

    def clean(name: str) -> Columns:
        columns = read_delimited(folder / name, "\t")
        columns["text"] = [_unquote(html.unescape(review)) for review in columns.pop("review")]
        columns["label"] = columns.pop("rating")
        return columns

    return clean("drugsComTrain.tsv"), clean("drugsComTest.tsv")


def read_orange(stem: str) -> Callable[[Path], tuple[Columns, Columns]]:
    """A reader of Orange .tab files: names, then a line of types and a line of roles, then rows."""

    def read(folder: Path) -> tuple[Columns, Columns]:
        parts = (read_delimited(folder / f"{stem}-{part}.tab", "\t", skip=2) for part in ("train", "test"))
        train, test = ({"text": part["Text"], "label": part["Category"]} for part in parts)
        return train, test

    return read


def _unquote(text: str) -> str:
    return " ".join(text.strip().strip('"').split())
