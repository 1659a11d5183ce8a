"""Reading, checking and splitting data; every refusal says where and what to do."""

from __future__ import annotations

import csv
import gzip
import json
import random

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data.fields import TARGETS
from distill.data.splits import content_fraction, content_key, load_splits, load_table
from distill.errors import DataError

WORDS = ["film", "joy", "mess", "idea", "slow", "quiet", "sad", "told", "badly", "second", "half"]


def rows_of(count, seed=0):
    draw = random.Random(seed)
    return [(f"{' '.join(draw.choices(WORDS, k=8))} {number}", draw.choice(["good", "bad"])) for number in range(count)]


def write_csv(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def rows():
    return rows_of(200)


@pytest.fixture
def train(tmp_path, rows):
    return write_csv(tmp_path / "train.csv", rows)


# Reading


def test_every_format_gives_the_same_rows(tmp_path, rows, train):
    columns = {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
    dataset = datasets.Dataset.from_dict(columns)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "arrow")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "arrows")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in rows))
    (tmp_path / "a.json").write_text(json.dumps([{"text": t, "label": n} for t, n in rows]))
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in rows))
    for name in ("train.csv", "a.parquet", "arrow", "arrows", "a.jsonl", "a.json", "a.tsv"):
        assert load_table(tmp_path / name).to_dict() == columns, name
    (tmp_path / "a.txt").write_text("\n".join(columns["text"]) + "\n\n \n")
    assert load_table(tmp_path / "a.txt").to_dict() == {"text": columns["text"]}


def test_saved_splits_are_found_by_their_usual_names(tmp_path, rows):
    parts = {"train": rows[:150], "dev": rows[150:180], "unsupervised": rows[180:]}
    made = {
        name: datasets.Dataset.from_dict({"text": [t for t, _ in part], "label": [n for _, n in part]})
        for name, part in parts.items()
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "all")
    splits = load_splits(tmp_path / "all", validation=tmp_path / "all", unlabelled=[tmp_path / "all"])
    assert [len(splits.train), len(splits.validation), len(splits.unlabelled)] == [150, 30, 20]
    with pytest.raises(DataError, match=r"all: has no split 'test'; splits are 'train', 'dev', 'unsupervised'\. Name"):
        load_table(tmp_path / "all", "test")


def test_csv_fields_stay_the_text_that_was_written(tmp_path):
    """`NA` and `null` are words and `007` is no number: readers that guess types lose such rows without a word."""
    texts = ["NA", "null", "None", "007", "1.0", 'she said "no"', "two\nlines", "a,b", "x" * 200_000]
    path = write_csv(tmp_path / "a.csv", [(text, index % 2) for index, text in enumerate(texts)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as a spreadsheet saves it
    assert load_table(path)["text"][:] == texts


def test_reading_leaves_no_cache_behind(tmp_path, train, monkeypatch):
    before = sorted(tmp_path.iterdir())
    load_splits(train)
    assert sorted(tmp_path.iterdir()) == before


def test_hub_id_that_cannot_be_reached():
    with pytest.raises(DataError, match=r"^someone/no-such-data:x: neither a file here nor readable.*Give a"):
        load_table("someone/no-such-data:x")


# Labels


def test_class_label_names_are_kept(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "eggs"])}
    )
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]}, features=features)
    dataset.save_to_disk(tmp_path / "arrow")
    dataset.to_parquet(tmp_path / "a.parquet")
    for name in ("arrow", "a.parquet"):
        splits = load_splits(tmp_path / name, validation=write_csv(tmp_path / "v.csv", [("d", "eggs")]))
        assert splits.labels == ["ham", "eggs"], name
        assert splits.train["label"][:] == ["ham", "eggs", "ham"]


def test_bare_numbers_are_sorted_as_numbers(tmp_path):
    rows = [(f"row {number}", number % 12) for number in range(60)]
    assert load_splits(write_csv(tmp_path / "a.csv", rows)).labels == [str(number) for number in range(12)]


def test_numbers_get_the_names_that_are_asked_for(tmp_path):
    rows = [(f"row {number}", number % 2) for number in range(60)]
    splits = load_splits(write_csv(tmp_path / "a.csv", rows), labels=["negative", "positive"])
    assert splits.labels == ["negative", "positive"]
    number = dict(rows)
    for text, label in zip(splits.train["text"], splits.train["label"], strict=True):
        assert splits.labels.index(label) == number[text]
    assert "labels: 0 is negative, 1 is positive" in splits.report


def test_labels_do_not_depend_on_row_order(tmp_path, rows, train):
    other = write_csv(tmp_path / "other.csv", rows[::-1])
    assert load_splits(other).labels == load_splits(train).labels == ["bad", "good"]


