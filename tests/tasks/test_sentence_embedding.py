"""Embeddings: measures by hand, what clients read, and one whole path from all-MiniLM-L6-v2 on movie sentences."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from distill.data import load_splits
from distill.errors import DataError, RecipeError, TeacherError
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.pipeline import run_stages
from distill.recipe import Recipe
from distill.tasks import TASKS, find_task
from distill.tasks.base import pack
from distill.teacher import load_checkpoint

TASK = TASKS["sentence-embedding"]


def measured(ours, theirs):
    encoded = pack({"input_ids": [[1]] * len(theirs)}, {})
    encoded = replace(encoded, given={"sentence_embedding": np.array(theirs, np.float32)})
    return TASK.metrics({"sentence_embedding": np.array(ours, np.float32)}, encoded)


def test_measures_by_hand():
    # Angles in degrees; neighbours by the teacher: 0-10, 10-0, 40-10, 90-40.
    def at(*degrees):
        return [[np.cos(np.radians(one)), np.sin(np.radians(one))] for one in degrees]

    teacher = at(0, 10, 40, 90)
    assert measured(teacher, teacher) == {"spearman": pytest.approx(1.0), "recall_at_1": 1.0, "recall_at_5": 1.0}
    turned = [[-y, x, 0.0] for x, y in teacher]  # another width and another direction, the same similarities
    assert measured(turned, teacher)["spearman"] == pytest.approx(1.0)
    # Gaps between pairs: 10 40 90 30 80 50 become 30 25 90 5 60 65; only the third keeps its nearest, the second.
    moved = measured(at(0, 30, 25, 90), teacher)
    ranks = np.corrcoef([0, 2, 5, 1, 4, 3], [2, 1, 5, 0, 3, 4])[0, 1]
    assert moved["spearman"] == pytest.approx(ranks)
    assert moved["recall_at_1"] == 0.25
    assert measured([[1.0, 0.0]] * 4, teacher)["spearman"] == 0.0


def test_padding_does_not_reach_the_vector():
    states = np.array([[[3.0, 4.0], [99.0, -99.0]]])
    outputs = TASK.postprocess({"last_hidden_state": states, "attention_mask": np.array([[1, 0]])})
    np.testing.assert_allclose(outputs["sentence_embedding"], [[0.6, 0.8]], rtol=1e-6)


def test_a_bare_encoder_is_an_embedder_and_a_classifier_is_none():
    assert find_task("auto", ["BertModel"]) is TASK
    assert find_task("auto", ["BertForSequenceClassification"]) is not TASK


@pytest.mark.parametrize(
    "pooling", [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {"pooling_mode": "cls"}]
)
def test_a_teacher_that_pools_otherwise_is_refused(tmp_path, minilm_folder, pooling):
    folder = tmp_path / "teacher"
    shutil.copytree(minilm_folder, folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 384, **pooling}))
    with pytest.raises(TeacherError, match=r"it pools by cls.*, and this task by the mean over tokens"):
        load_checkpoint(str(folder), TASK)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert load_checkpoint(str(folder), TASK).labels == []


def test_labels_are_not_read_and_empty_texts_are_named(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text", *(f"text {number}" for number in range(20)), '" "', "more"]))
    with pytest.raises(DataError, match="row 21: 'text' is empty"):
        load_splits(path, target="nothing")
    splits = load_splits(path, target="nothing", on_bad_row="skip")
    assert set(splits.train["label"]) == {None}
    assert len(splits.train) + len(splits.validation) == 21


def test_a_start_without_labels_is_refused(tmp_path, minilm_folder):
    recipe = Recipe.parse(
        {
            "task": "sentence-embedding",
            "output": str(tmp_path / "run"),
            "teacher": {"start": str(minilm_folder)},
            "data": {"train": str(tmp_path / "none.csv")},
        }
    )
    with pytest.raises(RecipeError, match=r"`teacher\.checkpoint` must be given for sentence-embedding"):
        run_stages(recipe, until="label")


@pytest.fixture(scope="module")
def finished(shared_data, minilm_folder, run_example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, most in (("train", 320), ("dev", 120)):
        with (shared_data / "sst2" / f"{name}.csv").open(encoding="utf-8") as file:
            texts = [row["text"] for row in csv.DictReader(file)][:most]
        with (folder / f"{name}.csv").open("w", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    return run_example(
        "sentence-embedding",
        f'data.train="{folder}/train.csv"',
        'data.validation=""',
        f'data.test="{folder}/dev.csv"',
        f'teacher.checkpoint="{minilm_folder}"',
        "student.layers=3",
        "training={epochs=1, learning_rate=2e-4}",
        "data.max_length=16",
        "export.max_drop=4",
    )


@pytest.mark.slow
def test_an_embedder_goes_the_whole_way(finished):
    _, result = finished
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert models["teacher"]["metrics"]["spearman"] == pytest.approx(1.0)
    assert "baseline" not in models
    assert models["student-int8"]["metrics"]["spearman"] > 0.7
    assert models["student-int8"]["metrics"]["recall_at_5"] > 0.4  # by chance 0.04
    assert verify_bundle(result.bundle).ok
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    assert bundle.model.outputs == ("last_hidden_state", "sentence_embedding")
    texts = ["a wonderful film", "dull and stupid"]
    tokenizer, model = (kind.from_pretrained(result.folder / "student") for kind in (AutoTokenizer, AutoModel))
    tokens = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()
    found = bundle.predict(texts)
    np.testing.assert_allclose([one.vector for one in found], expected, atol=1e-4)
    pair = bundle(texts[0], texts[1])
    assert pair.similarity == pytest.approx(float(expected[0] @ expected[1]), abs=1e-4)
    assert pair.summary() == f"{pair.similarity:.4f}"
    assert found[0].summary().endswith("(384 numbers)")


@pytest.mark.slow
def test_sentence_transformers_files_stand_beside_the_weights(finished):
    _, result = finished
    for folder in (result.folder / "student", result.bundle):
        modules = json.loads((folder / "modules.json").read_text())
        assert [one["path"] for one in modules] == ["", "1_Pooling", "2_Normalize"]
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
        assert pooling["pooling_mode_mean_tokens"]
        assert pooling["word_embedding_dimension"] == 384
