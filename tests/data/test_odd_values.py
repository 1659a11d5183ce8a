"""Values that files of the wild hold: read as they are meant, or refused by the row; never as something else."""

import json

import numpy as np
import pytest

from distill.data.splits import load_splits
from distill.data.tables import read_table
from distill.errors import DataError
from distill.heads.images import encode_image

FIRST = [{"text": f"it is {number}", "label": ("joy", "anger")[number % 2]} for number in range(40)]


def written(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return str(path)


def test_a_zero_or_one_for_every_label_is_not_read_as_names(tmp_path):
    rows = [{"text": f"it is {row}", "label": [1.0, 0.0, float(row % 2), 0.0]} for row in range(40)]
    with pytest.raises(DataError, match=r"row 1: .*0 or 1 for every label; give the names"):
        load_splits(written(tmp_path, rows), target="classes", labels=["joy", "anger", "fear", "love"])


def test_lists_as_pandas_writes_them_are_lists(tmp_path):
    lines = [f"\"['play', 'song{row}']\",\"['O', 'B-{'xy'[row % 2]}']\"" for row in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    train = load_splits(str(tmp_path / "rows.csv"), inputs="words", target="tags").train
    assert all(row["text"][0] == "play" and row["label"][0] == "O" for row in train)


def test_half_a_surrogate_pair_is_what_the_runtime_makes_of_it(tmp_path):
    rows = [*FIRST, {"text": "cut off \ud83d", "label": "joy"}]
    splits = load_splits(written(tmp_path, rows))
    texts = [text for rows in (splits.train, splits.validation) for text in rows["text"]]
    assert "cut off \ufffd" in texts


def test_half_a_surrogate_pair_is_mended_in_second_texts_answers_and_groups(tmp_path):
    cut = "cut off \ud83d"
    rows = [
        {**row, "context": f"{row['text']} {cut}", "answers": {"text": [cut], "answer_start": [len(row["text"]) + 1]}}
        for row in FIRST
    ]
    kinds = {"text_pair": "context", "label": "answers", "target": "span"}
    train = load_splits(written(tmp_path, rows), **kinds).train
    assert all(pair.endswith("cut off \ufffd") for pair in train["text_pair"])
    assert all(answers["text"] == ["cut off \ufffd"] for answers in train["label"])
    rows = [{**row, "group": cut} for row in FIRST]
    assert set(load_splits(written(tmp_path, rows), group="group").train["group"]) == {"cut off \ufffd"}


@pytest.mark.parametrize("value", [10**400, 1e300, "nan"])
def test_a_number_that_no_model_computes_with_is_refused_by_its_row(value, tmp_path):
    rows = [{"text": f"it is {row}", "label": float(row)} for row in range(40)]
    rows[6]["label"] = value
    with pytest.raises(DataError, match=r"row 7: "):
        load_splits(written(tmp_path, rows), target="number")
    assert "1 of 40 rows skipped" in load_splits(written(tmp_path, rows), target="number", on_bad_row="skip").report[0]


def test_numbers_as_labels_are_in_the_order_of_numbers(tmp_path):
    rows = [{"text": f"it is {row}", "label": ["2.0", "10.0", "1.0", "--1"][row % 4]} for row in range(80)]
    assert load_splits(written(tmp_path, rows)).labels == ["1.0", "2.0", "10.0", "--1"]


def test_one_label_is_too_few_to_learn_from_and_enough_to_measure_with(tmp_path):
    rows = [{**row, "label": "joy"} for row in FIRST]
    with pytest.raises(DataError, match="'joy' is the only label"):
        load_splits(written(tmp_path, rows))
    with pytest.raises(DataError, match="no row has a label"):
        load_splits(written(tmp_path, [{**row, "label": []} for row in FIRST]), target="classes")


def test_what_a_system_hides_in_a_folder_is_no_image(tmp_path):
    for name in ("cat/a.png", "dog/b.png", ".ipynb_checkpoints/c.png", "cat/._a.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(encode_image(np.zeros((4, 4), np.uint8)))
    table = read_table(str(tmp_path / "images"), "train")
    assert sorted(table.column("label", "data.label")) == ["cat", "dog"]