def test_real_labels(shared_data):
    splits = load_splits(shared_data / "banking77/train.csv", test=shared_data / "banking77/test.csv")
    assert len(splits.labels) == 77
    assert len(splits.test) == 3080
    assert 0.08 < len(splits.validation) / 10003 < 0.12
    assert set(map(str.casefold, splits.train["text"])).isdisjoint(map(str.casefold, splits.test["text"]))
    assert not splits.test_is_validation


# Splitting


def test_splits_survive_reordering_and_growth(tmp_path, rows, train):
    first = load_splits(train)
    more = [*rows, *rows_of(100, seed=1)]
    random.Random(5).shuffle(more)
    second = load_splits(write_csv(tmp_path / "more.csv", more))
    assert set(first.validation["text"]) < set(second.validation["text"])
    assert set(first.train["text"]).isdisjoint(second.validation["text"])


@given(texts=st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=12, max_size=40), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_sentence_never_stands_on_two_sides(texts, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sides")
    spoken = texts + [data.draw(st.sampled_from([f" {t} ", t.upper(), t.replace(" ", "  ")])) for t in texts[:6]]
    with (folder / "a.jsonl").open("w") as file:
        for index, text in enumerate([*spoken, "one more row", "and another row"]):
            file.write(json.dumps({"text": text, "label": index % 2}) + "\n")
    (folder / "free.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in spoken))
    splits = load_splits(folder / "a.jsonl", validation_fraction=0.3, unlabelled=[folder / "free.jsonl"])
    sides = [{content_key(t) for t in side["text"]} for side in (splits.train, splits.validation, splits.unlabelled)]
    assert [sides[0] & sides[1], sides[0] & sides[2], sides[1] & sides[2]] == [set(), set(), set()]


def test_no_label_loses_all_of_its_rows_to_validation(tmp_path):
    rows = [(f"sentence {number}", "common") for number in range(60)]
    rare = [f"rare {number}" for number in range(400)]
    rare = [text for text in rare if content_fraction(content_key(text)) < 0.1][:2]
    splits = load_splits(write_csv(tmp_path / "a.csv", [*rows, *[(text, "rare") for text in rare]]))
    assert set(rare) <= set(splits.train["text"])


def test_rows_that_all_say_the_same_are_too_few_to_set_some_aside(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("one film", number) for number in range(40)])
    with pytest.raises(DataError, match=r"40 rows \(1 different\) are too few to set some aside .* data\.validation"):
        load_splits(path, target="number")


def test_fractions_are_uniform_and_salted():
    keys = [content_key(f"sentence {number}") for number in range(2000)]
    plain = np.array([content_fraction(key) for key in keys])
    salted = np.array([content_fraction(key, "other") for key in keys])
    assert abs(plain.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(plain, salted)[0, 1]) < 0.07


def test_duplicates_leave_train_and_never_the_test_data(tmp_path, rows, train):
    test = write_csv(tmp_path / "test.csv", [*rows[:5], (rows[0][0].upper(), rows[0][1])])
    splits = load_splits(train, validation=write_csv(tmp_path / "v.csv", rows[3:9]), test=test)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [191, 4, 6]
    assert "train: 9 rows dropped (5 stand in test too, 4 stand in validation too)" in splits.report
    assert "validation: 2 rows dropped (2 stand in test too)" in splits.report


def test_conflicting_labels_are_said(tmp_path, rows):
    path = write_csv(tmp_path / "a.csv", [*rows, (rows[7][0].upper(), "bad"), (rows[7][0], "good")])
    assert any("1 texts have rows with different labels" in line for line in load_splits(path).report)


def test_unlabelled_text_joins_without_repeating(tmp_path, rows, train):
    (tmp_path / "free.txt").write_text("\n".join([rows[0][0], "something new", "Something  NEW", "another new one"]))
    splits = load_splits(train, unlabelled=[tmp_path / "free.txt"])
    assert splits.unlabelled.to_dict() == {"text": ["something new", "another new one"], "label": [None, None]}
    assert any(line.startswith("unlabelled: 2 rows dropped") and "1 repeat another" in line for line in splits.report)
    assert splits.test_is_validation


def test_pairs(tmp_path, rows):
    path = write_csv(tmp_path / "a.csv", [(text, text[::-1], label) for text, label in rows], ("one", "two", "y"))
    splits = load_splits(path, text="one", text_pair="two", label="y")
    assert splits.train.column_names == ["text", "text_pair", "label"]
    assert all(pair == text[::-1] for text, pair in zip(splits.train["text"], splits.train["text_pair"], strict=True))
    assert content_key("a b", "c") != content_key("a", "b c")


# Bad input


def test_missing_file_names_a_near_one(tmp_path, train):
    with pytest.raises(DataError, match=r"trian\.csv: there is no such file\. Did you mean .*train\.csv\?"):
        load_splits(tmp_path / "trian.csv")


def test_wrong_column_lists_those_there_are(train):
    with pytest.raises(
        DataError,
        match=r"train\.csv: there is no column 'txt'; columns are 'text', 'label'\. Did you mean 'text'\?.*data",
    ):
        load_splits(train, text="txt")


def test_semicolons_are_recognised(tmp_path):
    (tmp_path / "a.csv").write_text("text;label\ngood film;1\n")
    with pytest.raises(DataError, match=r"columns are 'text;label'\. Its fields are not separated by commas"):
        load_splits(tmp_path / "a.csv")


BAD_ROWS = [
    # (the bad row as a JSON object, what is said of it)
    ({"text": "", "label": "good"}, "'text' is empty"),
    ({"text": " \n", "label": "good"}, "'text' is empty"),
    ({"label": "good"}, "'text' is missing"),
    ({"text": 5, "label": "good"}, "'text' is int, not text; it holds 5"),
    ({"text": ["a"], "label": "good"}, r"'text' is list, not text; it holds \['a'\]"),
    ({"text": "fine", "label": None}, "'label' is missing"),
    ({"text": "fine", "label": float("nan")}, "'label' is missing"),
    ({"text": "fine", "label": "NaN"}, "'label' is missing"),
    ({"text": "fine", "label": 0.25}, "'label' is float, not the name or number of a class; it holds 0.25"),
    ({"text": "fine", "label": ["good"]}, "'label' is list, not the name or number of a class"),
]


@pytest.mark.parametrize(("bad", "said"), BAD_ROWS)
def test_bad_row_stops_or_is_skipped(tmp_path, rows, bad, said):
    good = [{"text": text, "label": label} for text, label in rows]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good[:16], bad, *good[16:]]))
    with pytest.raises(DataError, match=rf"a\.jsonl row 17: {said}.* Mend it, or set data\.on_bad_row"):
        load_splits(path)
    splits = load_splits(path, on_bad_row="skip")
    assert len(splits.train) + len(splits.validation) == 200
    assert any("1 of 201 rows skipped" in line for line in splits.report)


