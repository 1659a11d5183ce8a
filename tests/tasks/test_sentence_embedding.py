"""Embeddings: measures by hand, what clients read, and one whole path from all-MiniLM-L6-v2 on movie sentences."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers import pipeline as transformers_pipeline

from distill.data.splits import load_splits
from distill.errors import DataError, RecipeError, StudentError, TeacherError
from distill.evaluation import TorchPredictor
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.heads import HEADS
from distill.objectives.relational import pool
from distill.pipeline import run_stages
from distill.recipe import Recipe
from distill.tasks import TASKS, Encoded, find_task, sentence_embedding
from distill.tasks.encoded import pack
from distill.tasks.pooling import POOLINGS, vectors
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
    same = measured([[1.0, 0.0]] * 4, teacher)  # a student that tells nothing apart finds nothing
    assert (same["spearman"], same["recall_at_1"]) == (0.0, 0.0)


def test_neighbours_are_those_of_the_whole_table(monkeypatch):
    """Blocks of rows are compared with all others, so that many texts fill no memory."""
    monkeypatch.setattr(sentence_embedding, "BLOCK", 3)
    rows = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    table = unit @ unit.T - 3.0 * np.eye(8)
    encoded = Encoded({}, {}, np.arange(9), given={"text": list("abcdefgh")})
    assert TASK.answers({"sentence_embedding": rows}, encoded).tolist() == table.argmax(axis=1).tolist()
    told = TASK.told({"sentence_embedding": rows}, encoded)
    assert [text for text, _ in told] == ["abcdefgh"[best] for best in table.argmax(axis=1)]
    np.testing.assert_allclose([near for _, near in told], table.max(axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("mean", [0.6, 0.8]), ("cls", [1.0, 0.0]), ("max", [0.5**0.5, 0.5**0.5]), ("lasttoken", [0.0, 1.0])],
)
def test_pooling_by_hand_and_padding_does_not_reach_the_vector(kind, wanted):
    states = torch.tensor([[[6.0, 0.0], [3.0, 6.0], [0.0, 6.0], [99.0, -99.0]]])
    mask = torch.tensor([[1, 1, 1, 0]])
    model = torch.nn.Module()
    model.config = PretrainedConfig(sentence_pooling=kind)
    np.testing.assert_allclose(vectors(model, states, mask), [wanted], rtol=1e-6)
    pooled = pool(states, mask, POOLINGS[kind])  # what losses compare
    np.testing.assert_allclose(torch.nn.functional.normalize(pooled, dim=-1), [wanted], rtol=1e-6)
    model.sentence_projection = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.sentence_projection.weight.copy_(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    turned = vectors(model, states, mask).detach()
    np.testing.assert_allclose(turned, [[0.0, 1.0 if wanted[0] else 0.0]], atol=1e-6)


def test_a_bare_encoder_is_an_embedder_and_a_classifier_is_none():
    assert find_task("auto", ["BertModel"]) is TASK
    assert find_task("auto", ["BertForSequenceClassification"]) is not TASK


@pytest.fixture
def teacher(tmp_path, minilm_folder):
    """A copy of the teacher with these files beside it."""

    def make(**files):
        folder = tmp_path / f"teacher-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(minilm_folder, folder)
        for path, values in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(json.dumps(values))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
    ],
)
def test_a_teacher_pools_as_its_files_say(teacher, pooling, kind):
    folder = teacher(**{"1_Pooling/config.json": {"word_embedding_dimension": 384, **pooling}})
    found = load_checkpoint(folder, TASK)
    tokens = found.tokenizer(["a fine film", "dull"], return_tensors="pt", padding=True)
    batch = {name: value.numpy() for name, value in tokens.items()}
    ours = TorchPredictor(found.model, TASK).predict(batch)["sentence_embedding"]
    theirs = SentenceTransformer(modules=[Transformer(folder), Pooling(384, pooling_mode=kind)], device="cpu").encode(
        ["a fine film", "dull"], normalize_embeddings=True
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert TASK.options(found.model) == ({} if kind == "mean" else {"pooling": POOLINGS[kind]})


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"1_Pooling/config.json": {"pooling_mode_weightedmean_tokens": True}}, "it pools by weightedmean_tokens, and"),
        (
            {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            "it pools by cls and mean, and this task by one of mean, cls, max, lasttoken",
        ),
        (
            {"modules.json": [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "CNN")]},
            "its steps are Transformer, CNN, and this task knows Transformer, Pooling, Dense, Normalize",
        ),
        (
            {"2_Dense/config.json": {"activation_function": "torch.nn.modules.activation.Tanh"}},
            "its Dense layer applies torch.nn.modules.activation.Tanh, and this task a linear one",
        ),
        (
            {"2_Dense/config.json": {"in_features": 384, "out_features": 64, "bias": True}},  # pytorch_model.bin
            "its Dense layer has no 2_Dense/model.safetensors",
        ),
    ],
)
def test_a_teacher_that_does_something_else_is_refused(teacher, files, said):
    with pytest.raises(TeacherError, match=said):
        load_checkpoint(teacher(**files), TASK)


def test_what_stands_before_each_text_stands_before_both_of_a_pair():
    head = HEADS["sentence-embedding"]
    assert head.prefixed(("one", "two"), "query: ") == ("query: one", "query: two")
    assert head.prefixed("one", "query: ") == "query: one"
    assert head.prefixed(7, "query: ") == 7  # refused where texts are read


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
def texts(shared_data, tmp_path_factory):
    """Movie sentences: 320 to train on, 120 to test."""
    folder = tmp_path_factory.mktemp("texts")
    for name, most in (("train", 320), ("dev", 120)):
        with (shared_data / "sst2" / f"{name}.csv").open(encoding="utf-8") as file:
            texts = [row["text"] for row in csv.DictReader(file)][:most]
        with (folder / f"{name}.csv").open("w", encoding="utf-8") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts)])
    return [f'data.train="{folder}/train.csv"', 'data.validation=""', f'data.test="{folder}/dev.csv"']


@pytest.fixture(scope="module")
def shallow(minilm_folder, tmp_path_factory):
    """The first three layers of all-MiniLM-L6-v2: a model is traced in a time that grows with its layers."""
    folder = tmp_path_factory.mktemp("shallow")
    shutil.copytree(minilm_folder, folder, dirs_exist_ok=True)
    model = AutoModel.from_pretrained(minilm_folder)
    model.encoder.layer, model.config.num_hidden_layers = model.encoder.layer[:3], 3
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(texts, shallow, run_example):
    return run_example(
        "sentence-embedding",
        *texts,
        f'teacher.checkpoint="{shallow}"',
        "student.layers=2",
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
    verdict = verify_bundle(result.bundle)
    assert verdict.ok
    assert "same tokens, sentence embedding within" in verdict.checks["golden vectors"][1]
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    assert bundle.model.outputs == ("last_hidden_state", "sentence_embedding")
    texts = ["a wonderful film", "dull and stupid"]
    read = transformers_pipeline("feature-extraction", model=str(result.folder / "student"))
    means = np.stack([np.mean(states[0], axis=0) for states in read(texts)])
    expected = means / np.linalg.norm(means, axis=-1, keepdims=True)
    found = bundle.predict(texts)
    np.testing.assert_allclose([one.vector for one in found], expected, atol=1e-4)
    pair = bundle(texts[0], texts[1])
    assert pair.similarity == pytest.approx(float(expected[0] @ expected[1]), abs=1e-4)
    assert pair.summary() == f"{pair.similarity:.4f}"
    assert found[0].summary().endswith("(384 numbers)")


@pytest.mark.slow
def test_nothing_is_dropped_while_vectors_are_followed(finished, shallow):
    """Though its teacher drops a tenth."""
    kinds = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    config = json.loads((finished[1].folder / "student/config.json").read_text())
    assert [config[kind] for kind in kinds] == [0.0, 0.0]
    assert [getattr(AutoConfig.from_pretrained(shallow), kind) for kind in kinds] == [0.1, 0.1]


@pytest.mark.slow
def test_sentence_transformers_files_stand_beside_the_weights(finished):
    _, result = finished
    for folder in (result.folder / "student", result.bundle):
        modules = json.loads((folder / "modules.json").read_text())
        assert [one["path"] for one in modules] == ["", "1_Pooling", "2_Normalize"]
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
        assert pooling["pooling_mode_mean_tokens"]
        assert pooling["word_embedding_dimension"] == 384


@pytest.mark.slow
def test_a_narrow_student_ships_with_its_projection(texts, shallow, run_example):
    _, result = run_example(
        "sentence-embedding",
        *texts,
        f'teacher.checkpoint="{shallow}"',
        "student={layers=2, hidden_size=128, attention_heads=4, intermediate_size=256}",
        "training={epochs=1, learning_rate=3e-4}",
        "data.max_length=16",
        "export.max_drop=4",
    )
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert models["student-onnx"]["metrics"]["spearman"] == pytest.approx(
        models["student"]["metrics"]["spearman"], abs=1e-3
    )
    assert models["student-int8"]["metrics"]["spearman"] > 0.3
    assert verify_bundle(result.bundle).ok
    said = [one.vector for one in Bundle.load(result.bundle, file="onnx/model.onnx").predict(["a fine film", "dull"])]
    for folder in (result.folder / "student", result.bundle):
        modules = json.loads((folder / "modules.json").read_text())
        assert [one["path"] for one in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    theirs = SentenceTransformer(str(result.folder / "student"), device="cpu")
    np.testing.assert_allclose(said, theirs.encode(["a fine film", "dull"]), atol=1e-4)  # 384 wide
    student = load_checkpoint(str(result.folder / "student"), TASK)
    assert (
        TASK.teaches(student.model)
        == "its vectors go through a Dense layer, and students learn from what is before that; give one without"
    )
    _, info = AutoModel.from_pretrained(result.folder / "student", output_loading_info=True)
    assert not any(info.values())


def test_a_narrow_student_of_the_maximum_is_refused(texts, teacher, run_example):
    folder = teacher(**{"1_Pooling/config.json": {"pooling_mode_max_tokens": True}})
    with pytest.raises(StudentError, match=r"it is 64 wide, its teacher 384, and both pool by the maximum"):
        run_example(
            "sentence-embedding",
            *texts,
            f'teacher.checkpoint="{folder}"',
            "student={layers=1, hidden_size=64, attention_heads=2, intermediate_size=64}",
            "data.max_length=8",
        )
