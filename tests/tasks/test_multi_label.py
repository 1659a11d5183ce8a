"""Several labels a text: read and refused, thresholds and measures by hand, and one whole path on SNIPS."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from transformers import pipeline as transformers_pipeline

from distill.data.splits import load_splits
from distill.errors import DataError
from distill.export.onnx_model import OnnxModel
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.tasks import TASKS
from distill.tasks.encoded import pack
from distill.tasks.multi_label import best_threshold

TASK = TASKS["multi-label"]


def said(probabilities, gold):
    encoded = pack({"input_ids": [[1]] * len(gold)}, {"labels": np.array(gold, np.float32)})
    rows = np.array(probabilities)
    return TASK.postprocess({"logits": np.log(rows / (1 - rows))}), encoded


def test_measures_by_hand():
    """Of three labels given two are said, and one more: precision 2/3, recall 2/3; the unlabelled row is left out."""
    outputs, encoded = said(
        [[0.9, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.9]], [[1, 0], [0, 1], [0, 1], [math.nan, math.nan]]
    )
    measured = TASK.metrics(outputs, encoded)
    assert measured == pytest.approx({"micro_f1": 2 / 3, "macro_f1": (2 / 3 + 2 / 3) / 2, "exact": 2 / 3})
    better = {"thresholds": [0.75, 0.3]}
    assert TASK.metrics(outputs, encoded, better)["micro_f1"] == 1.0
    assert TASK.metrics(outputs, encoded, better)["exact"] == 1.0


def test_rare_labels_share_a_threshold():
    """Both labels are told apart perfectly; the second has too few rows to choose by."""
    often, rare = [[0.8, 0.1]] * 25 + [[0.2, 0.1]] * 25, [[0.2, 0.6]] * 2
    outputs, encoded = said(often + rare, [[1, 0]] * 25 + [[0, 0]] * 25 + [[0, 1]] * 2)
    assert TASK.calibrate(outputs, encoded) == {"thresholds": [pytest.approx(0.5), pytest.approx(0.4)]}


def test_the_best_threshold_by_hand():
    gold = np.array([True, False, True, False])
    assert best_threshold(gold, np.array([0.9, 0.1, 0.4, 0.2])) == pytest.approx(0.3)
    assert best_threshold(gold, np.array([0.5, 0.5, 0.5, 0.5])) == pytest.approx(0.25)  # equals cannot be parted
    assert best_threshold(np.zeros(4, bool), np.array([0.9, 0.1, 0.4, 0.2])) == 0.5
    for told in ([9e-7, 8e-7, 2e-8, 1e-8], [0.9999999, 0.9999998, 0.9999996, 0.9]):  # as sure models say it
        probabilities = np.array(told, np.float32)
        assert (probabilities >= best_threshold(np.array([1, 1, 0, 0], bool), probabilities)).tolist() == [1, 1, 0, 0]


def test_a_label_is_told_with_its_least_sure_decision():
    outputs, encoded = said([[0.9, 0.6], [0.1, 0.2]], [[1, 1], [0, 0]])
    encoded = replace(encoded, names=("a", "b"))
    assert [(words, round(sure, 3)) for words, sure in TASK.told(outputs, encoded)] == [("a, b", 0.6), ("-", 0.8)]
    assert TASK.gold(encoded) == ["a, b", "-"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (3, "'labels' is int, not a list of labels; it holds 3"),
        (None, "'labels' is missing"),
        ([{}], "'label 1 of labels'"),
    ],
)
def test_bad_labels_are_named_or_skipped(value, problem, rows_file):
    good = [{"text": f"play song {number}", "labels": ["music"] + ["rock"] * (number % 2)} for number in range(30)]
    path = rows_file([*good[:6], {"text": "odd", "labels": value}, *good[6:]])
    with pytest.raises(DataError, match="row 7: " + re.escape(problem)):
        load_splits(path, label="labels", target="classes")
    splits = load_splits(path, label="labels", target="classes", on_bad_row="skip")
    assert splits.labels == ["music", "rock"]
    assert len(splits.train) + len(splits.validation) == 30


def test_labels_of_a_csv_and_rows_without_any(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,labels\n" + "\n".join(f'text {n},"[]"\nmore {n},b|a' for n in range(20)))
    splits = load_splits(path, label="labels", target="classes")
    assert sorted(map(tuple, splits.train["label"]))[:1] == [()]
    assert ["a", "b"] in splits.train["label"]


@pytest.fixture(scope="module")
def finished(shared_data, read_rows, rows_file, make_start, run_example):
    def table(name, most):
        return [
            {"text": " ".join(row["tokens"]), "labels": sorted({tag[2:] for tag in row["tags"] if tag != "O"})}
            for row in read_rows(shared_data / f"snips/{name}.jsonl", most)
        ]

    files = {"train": table("train", 1500), "validation": table("valid", 200), "test": table("test", 200)}
    return run_example(
        "multi-label",
        *(f'data.{name}="{rows_file(rows, name)}"' for name, rows in files.items()),
        f'teacher.start="{make_start([row["text"] for row in files["train"]])}"',
        "teacher.finetune={epochs=12, learning_rate=3e-3}",
        "training={epochs=6, learning_rate=3e-3, baseline=false}",
        "data.max_length=64",
        "export.max_drop=2",
    )


@pytest.mark.slow
def test_several_labels_go_the_whole_way(finished, outputs_of):
    _, result = finished
    assert outputs_of(result.bundle / "onnx/model_quantized.onnx") == ["logits", "probabilities"]
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert models["teacher"]["metrics"]["micro_f1"] > 0.5
    assert models["student-int8"]["retention"] > 0.85
    assert verify_bundle(result.bundle).ok
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    kept = json.loads(OnnxModel(result.bundle / "onnx/model_quantized.onnx").metadata["distill.settings"])
    assert kept == bundle.settings
    assert len(set(kept["thresholds"])) > 3  # chosen, one for each label
    texts = ["play some jazz on spotify", "will it rain in paris tomorrow"]
    label = transformers_pipeline("text-classification", model=str(result.folder / "student"), top_k=None)
    for theirs, ours in zip(label(texts), bundle.predict(texts), strict=True):
        for one in theirs:  # a sigmoid each, as problem_type says
            assert one["score"] == pytest.approx(ours.probabilities[one["label"]], abs=1e-4)
        least = dict(zip(bundle.labels, kept["thresholds"], strict=True))
        assert ours.labels == [name for name in bundle.labels if ours.probabilities[name] >= least[name]]
