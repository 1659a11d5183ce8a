"""Tagging: words to tokens and back, windows, measures by hand, and one whole path on SNIPS."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import datasets
import numpy as np
import pytest
from seqeval.metrics.sequence_labeling import get_entities
from transformers import AutoTokenizer
from transformers import pipeline as transformers_pipeline

from distill.data.splits import load_splits
from distill.encoding import encode_rows
from distill.errors import DataError
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.heads.tagging import entities, first_pieces
from distill.shipping import verify_with_data
from distill.tasks import TASKS, Padding

TASK = TASKS["token-classification"]
LABELS = ["B-artist", "I-artist", "O"]


@pytest.fixture(scope="module")
def tokenizer(minilm_folder):
    return AutoTokenizer.from_pretrained(minilm_folder)


def rows(words, tags):
    return {"text": words, "label": [None if row is None else [LABELS.index(tag) for tag in row] for row in tags]}


def test_the_first_token_of_a_word_carries_its_label(tokenizer):
    encoded = TASK.encode(rows([["play", "westbam", "now"]], [["O", "B-artist", "O"]]), tokenizer, 32)
    pieces = tokenizer.convert_ids_to_tokens(encoded[0]["input_ids"])
    assert pieces == ["[CLS]", "play", "west", "##ba", "##m", "now", "[SEP]"]
    assert encoded[0]["labels"].tolist() == [-100, 2, 0, -100, -100, 2, -100]
    assert encoded[0]["scored"].tolist() == [0, 1, 1, 0, 0, 1, 0]


def test_rows_without_labels_are_scored_but_not_labelled(tokenizer):
    encoded = TASK.encode(rows([["play", "westbam"]], [None]), tokenizer, 32)
    batch = TASK.collate([encoded[0]], Padding({"input_ids": 0}))
    assert batch["labels"].tolist() == [[-100] * 6]
    assert batch["scored"].tolist() == [[False, True, True, False, False, False]]
    assert not TASK.labelled(encoded)


def test_a_long_sentence_is_read_in_windows_and_each_word_counts_once(tokenizer):
    words = [f"{'play' if number % 2 else 'westbam'}" for number in range(40)]
    encoded = TASK.encode(rows([words, ["play"]], [["O"] * 40, ["O"]]), tokenizer, 24)
    assert len(encoded) > 4
    assert encoded.lengths.max() <= 24
    assert encoded.sources.tolist() == [0] * (len(encoded) - 1) + [1]
    counted = encoded.ragged["words"][encoded.ragged["scored"] == 1]
    assert sorted(counted.tolist()) == sorted([*range(40), 0])
    assert (encoded.ragged["labels"] != -100).sum() == 41


def test_a_word_counts_where_most_text_is_around_it():
    windows = [[None, 0, 1, 2, 3, 4, None], [None, 3, 4, 4, 5, 6, 7, None]]
    assert first_pieces(windows) == {
        0: (0, 1),
        1: (0, 2),
        2: (0, 3),
        3: (0, 4),
        4: (1, 2),
        5: (1, 4),
        6: (1, 5),
        7: (1, 6),
    }


def test_measures_by_hand(tokenizer):
    """Of two entities one is found whole and one in half; one is made up: precision 1/3, recall 1/2, F1 0.4."""
    words = [["a", "b", "c", "d", "e"]]
    table = {"text": words, "label": [["B-artist", "O", "B-artist", "I-artist", "O"]]}

    class Rows(dict):
        column_names = ("text", "label")

    encoded = encode_rows(TASK, Rows(table), tokenizer, 32, LABELS)
    chosen = [2, 0, 2, 0, 2, 0, 2]  # [CLS], B, O, B, O, B, [SEP]
    outputs = TASK.postprocess({"logits": np.eye(3)[chosen] * 9})
    measured = TASK.metrics(outputs, encoded)
    assert measured == pytest.approx({"f1": 0.4, "precision": 1 / 3, "recall": 0.5, "accuracy": 3 / 5})
    assert TASK.told(outputs, encoded)[0][0] == "artist=a; artist=c; artist=e"
    assert TASK.gold(encoded) == ["artist=a; artist=c d"]


def test_classes_without_a_prefix_are_counted_by_word(tokenizer):
    """seqeval would take the first letter for the scheme: NOUN and NUM one class, and PER the same as ER."""
    names = ["NOUN", "NUM", "O"]
    encoded = replace(
        TASK.encode({"text": [["a", "b", "c", "d"]], "label": [[0, 1, 2, 0]]}, tokenizer, 32), names=names
    )
    outputs = TASK.postprocess({"logits": np.eye(3)[[2, 0, 0, 0, 2, 2]] * 9})  # NOUN NOUN NOUN O
    # one of three is right, and one of the three that are to be found
    assert TASK.metrics(outputs, encoded) == pytest.approx(
        {"f1": 1 / 3, "precision": 1 / 3, "recall": 1 / 3, "accuracy": 1 / 4}
    )


def test_words_of_one_kind_join_until_one_begins():
    text, spans = "a b c d", [(0, 1), (2, 3), (4, 5), (6, 7)]
    found = entities(text, spans, ["B-x", "I-x", "B-x", "I-y"], [0.9, 0.7, 0.5, 1.0], ends=True)
    assert [(one.label, one.text, one.start, one.end) for one in found] == [
        ("x", "a b", 0, 3),
        ("x", "c", 4, 5),
        ("y", "d", 6, 7),
    ]
    assert found[0].probability == pytest.approx(0.8)


def test_entities_are_those_that_seqeval_counts():
    """In every order, of texts whose tags end entities too (BIOES)."""
    random, kinds = np.random.default_rng(0), [f"{sign}-{kind}" for sign in "BIES" for kind in ("PER", "LOC")]
    for tags in random.choice([*kinds, "O", "O"], (500, 9)).tolist():
        spans = [(2 * place, 2 * place + 1) for place in range(len(tags))]
        found = entities("a b c d e f g h i", spans, tags, [1.0] * len(tags), ends=True)
        assert [(one.label, one.start // 2, one.end // 2) for one in found] == get_entities(tags), tags
    plain = entities("a b", [(0, 1), (2, 3)], ["E-MAIL", "E-MAIL"], [1.0, 1.0], ends=False)
    assert [(one.label, one.text) for one in plain] == [("E-MAIL", "a b")]


def test_a_class_that_begins_like_a_tag_is_shown_by_its_name(tokenizer):
    rows = datasets.Dataset.from_dict({"text": [["write", "me"]], "label": [["E-MAIL", "O"]]})
    encoded = encode_rows(TASK, rows, tokenizer, 16, ["O", "E-MAIL"])
    assert TASK.gold(encoded) == ["E-MAIL=write"]


BAD = {
    "ragged": ({"tokens": ["a", "b"], "tags": ["O"]}, "1 tags for 2 words"),
    "no words": ({"tokens": [], "tags": []}, "'tokens' is empty"),
    "no list": ({"tokens": 3, "tags": ["O"]}, "'tokens' is int, not a list of words; it holds 3"),
    "an empty word": ({"tokens": ["a", " "], "tags": ["O", "O"]}, "word 2 of 'tokens' is empty"),
    "a missing tag": ({"tokens": ["a", "b"], "tags": ["O", None]}, "'tag 2 of tags' is missing"),
    "missing tags": ({"tokens": ["a", "b"]}, "'tags' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_or_skipped(name, rows_file):
    row, problem = BAD[name]
    good = [{"tokens": ["play", f"song{number}"], "tags": ["O", "B-x"]} for number in range(30)]
    path = rows_file([*good[:4], row, *good[4:]])
    kinds = {"text": "tokens", "label": "tags", "inputs": "words", "target": "tags"}
    with pytest.raises(DataError, match=re.escape(f"row 5: {problem}")):
        load_splits(path, **kinds)
    splits = load_splits(path, on_bad_row="skip", **kinds)
    assert splits.labels == ["B-x", "O"]
    assert "1 of 31 rows skipped" in splits.report[0]
    assert len(splits.train) + len(splits.validation) == 30


def test_lists_written_into_a_csv(tmp_path):
    path = tmp_path / "rows.csv"
    lines = [f'"[""play"", ""song{number}""]",O B-x' for number in range(30)]
    path.write_text("tokens,tags\n" + "\n".join(lines))
    splits = load_splits(path, text="tokens", label="tags", inputs="words", target="tags")
    assert splits.train[0]["text"][0] == "play"
    assert splits.train[0]["label"] == ["O", "B-x"]


# -- the whole path -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(shared_data, read_rows, rows_file, make_start, run_example):
    train = read_rows(shared_data / "snips/train.jsonl", 1500)
    files = {"train": train, "validation": read_rows(shared_data / "snips/valid.jsonl", 200)}
    files["test"] = read_rows(shared_data / "snips/test.jsonl", 200)
    start = make_start([" ".join(row["tokens"]) for row in train])
    return run_example(
        "token-classification",
        *(f'data.{name}="{rows_file(rows, name)}"' for name, rows in files.items()),
        f'teacher.start="{start}"',
        "teacher.finetune={epochs=8, learning_rate=3e-3}",
        "training={epochs=6, learning_rate=3e-3, baseline=false}",
        "data.max_length=64",
        "export.max_drop=2",
    )


@pytest.mark.slow
def test_a_tagger_goes_the_whole_way(finished, outputs_of):
    recipe, result = finished
    assert outputs_of(result.bundle / "onnx/model_quantized.onnx") == ["logits", "probabilities"]
    results = json.loads((result.folder / "results.json").read_text())
    models = {row["role"]: row for row in results["models"]}
    assert models["teacher"]["metrics"]["f1"] > 0.5
    assert models["student-int8"]["retention"] > 0.85
    assert results["metric"] == "f1"
    assert results["disagreements"][0]["teacher"] != results["disagreements"][0]["student"]
    assert verify_bundle(result.bundle).ok
    verdict = verify_with_data(result.bundle, recipe.data.test, verify_bundle(result.bundle))
    assert verdict.facts["f1"] == pytest.approx(models["student-int8"]["metrics"]["f1"], abs=0.03)


@pytest.mark.slow
def test_transformers_and_the_bundle_find_the_same_entities(finished, read_rows):
    recipe, result = finished
    texts = [" ".join(row["tokens"]) for row in read_rows(recipe.data.test, 40)]
    tagger = transformers_pipeline(
        "token-classification", model=str(result.folder / "student"), aggregation_strategy="first"
    )
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    found = 0
    for text, ours in zip(texts, bundle.predict(texts), strict=True):
        theirs = tagger(text)
        assert [(one["entity_group"], one["start"], one["end"]) for one in theirs] == [
            (one.label, one.start, one.end) for one in ours.entities
        ]
        for one, other in zip(theirs, ours.entities, strict=True):
            assert one["score"] == pytest.approx(other.probability, abs=1e-4)
            assert text[other.start : other.end] == other.text
        found += len(theirs)
    assert found > 30


@pytest.mark.slow
def test_words_and_long_texts(finished):
    _, result = finished
    bundle = Bundle.load(result.bundle)
    words = ["add", "this", "song", "to", "my", "playlist", "please"]
    split, joined = bundle.predict([words, " ".join(words)])
    assert split.tags == joined.tags
    (odd,) = bundle.predict([["add", "\u200b", "cut off \ud83d", "song"]])
    assert len(odd.tags) == 4  # a label a word, of one without a token too
    assert odd.tags[1] == "O"
    assert len(bundle(" ".join(words * 30)).tags) == 210  # of which the graph reads about 60 at a time
    with pytest.raises(DataError, match=r"text 1: \('a', 'b'\) is no text"):
        bundle.predict(["a", ("a", "b")])


@pytest.mark.slow
def test_predict_prints_entities_with_their_place(finished):
    _, result = finished
    text = "add this song to my gym playlist"
    command = [sys.executable, "-m", "distill.cli", "predict", str(result.bundle), text]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["tags"] == Bundle.load(result.bundle)(text).tags
    for one in said["entities"]:
        assert text[one["start"] : one["end"]] == one["text"]
    assert text in subprocess.run(command, capture_output=True, text=True, check=True).stdout