@pytest.mark.parametrize(
    ("line", "said"),
    [("one,two,three\n", "line 4 has 3 fields, the header has 2; .*quotes"), ("one\n", "line 4 has 1 fields")],
)
def test_ragged_csv_line(tmp_path, line, said):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\nfilm one,good\nfilm two,bad\n{line}film three,good\n")
    with pytest.raises(DataError, match=rf"a\.csv row 3: {said}"):
        load_splits(path)
    assert any("1 not readable" in report for report in load_splits(path, on_bad_row="skip").report)
    with pytest.raises(DataError, match=r"row 3: line 4"):
        load_table(path)


def test_broken_json_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", \n{"text": "c", "label": 0}\n')
    with pytest.raises(DataError, match=r"a\.jsonl row 2: line 2 is not JSON"):
        load_splits(path)


def test_an_array_behind_empty_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n \n[{"text": "a", "label": 1},\n {"text": "b", "label": 0}]\n')
    assert load_table(path)["text"] == ["a", "b"]


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nfine,good\ncafé,bad\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv line 3: byte 0xe9 is not UTF-8\. Save the file as UTF-8"):
        load_splits(path)


def test_label_never_seen_in_training(tmp_path, rows, train):
    other = write_csv(tmp_path / "test.csv", [("new film", "good"), ("newer film", "superb")])
    with pytest.raises(DataError, match=r"test\.csv row 2: the label 'superb' is not among .*\(bad, good\)"):
        load_splits(train, test=other)
    assert len(load_splits(train, test=other, on_bad_row="skip").test) == 1
    with pytest.raises(DataError, match=r"train\.csv row \d+: the label 'good' is not among .*\(bad, nice\)"):
        load_splits(train, labels=["bad", "nice"])


def test_one_class_only(tmp_path, rows):
    path = write_csv(tmp_path / "a.csv", [(text, "good") for text, _ in rows])
    with pytest.raises(DataError, match=r"a\.csv: 'good' is the only label\. A classifier needs two"):
        load_splits(path)


