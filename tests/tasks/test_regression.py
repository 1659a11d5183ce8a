"""Regression: numbers read and refused, measures by hand, and one whole path on people's ratings."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers import pipeline as transformers_pipeline

from distill.data.splits import load_splits
from distill.demo import fetch_archive, read_rated
from distill.errors import DataError, TeacherError
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.pipeline import run_stages
from distill.recipe import Recipe
from distill.tasks import TASKS, find_task
from distill.tasks.encoded import pack

TASK = TASKS["regression"]


def said(values, gold):
    encoded = pack({"input_ids": [[1]] * len(gold)}, {"labels": np.array(gold, np.float32)})
    return TASK.postprocess({"logits": np.array(values)[:, None]}), encoded


def test_measures_by_hand():
    outputs, encoded = said([1.0, 2.0, 4.0, 9.0], [1.0, 3.0, 2.0, math.nan])
    measured = TASK.metrics(outputs, encoded)
    assert measured["spearman"] == pytest.approx(0.5)
    assert measured["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert measured["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 2])[0, 1])
    assert TASK.metrics(*said([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]))["spearman"] == 0.0


def test_agreement_is_within_a_tenth_of_the_deviation():
    reference = np.array([-1.0, 1.0])
    assert TASK.agreement(reference, np.array([-0.95, 0.85])) == 0.5
    assert TASK.agreement(np.array([3.0, 3.0]), np.array([3.0, 3.1])) == 0.5  # where there is no deviation


def test_a_model_of_one_output_is_a_regression():
    assert find_task("auto", ["BertForSequenceClassification"], problem="regression") is TASK


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("good", "'rating' is no number; it holds 'good'"),
        ("", "'rating' is missing"),
        ("nan", "'rating' is nan, not a finite number"),
        ("1e999", "'rating' is inf, not a finite number"),
    ],
)
def test_what_is_no_number_is_named_or_skipped(value, problem, tmp_path):
    path = tmp_path / "rated.csv"
    lines = [f"text {number},{number}" for number in range(30)]
    path.write_text("\n".join(["text,rating", *lines[:3], f"odd,{value}", *lines[3:]]))
    with pytest.raises(DataError, match=re.escape(f"row 4: {problem}")):
        load_splits(path, label="rating", target="number")
    splits = load_splits(path, label="rating", target="number", on_bad_row="skip")
    assert splits.labels == []
    assert len(splits.train) + len(splits.validation) == 30
    assert isinstance(splits.train[0]["label"], float)


def test_a_classifier_is_no_regressor(tmp_path, tiny_start, intents_folder):
    config = BertConfig.from_pretrained(tiny_start, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(tmp_path / "teacher")
    rated = tmp_path / "rated.csv"
    rated.write_text("\n".join(["text,label", *(f"where is card {number},{number}" for number in range(30))]))
    recipe = Recipe.parse(
        {
            "task": "regression",
            "output": str(tmp_path / "run"),
            "teacher": {"checkpoint": str(tmp_path / "teacher")},
            "data": {"train": str(rated), "max_length": 32},
        }
    )
    with pytest.raises(TeacherError, match="it gives 3 outputs, regression reads 1"):
        run_stages(recipe, until="label")


@pytest.fixture(scope="module")
def finished(rows_file, make_start, run_example, tmp_path_factory):
    try:
        archive = fetch_archive(tmp_path_factory.mktemp("download"))
    except DataError as error:
        pytest.skip(f"pip reaches no package index: {error}")
    rated = read_rated(archive, "movieReviewSnippets")
    rows = [{"text": one.text, "rating": 5000 + 1000 * one.mean} for one in rated]  # as prices are: far from 0
    files = {"train": rows[:2000], "validation": rows[2000:2300], "test": rows[2300:2600]}
    return run_example(
        "regression",
        *(f'data.{name}="{rows_file(part, name)}"' for name, part in files.items()),
        f'teacher.start="{make_start([row["text"] for row in rows[:2000]], words=3000)}"',
        "teacher.finetune={epochs=5, learning_rate=2e-3}",
        "training={epochs=3, learning_rate=2e-3, baseline=false}",
        "data.max_length=48",
        "data.on_bad_row='skip'",
        "export.max_drop=2",
    )


@pytest.mark.slow
def test_a_regression_goes_the_whole_way(finished):
    _, result = finished
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert models["teacher"]["metrics"]["spearman"] > 0.15
    assert models["student-int8"]["retention"] > 0.8
    assert models["student-onnx"]["agreement"] == models["student"]["agreement"]
    assert verify_bundle(result.bundle).ok
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    assert bundle.model.outputs == ("logits", "value")
    texts = ["a wonderful film", "the worst film of the year , dull and stupid"]
    rate = transformers_pipeline("text-classification", model=str(result.folder / "student"))
    for theirs, ours in zip(rate(texts), bundle.predict(texts), strict=True):
        assert theirs["score"] == pytest.approx(ours.value, rel=1e-5)
        assert 1000 < ours.value < 9000
    assert ours.summary() == f"{ours.value:.4f}"


def test_a_small_unit_is_verified_in_parts_of_its_range(finished, tmp_path):
    """Rates of some thousandths would all be within the tolerance of a probability."""
    _, result = finished
    folder = Path(shutil.copytree(result.bundle, tmp_path / "rates"))
    path, scale = folder / "golden.jsonl", 1e-6
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    now = [line["value"] for line in lines]

    def verify(values):
        path.write_text("\n".join(json.dumps({**line, "value": v}) for line, v in zip(lines, values, strict=True)))
        return verify_bundle(folder).checks["golden vectors"]

    assert "in parts of their range within" in verify(now)[1]
    assert "labels" not in verify(now)[1]
    assert not verify([value * scale for value in now])[0]
    model = onnx.load(folder / "onnx/model_quantized.onnx")
    graph = model.graph
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name == "value":
                node.output[place] = "large"
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(scale), "unit"))
    graph.node.append(onnx.helper.make_node("Mul", ["large", "unit"], ["value"]))
    onnx.save(model, folder / "onnx/model_quantized.onnx")
    assert verify([value * scale for value in now])[0]
    assert not verify([-value * scale for value in now])[0]
