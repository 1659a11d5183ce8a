"""Transfer sets larger than memory: the same rows, in the same order, as if all had been read at once."""

from __future__ import annotations

import csv
import gzip
import json

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill.data import remote
from distill.data.corpus import Seen
from distill.data.packing import pack_on_disk
from distill.data.splits import load_splits, load_table
from distill.data.streams import ROWS, is_large, read_parts
from distill.errors import DataError
from distill.lessons import Lessons
from distill.pipeline import run_stages
from distill.progress import SILENT
from distill.recipe import Recipe
from distill.tasks import concatenate
from distill.tasks.encoded import SOURCE, pack
from distill.teacher import Checkpoint

TEXTS = [f"sentence number {number} of them" for number in range(3 * ROWS // 2)]


def write(path, texts):
    """One of the formats, by the file's name."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
        return path
    lines = {
        "csv": ["text,more", *(f'"{text}",1' for text in texts)],
        "tsv": ["text\tmore", *(f"{text}\t1" for text in texts)],
        "jsonl": [json.dumps({"text": text}) for text in texts],
        "txt": texts,
    }[kind]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz", "a.jsonl", "a.jsonl.gz", "a.txt.gz", "a.parquet"])
def test_parts_are_the_whole(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    parts = list(read_parts(path))
    assert len(parts) > 1
    assert max(map(len, parts)) <= ROWS
    assert [text for part in parts for text in part.columns["text"]] == TEXTS
    assert [part.first for part in parts] == np.cumsum([0, *map(len, parts)])[:-1].tolist()
    if not name.endswith(".gz"):
        assert load_table(path)["text"][:] == TEXTS


def test_a_folder_is_its_files_in_order(tmp_path):
    for name, begin in (("b/2.jsonl.gz", 5), ("a.csv", 0), ("c.txt", 9)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, TEXTS[begin : begin + 5])
    (tmp_path / "notes.md").write_text("not data")
    found = [text for part in read_parts(tmp_path) for text in part.columns["text"]]
    assert found == [*TEXTS[:5], *TEXTS[5:10], *TEXTS[9:14]]
    assert is_large(tmp_path)
    (tmp_path / "0.csv").touch()  # says nothing, not even its columns
    (tmp_path / "0.json.gz").touch()  # of no kind that can be read so
    assert [text for part in read_parts(tmp_path) for text in part.columns["text"]] == found
    (tmp_path / "0.csv").unlink()
    assert not is_large(tmp_path / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no file to read. Files end in .csv"):
        list(read_parts(tmp_path / "empty"))


def test_a_saved_dataset_is_sliced(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    parts = list(read_parts(tmp_path / "saved"))
    assert [text for part in parts for text in part.columns["text"]] == TEXTS
    assert len(parts) == 2
    assert not is_large(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.jsonl", b'{"text": "one"}\n' * ROWS + b'{"text": 5}', rf"row {ROWS + 1}: 'text' is int, not text"),
        ("a.jsonl", b'{"text": "one"}\n' * ROWS + b"{", rf"row {ROWS + 1}: line {ROWS + 1} is not JSON"),
        ("a.csv", b"text\n" + b"one\n" * ROWS + b"a,b\n", rf"row {ROWS + 1}: line {ROWS + 2} has 2 fields"),
        ("a.txt.gz", b"no gzip", r"a.txt.gz: cannot be read \(Not a gzipped file"),
        (
            "a.csv.gz",
            gzip.compress(b"text\n" + b"one\n" * 9, mtime=0)[:-9],
            r"a.csv.gz: cannot be read \(Compressed file ended",
        ),
        ("a.csv.gz", gzip.compress(b"words\none\n", mtime=0), r"there is no column 'text'; columns are 'words'"),
    ],
)
def test_an_unusable_row_is_named_by_its_place(tmp_path, intents_folder, monkeypatch, name, data, match):
    monkeypatch.setattr("distill.data.streams.LARGE", 1)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=match):
        load_splits(intents_folder / "train.csv", unlabelled=[tmp_path / name], folder=tmp_path / "work")


@given(parts=st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=12))
@settings(max_examples=200, deadline=None)
def test_a_set_in_runs_is_a_set(parts):
    seen, known = Seen(), set()
    for part in parts:
        new = seen.add(np.array(part, np.uint64))
        assert new.tolist() == [key not in known and key not in part[:place] for place, key in enumerate(part)]
        known |= set(part)
        assert len(seen) == len(known)
    assert seen.holds(np.arange(41, dtype=np.uint64)).tolist() == [key in known for key in range(41)]


def test_in_parts_or_at_once_the_same_rows_are_kept(tmp_path, intents_folder, monkeypatch):
    with (intents_folder / "train.csv").open() as file:
        known = [row["text"] for row in csv.DictReader(file)][:50]
    texts = [*TEXTS[:ROWS], *known, *(text.upper() for text in TEXTS[:100]), *TEXTS[ROWS:], "", TEXTS[3]]
    path = write(tmp_path / "a.parquet", texts)

    def load(folder, **more):
        return load_splits(intents_folder / "train.csv", unlabelled=[path], on_bad_row="skip", folder=folder, **more)

    whole = load(None)
    monkeypatch.setattr("distill.data.streams.LARGE", 1)
    first = load(tmp_path / "work")
    assert first.unlabelled["text"][:] == whole.unlabelled["text"][:] == TEXTS
    assert first.unlabelled.features == whole.unlabelled.features
    assert sorted(first.report[:-1]) == sorted(whole.report[:-1])
    assert any("151 rows dropped" in line and "101 repeat another" in line for line in first.report), first.report
    written = (tmp_path / "work/text.arrow").stat().st_mtime_ns
    assert load(tmp_path / "work").report == first.report
    assert (tmp_path / "work/text.arrow").stat().st_mtime_ns == written
    write(path, TEXTS[:10])
    assert len(load(tmp_path / "work").unlabelled) == 10
    named = load(tmp_path / "work", prefix="query: ").unlabelled["text"][:]
    assert named == [f"query: {text}" for text in TEXTS[:10]]


def test_words_of_packed_files_and_folders_are_read_in_parts(tmp_path):
    def lines(texts, **label):
        return "\n".join(json.dumps({"text": text.split(), **label}) for text in texts)

    (tmp_path / "train.jsonl").write_text(lines(TEXTS[:40], label=["O"] * 4 + ["B-x"]))
    (tmp_path / "free").mkdir()
    (tmp_path / "free/a.jsonl").write_text(lines(TEXTS[30:50]))
    (tmp_path / "more.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[45:60]).encode()))
    sources = [tmp_path / "free", tmp_path / "more.jsonl.gz"]

    def free(folder):
        kinds = {"inputs": "words", "target": "tags", "labels": ["O", "B-x"]}
        return load_splits(tmp_path / "train.jsonl", unlabelled=sources, folder=folder, **kinds).unlabelled

    assert free(None).to_dict() == {"text": [text.split() for text in TEXTS[40:60]], "label": [None] * 20}
    assert free(tmp_path / "work").to_dict() == free(None).to_dict()
    assert free(tmp_path / "work").features == free(None).features


# On the disk


def encoded(rows, first=0):
    ids = [list(range(row, row + 1 + row % 4)) for row in range(first, first + rows)]
    flat = {
        SOURCE: np.arange(rows) // 2,
        "weight": np.ones(rows),
        "labels": 7 * first + np.arange(3 * rows, dtype=np.float32).reshape(rows, 3),  # of several labels
        "pixels": np.full((rows, 2, 2, 1), first, np.uint8),
    }
    return pack({"input_ids": ids, "tags": ids}, flat, cut=rows)


def test_packed_on_disk_is_packed_in_memory(tmp_path):
    parts = [encoded(5), encoded(0), encoded(9, 5)]
    there = pack_on_disk(iter(parts), tmp_path / "set", key="a")
    here = concatenate(parts)
    assert len(there) == len(here) == 14
    for row in range(14):
        assert there[row].keys() == here[row].keys()
        assert all(np.array_equal(there[row][name], here[row][name]) for name in here[row])
        assert there[row]["labels"].shape == (3,)
    assert there.cut == here.cut
    assert there.lengths.tolist() == here.lengths.tolist()
    with pytest.raises(ValueError, match="read-only"):
        there.ragged["input_ids"][0] = 1

    def never():
        raise AssertionError
        yield

    assert len(pack_on_disk(never(), tmp_path / "set", key="a")) == 14
    assert len(pack_on_disk(iter(parts[:1]), tmp_path / "set", key="b")) == 5


def test_a_large_transfer_set_trains_as_a_small_one(tmp_path, intents_folder, tiny_start, monkeypatch):
    with (intents_folder / "train.csv").open() as file:
        known = [row["text"] for row in csv.DictReader(file)]
    path = write(tmp_path / "free.jsonl", [f"{text} {other.split()[-1]}" for text in known[:80] for other in known[:2]])

    def loss(folder):
        recipe = Recipe.parse(
            {
                "output": str(folder),
                "teacher": {"start": str(tiny_start), "finetune": {"epochs": 1}},
                "student": {"layers": 1},
                "data": {name: str(intents_folder / f"{name}.csv") for name in ("train", "validation", "test")}
                | {"max_length": 32, "unlabelled": [str(path)]},
                "training": {"epochs": 1, "baseline": False, "precision": "fp32"},
            }
        )
        run_stages(recipe, until="train")
        facts = json.loads((folder / "work/state/train.json").read_text())["facts"]
        return [point["loss"] for point in facts["curve"] if "loss" in point]

    small = loss(tmp_path / "small")
    monkeypatch.setattr("distill.data.streams.LARGE", 1)
    monkeypatch.setattr("distill.lessons.LARGE", 1)
    monkeypatch.setattr("distill.lessons.CHUNK", 50)
    large = loss(tmp_path / "large")
    assert (tmp_path / "large/work/text/text.arrow").exists()
    assert list((tmp_path / "large/work/encoded").glob("*/input_ids.bin"))
    assert large == small


def test_token_ids_on_disk_are_those_of_the_texts_that_were_made(tmp_path, tiny_start, intents_folder, monkeypatch):
    """Another teacher has other neighbours of a word, and makes as many texts."""
    monkeypatch.setattr("distill.lessons.LARGE", 1)
    given = {
        "output": str(tmp_path),
        "task": "text-classification",
        "teacher": {"start": str(tiny_start)},
        "data": {"train": str(intents_folder / "train.csv"), "augment": {"copies": 1, "ways": ["drop"]}},
    }

    def transfer():
        lessons = Lessons(Recipe.parse(given), SILENT)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_start, num_labels=3)
        lessons.teacher = Checkpoint(model, AutoTokenizer.from_pretrained(tiny_start), lessons.splits.labels, "")
        return lessons.transfer

    first = transfer()
    path = tmp_path / "work/augmented.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps({**made, "texts": [f"{text} now" for text in made["texts"]]}))
    assert len(transfer()) == len(first)
    assert sum(transfer().lengths) > sum(first.lengths)


# Elsewhere


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    store.pipe("/data/a.csv", b"text,label\none,x\ntwo,y\n")
    store.pipe("/data/b.csv", b"text,label\nthree,x\n")
    yield store
    store.rm("/data", recursive=True)


def test_a_url_is_fetched_once_and_again_when_it_changes(elsewhere, tmp_path):
    assert load_table("memory://data/a.csv")["text"][:] == ["one", "two"]
    first = remote.fetch("memory://data/a.csv")
    assert first.is_relative_to(tmp_path / "cache")
    made = first.stat().st_mtime_ns
    assert remote.fetch("memory://data/a.csv") == first
    assert first.stat().st_mtime_ns == made
    elsewhere.pipe("/data/a.csv", b"text,label\nfour,x\nmore,y\n")
    assert load_table("memory://data/a.csv")["text"][:] == ["four", "more"]
    assert not list((tmp_path / "cache").rglob("*.writing"))


def test_a_folder_elsewhere_is_read_in_parts(elsewhere):
    assert [text for part in read_parts("memory://data") for text in part.columns["text"]] == ["one", "two", "three"]


def test_a_file_url_is_the_file(tmp_path):
    path = write(tmp_path / "a.csv", ["one"])
    assert remote.fetch(path.as_uri()) == path
    assert load_table(path.as_uri())["text"][:] == ["one"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("https://host/data/train.csv?download=true", "train.csv"),
        ("https://host/train.csv.gz?sign=a/b.c&of=d", "train.csv.gz"),
        ("https://host/download?file=train.csv", "download?file=train.csv"),
        ("bucket/what?/a#1.csv", "a#1.csv"),
    ],
)
def test_a_copy_is_called_as_the_file_and_not_as_the_query(path, name):
    assert remote.file_name(path) == name


def test_a_download_that_breaks_off_leaves_nothing(elsewhere, tmp_path, monkeypatch):
    def broken(source, file, size):
        file.write(source.read(5))
        raise OSError("connection lost")

    monkeypatch.setattr(remote.shutil, "copyfileobj", broken)
    with pytest.raises(
        DataError, match=r"memory://data/a.csv: cannot be read \(connection lost\). Look at the address"
    ):
        load_table("memory://data/a.csv")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("memory://nothing/here.csv", r"memory://nothing/here.csv: cannot be read"),
        ("nosuch://a/b.csv", r"nosuch://a/b.csv: cannot be read \(Protocol not known: nosuch"),
    ],
)
def test_what_cannot_be_reached_is_one_line(source, match):
    with pytest.raises(DataError, match=match):
        load_table(source)