def test_label_column_that_is_no_label(tmp_path, rows):
    path = write_csv(tmp_path / "a.csv", [(text, f"id{number}") for number, (text, _) in enumerate(rows)])
    with pytest.raises(DataError, match=r"200 different labels in 200 rows, such as 'id0'\. Set data\.label"):
        load_splits(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "", r"a\.csv: holds no rows"),
        ("a.csv", "text,label\n", r"a\.csv: holds no rows"),
        ("a.jsonl", "", r"a\.jsonl: holds no rows"),
        ("a.txt", "\n\n", r"a\.txt: holds no rows"),
        ("a.parquet", "not parquet", r"a\.parquet: cannot be read"),
        ("a.xlsx", "?", r"a\.xlsx: files ending in '\.xlsx' are not known\. Give a file \(\.csv"),
        ("a.csv", "text,text\na,b\n", r"the header names 'text' twice"),
        ("a.csv", 'text,label\n"a,b\n', r"a\.csv line 2: not readable as a table"),
        ("a.json", "[1, 2", r"a\.json: not JSON"),
        ("a.json", '{"version": 1,\n "data": [{"text": "a"}]}', r"a\.json: holds one object, not rows\. Give an array"),
        ("a.json", '{"text": {"0": "a"}, "label": {"0": "b"}}', r"holds one object, not rows.*orient=.records"),
        ("a.jsonl", "[1]\n", r"a\.jsonl: 1 is not an object with columns"),
    ],
)
def test_unreadable_files(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load_splits(tmp_path / name)


def test_folder_that_is_not_a_dataset(tmp_path, train):
    with pytest.raises(DataError, match=r"is not a folder written by save_to_disk; it holds train\.csv"):
        load_splits(tmp_path)


def test_train_that_repeats_the_test_data(train):
    with pytest.raises(DataError, match=r"every text stands in the validation or test data too"):
        load_splits(train, test=train, validation=train)


def test_errors_are_one_line(tmp_path):
    (tmp_path / "a.parquet").write_text("not\nparquet")
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_table(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_arrays_of_texts_are_read_as_a_frame_writes_them(tmp_path):
    """NumPy writes no commas, and Python takes neighbouring texts for one."""
    written = ["['x' 'y']", "['x', 'y']", '["x", "y"]', "['x'\n 'y']", "['y']"]
    path = write_csv(tmp_path / "a.csv", [(f"text {n}", written[n % 5]) for n in range(60)])
    splits = load_splits(path, target="classes")
    assert splits.labels == ["x", "y"]
    lengths = {text: len(label) for text, label in zip(splits.train["text"], splits.train["label"], strict=True)}
    assert lengths == {text: 1 if text[-1] in "49" else 2 for text in lengths}
    assert TARGETS["tags"].read(str(np.array(["O", "B-x"], dtype=object)), "label", None) == (["O", "B-x"], None)


def test_a_label_that_the_test_data_takes_away_is_told(tmp_path, rows):
    test = write_csv(tmp_path / "test.csv", [("a rare film", "rare"), ("a good film", "good")])
    train = write_csv(tmp_path / "train.csv", [*rows, ("a rare film", "rare")])
    report = load_splits(train, test=test).report
    assert "train: no row is left of the label rare, all of whose texts stand elsewhere too" in report


def test_labels_of_nearly_one_spelling_are_told(tmp_path, rows):
    train = write_csv(tmp_path / "train.csv", [*rows, *((f"one more {n}", "Good") for n in range(20))])
    assert f"{train}: the labels 'Good' and 'good' differ in spelling alone" in load_splits(train).report


def test_without_test_data_the_report_says_which_rows_are_measured(train, tmp_path, rows):
    splits = load_splits(train)
    assert splits.measured == "validation"
    assert "no test data: numbers are reported on the validation data, which also chooses" in splits.report
    test = write_csv(tmp_path / "test.csv", [("new film", "good"), ("newer film", "bad")])
    assert load_splits(train, test=test).measured == "test"


def test_lines_of_a_text_file_are_texts_whatever_the_column_is_called(tmp_path, rows):
    train = write_csv(tmp_path / "train.csv", rows, header=("sentence", "label"))
    (tmp_path / "more.txt").write_text("one more film\nanother one\n")
    (tmp_path / "more.txt.gz").write_bytes(gzip.compress(b"a packed film\n"))
    more = [tmp_path / "more.txt", tmp_path / "more.txt.gz"]
    found = load_splits(train, text="sentence", unlabelled=more)
    assert found.unlabelled["text"][:] == ["one more film", "another one", "a packed film"]
    kept = load_splits(train, text="sentence", unlabelled=more, folder=tmp_path / "kept")
    assert kept.unlabelled["text"][:] == found.unlabelled["text"][:]


def test_unlabelled_pictures_in_a_folder_are_read_as_ever(tmp_path):
    """A folder is no text to read in parts where pictures are asked for."""
    for name in ("labelled/cat", "labelled/dog", "more/any"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(6):
            colour = (40 * number, 200 if name.endswith("cat") else 90, len(name))
            Image.new("RGB", (4, 4), colour).save(tmp_path / name / f"{number}.png")
    splits = load_splits(
        tmp_path / "labelled", text="image", inputs="image", unlabelled=[tmp_path / "more"], validation_fraction=0.3
    )
    assert len(splits.unlabelled) == 6
