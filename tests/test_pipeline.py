"""From a pretrained checkpoint to a verified bundle, for real, on a tiny task."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers import pipeline as transformers_pipeline

from distill.cache.cached_teacher import CachedTeacher
from distill.candidates import machine_target
from distill.errors import ExportError, ObjectiveError
from distill.export.onnx_model import OnnxModel
from distill.export.runtime import Bundle
from distill.ledger import Ledger, claim
from distill.pipeline import compress, run_stages
from distill.progress import SILENT
from distill.recipe import Recipe, TermRecipe
from distill.run import Run
from distill.shipping import learner
from distill.shipping.exporting import _quantize
from distill.teacher import LiveTeacher, load_checkpoint


def recipe_for(folder, intents, start, **changes):
    values = {
        "name": "intents",
        "output": str(folder),
        "teacher": {"start": str(start), "finetune": {"epochs": 20, "learning_rate": 3e-3}},
        "student": {"layers": 1},
        "data": {
            "train": str(intents / "train.csv"),
            "validation": str(intents / "validation.csv"),
            "test": str(intents / "test.csv"),
            "max_length": 32,
        },
        "training": {"epochs": 8, "learning_rate": 3e-3},
        "bench": {"lengths": [8, 16], "runs": 10},
    }
    for section, fields in changes.items():
        values[section] = {**values.get(section, {}), **fields}
    return Recipe.parse(values)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, intents_folder, tiny_start):
    recipe = recipe_for(tmp_path_factory.mktemp("runs") / "intents", intents_folder, tiny_start)
    return recipe, compress(recipe)


def test_everything_that_was_promised_is_there(finished):
    _, result = finished
    made = {path.name for path in result.folder.iterdir()}
    assert {"teacher", "student", "baseline", "bundle", "report.html", "report.md", "results.json"} <= made
    assert not list(result.folder.rglob("*.writing"))
    results = json.loads((result.folder / "results.json").read_text())
    models = {row["role"]: row for row in results["models"]}
    assert list(models) == ["teacher", "teacher-onnx", "baseline", "student", "student-onnx", "student-int8"]
    assert models["teacher"]["metrics"]["accuracy"] > 0.9
    assert models["student-int8"]["retention"] > 0.9
    assert models["student-int8"]["bytes"] < models["student-onnx"]["bytes"] < models["teacher-onnx"]["bytes"]
    assert set(models["student-int8"]["latency_ms"]) == {"8", "16"}
    assert [step["step"] for step in results["verification"]] == [
        "export of the teacher",
        "export of the student",
        "int8 quantisation",
    ]
    assert [point for point in results["curves"]["student"] if "accuracy" in point]
    assert any("verified" in line for line in result.summary())


def test_transformers_and_the_bundle_give_the_same_answers(finished, intents_folder):
    _, result = finished
    texts = ["where my card is", "hello , what the euro rate is", "why my code is refused today"]
    classify = transformers_pipeline("text-classification", model=str(result.folder / "student"), top_k=None)
    for file, tolerance in (("onnx/model.onnx", 1e-4), (None, 0.05)):
        for theirs, ours in zip(classify(texts), Bundle.load(result.bundle, file=file).predict(texts), strict=True):
            assert theirs[0]["label"] == ours.label
            for entry in theirs:
                assert abs(entry["score"] - ours.probabilities[entry["label"]]) < tolerance


def test_a_finished_run_is_not_done_again(finished):
    recipe, result = finished
    stamps = {path: path.stat().st_mtime_ns for path in result.folder.rglob("*") if path.is_file()}
    again = compress(recipe)
    changed = {
        str(path.relative_to(result.folder))
        for path, stamp in stamps.items()
        if path.stat().st_mtime_ns != stamp and path.name not in ("recipe.toml", ".lock")
    }
    assert changed == set()
    assert again.summary() == result.summary()


def test_a_moved_run_with_another_name_says_so_everywhere(finished, tmp_path):
    recipe, result = finished
    folder = tmp_path / "moved"
    shutil.copytree(result.folder, folder)
    again = compress(recipe.model_copy(update={"output": str(folder), "name": "renamed"}))
    assert all(str(folder) in line for line in again.summary() if line.startswith(("bundle:", "report:")))
    assert json.loads((again.bundle / "MANIFEST.json").read_text())["name"] == "renamed"
    assert json.loads((folder / "results.json").read_text())["name"] == "renamed"
    assert 'name = "renamed"' in (again.bundle / "recipe.toml").read_text()


def test_auto_measures_its_candidates_and_says_so(finished, tmp_path):
    recipe, result = finished
    folder = tmp_path / "auto"
    shutil.copytree(result.folder, folder)
    changes = {"output": str(folder), "export": recipe.export.model_copy(update={"target": "auto", "max_drop": 5.0})}
    again = compress(recipe.model_copy(update=changes), replace=True)
    results = json.loads((folder / "results.json").read_text())
    tried = results["tried"]
    assert [(row["graph"], row["form"]) for row in tried] == [
        ("separate heads", "dynamic"),
        ("separate heads", "static (min-max) in feed-forward blocks"),
        ("separate heads", "static (min-max)"),
        ("fused attention", "dynamic"),
        ("fused attention", "static (min-max) in feed-forward blocks"),
        ("fused attention", "static (min-max)"),
    ]
    (chosen,) = [row for row in tried if row["chosen"]]
    timed = [row for row in tried if row["good"]]
    assert all(set(row["latency_ms"]) == {"8", "16"} for row in timed)
    assert chosen == min(timed, key=lambda row: np.prod(list(row["latency_ms"].values())))
    assert "| separate heads | static (min-max) |" in (folder / "report.md").read_text()
    assert "too inexact" not in (folder / "report.html").read_text() or len(timed) < 6
    assert Bundle.load(again.bundle).model.metadata["distill.target"] == machine_target()
    assert sorted(path.name for path in (folder / "work" / "onnx").iterdir()) == [
        "student-int8.onnx",
        "student.onnx",
        "teacher.onnx",
    ]


def test_a_lower_floor_makes_no_new_teacher(finished, tmp_path):
    recipe, result = finished
    folder = tmp_path / "floor"
    shutil.copytree(result.folder, folder)
    made = (folder / "teacher/model.safetensors").stat()
    changes = {"output": str(folder), "teacher": recipe.teacher.model_copy(update={"floor": 0.01})}
    run_stages(recipe.model_copy(update=changes), until="finetune", replace=True)
    now = (folder / "teacher/model.safetensors").stat()
    assert (now.st_ino, now.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_a_step_at_which_every_term_rests_changes_nothing_and_stops_nothing(finished, tmp_path):
    recipe, result = finished
    ramp = {"schedule": "linear", "start": 0.0, "end": 1.0}
    values = recipe.model_dump(mode="json", by_alias=True, exclude={"objective", "teacher"})
    asked = Recipe.parse(
        {
            **values,
            "output": str(tmp_path / "ramp"),
            "teacher": {"checkpoint": str(result.folder / "teacher")},
            "objective": {"terms": [{"loss": name, "weight": ramp} for name in ("soft_labels", "hidden_mse")]},
        }
    )
    curve = run_stages(asked, until="train").facts["train"]["curve"]
    assert all(np.isfinite(point["loss"]) for point in curve if "loss" in point)


def test_one_seed_one_result(finished, tmp_path, intents_folder, tiny_start):
    _, result = finished
    other = recipe_for(tmp_path / "again", intents_folder, tiny_start)
    run_stages(other, until="finetune")
    name = "teacher/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (result.folder / name).read_bytes()


def test_a_trimmed_vocabulary_ships_whole(finished, tmp_path, intents_folder, tiny_start):
    """The teacher keeps its tokenizer, the student learns and ships with its own."""
    _, first = finished
    recipe = recipe_for(
        tmp_path / "trimmed",
        intents_folder,
        first.folder / "teacher",
        teacher={"start": "", "checkpoint": str(first.folder / "teacher")},
        student={"layers": 1, "vocabulary": "used"},
        training={"epochs": 8, "learning_rate": 3e-3, "baseline": False},
    )
    result = compress(recipe)
    results = json.loads((result.folder / "results.json").read_text())
    models = {row["role"]: row for row in results["models"]}
    assert "baseline" not in models
    assert models["student-int8"]["metrics"]["accuracy"] > 0.85
    pieces = json.loads((result.bundle / "tokenizer.json").read_text())["model"]["vocab"]
    kept = json.loads((first.bundle / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(pieces) < len(kept)
    assert json.loads((result.bundle / "config.json").read_text())["vocab_size"] == len(pieces)


def test_unlabelled_text_joins_the_transfer_set(finished, tmp_path, intents_folder):
    _, first = finished
    free = tmp_path / "free.txt"
    free.write_text("\n".join(f"when does my card come number {number}" for number in range(40)))
    recipe = recipe_for(
        tmp_path / "free",
        intents_folder,
        "",
        teacher={"start": "", "checkpoint": str(first.folder / "teacher")},
        data={
            "train": str(intents_folder / "train.csv"),
            "validation": str(intents_folder / "validation.csv"),
            "unlabelled": [str(free)],
            "max_length": 32,
        },
        training={"epochs": 1, "learning_rate": 3e-3, "baseline": False},
    )
    facts = run_stages(recipe, until="label").facts
    assert facts["label"]["rows"] == 320 + 40


def test_labels_in_another_order_are_matched_by_name(finished, tmp_path, intents_folder):
    _, first = finished
    orders = {}
    for name, labels in (("own", []), ("other", ["password", "arrival", "exchange"])):
        recipe = recipe_for(
            tmp_path / name,
            intents_folder,
            "",
            teacher={"start": "", "checkpoint": str(first.folder / "teacher"), "label_map": {"exchange": "rates"}},
            data={
                "train": _renamed(intents_folder / "train.csv", tmp_path),
                "validation": _renamed(intents_folder / "validation.csv", tmp_path),
                "test": "",
                "labels": [label.replace("exchange", "rates") for label in labels],
                "max_length": 32,
            },
        )
        facts = run_stages(recipe, until="finetune").facts["teacher"]
        orders[name] = facts["labels"]
        assert facts["validation"]["accuracy"] > 0.9
    assert orders == {"own": ["arrival", "rates", "password"], "other": ["password", "arrival", "rates"]}


def _renamed(source, folder):
    path = folder / source.name
    path.write_text(source.read_text().replace(",exchange", ",rates"))
    return str(path)


def test_predictions_are_finite_and_sum_to_one(finished):
    _, result = finished
    found = Bundle.load(result.bundle)(os.linesep.join(["card"] * 500))
    assert np.isclose(sum(found.probabilities.values()), 1.0, atol=1e-5)


def test_a_small_set_is_augmented_and_its_student_narrower(tmp_path, intents_folder, tiny_start, finished):
    """Texts made from the training texts are labelled and learnt from; what the shape cuts is fitted."""
    recipe = recipe_for(
        tmp_path / "augmented",
        intents_folder,
        tiny_start,
        teacher={"checkpoint": str(finished[1].folder / "teacher"), "start": ""},
        student={"layers": 2, "intermediate_size": 32, "inherit_layers": "important"},
        training={"epochs": 1, "baseline": False},
    )
    recipe.data.augment.copies = 2
    result = run_stages(recipe, until="evaluate")
    made = json.loads((result.folder / "work" / "augmented.json").read_text())["texts"]
    assert result.facts["label"]["rows"] > 320 + 0.9 * len(made)
    assert result.facts["train"]["remarks"] == ["every part fitted to the teacher on 256 texts"]
    assert result.facts["train"]["before"]["accuracy"] > 0.9
    assert run_stages(recipe, until="evaluate").facts == result.facts


def test_a_family_that_cannot_be_traced_is_refused_before_anything_is_learnt(tmp_path, intents_folder, tiny_start):
    """Longformer pads a text to whole windows inside, which depends on its length: torch.export cannot follow."""
    start = tmp_path / "start"
    shutil.copytree(tiny_start, start)
    shape = json.loads((start / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = AutoConfig.for_model(
        "longformer", **{name: shape[name] for name in kept}, attention_window=8, max_position_embeddings=64
    )
    config.pad_token_id = 0
    AutoModel.from_config(config).save_pretrained(start)
    recipe = recipe_for(
        tmp_path / "run", intents_folder, start, teacher={"finetune": {"epochs": 1}}, training={"epochs": 1}
    )
    with pytest.raises(ExportError, match="LongformerForSequenceClassification cannot be traced: "):
        compress(recipe)
    assert not (tmp_path / "run/work/state/label.json").exists()
    assert "student" in run_stages(recipe, until="evaluate").facts["evaluate"]["models"]  # what is not shipped goes on


def test_two_teachers_answer_together(tmp_path, intents_folder, tiny_start, finished):
    """The cache holds the mean of their logits, and another weighting is another cache."""
    folders = [str(finished[1].folder / name) for name in ("teacher", "baseline")]

    def labelled(folder, weights):
        recipe = recipe_for(
            folder, intents_folder, tiny_start, teacher={"checkpoint": folders[0], "start": ""}, training={"epochs": 1}
        )
        recipe.teacher.ensemble, recipe.teacher.ensemble_weights = folders[1:], weights
        result = run_stages(recipe, until="label")
        assert any("2 teachers together: accuracy" in line for line in result.summary())
        with claim(recipe, replace=False) as ledger:
            batch = Run(recipe, ledger, SILENT).some_batches()[0]
        return CachedTeacher(folder / "work" / "cache", ["logits"]).features(batch)["logits"]

    one, two = labelled(tmp_path / "first", [1, 0]), labelled(tmp_path / "second", [0, 1])
    both = labelled(tmp_path / "mean", [])
    torch.testing.assert_close(both, (one + two) / 2)
    assert not torch.equal(one, two)


def test_a_vocabulary_below_what_the_texts_use_learns_from_logits(tmp_path, intents_folder, tiny_start, finished):
    """Student and teacher split texts differently, so only what is said of a whole text can be compared."""
    recipe = recipe_for(
        tmp_path / "small",
        intents_folder,
        tiny_start,
        teacher={"checkpoint": str(finished[1].folder / "teacher"), "start": ""},
        student={"layers": 1, "vocabulary": 75},
        training={"baseline": False},
    )
    result = run_stages(recipe, until="evaluate")
    assert result.facts["train"]["reason"].startswith("labels+logits: the student's vocabulary")
    assert result.facts["evaluate"]["models"]["student"]["metrics"]["accuracy"] > 0.9
    recipe.objective.preset = "logits+hidden"
    with pytest.raises(ObjectiveError, match=r"reads hidden\.0, hidden\.1 token by token.*vocabulary = \"used\""):
        run_stages(recipe, until="evaluate", replace=True)


def test_training_with_rounding_leaves_the_student_alone(finished, tmp_path):
    """The ladder's last resort: the student's weights, trained on as int8 computes, in a file of their own."""
    recipe, result = finished
    folder = tmp_path / "rounded"
    shutil.copytree(result.folder, folder)
    changes = {"output": str(folder), "export": recipe.export.model_copy(update={"int8_steps": 7})}
    recipe = recipe.model_copy(update=changes)
    before = (folder / "student" / "model.safetensors").read_bytes()
    with claim(recipe, replace=True) as ledger:
        run = Run(recipe, ledger, SILENT)
        learner(run)(tmp_path / "trained.onnx", ["classifier.weight.product"])
    assert (folder / "student" / "model.safetensors").read_bytes() == before
    assert (folder / "work" / "student-for-int8" / "model.safetensors").read_bytes() != before
    batch = {"input_ids": np.array([[2, 7, 9, 3]]), "attention_mask": np.ones((1, 4), np.int64)}
    trained, student = (OnnxModel(path) for path in (tmp_path / "trained.onnx", folder / "work/onnx/student.onnx"))
    difference = np.abs(trained.predict(batch)["logits"] - student.predict(batch)["logits"]).max()
    assert 0 < difference < 1
    assert trained.metadata.keys() == student.metadata.keys()


def test_in_several_processes_the_repair_that_trains_is_named_as_left_out(finished, tmp_path, monkeypatch):
    recipe, result = finished
    export = recipe.export.model_copy(update={"max_drop": -200.0})  # what no file can reach
    run = Run(recipe.model_copy(update={"export": export}), Ledger(result.folder / "work/state"), SILENT)
    student = load_checkpoint(str(result.folder / "student"), run.task)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ExportError, match=r"Run the same command in one process: the last repair, training .*Train lon"
    ):
        _quantize(run, student, {"": result.folder / "work/onnx/student.onnx"}, tmp_path / "int8.onnx")


def test_the_batches_that_a_student_is_fitted_on_are_of_the_whole_set(finished, tmp_path):
    run = Run(finished[0], Ledger(tmp_path / "state"), SILENT)
    assert len(run.transfer) == 320
    rows = [int(number) for batch in run.some_batches() for number in batch["example"]]
    assert len(rows) == len(set(rows)) == 256
    assert (min(rows), max(rows)) == (0, 319)


def test_a_convention_that_reads_padding_is_taught_by_a_live_teacher(finished, tmp_path):
    """Of what stands behind a text a cache says nothing, which such a convention would learn."""
    terms = [{"loss": "hidden_mse", "options": {"convention": "tinybert"}}]
    objective = finished[0].objective.model_copy(update={"terms": [TermRecipe.model_validate(term) for term in terms]})
    run = Run(finished[0].model_copy(update={"objective": objective}), Ledger(tmp_path / "state"), SILENT)
    assert isinstance(run.cache(run.objective()[0]), LiveTeacher)


def test_weights_on_request_ship_and_are_named(finished, tmp_path):
    recipe, result = finished
    folder = tmp_path / "half"
    shutil.copytree(result.folder, folder)
    changes = {"output": str(folder), "export": recipe.export.model_copy(update={"weights": "fp16"})}
    again = compress(recipe.model_copy(update=changes), replace=True)
    bundle = Bundle.load(again.bundle)
    assert bundle.model.metadata["distill.weights"] == "fp16"
    full, half = (Bundle.load(again.bundle, file=f"onnx/{name}.onnx") for name in ("model", "model_quantized"))
    text = "where my card is"
    assert max(abs(full(text).probabilities[name] - half(text).probabilities[name]) for name in full.labels) < 0.01
    rows = {row["role"]: row for row in json.loads((folder / "results.json").read_text())["models"]}
    assert rows["student-int8"]["format"] == "ONNX fp16"
    assert rows["student-int8"]["bytes"] < 0.75 * rows["student-onnx"]["bytes"]
    assert "**Student, ONNX fp16 (ships)**" in (again.bundle / "README.md").read_text()
    assert "The fp16 file is" in (folder / "report.md").read_text()


def test_tokens_in_int4_ship_are_named_and_verified(finished, tmp_path):
    recipe, result = finished
    folder = tmp_path / "int4"
    shutil.copytree(result.folder, folder)
    export = recipe.export.model_copy(update={"embeddings": "int4", "max_drop": 20.0, "ort": True})
    again = compress(recipe.model_copy(update={"output": str(folder), "export": export}), replace=True)
    bundle = Bundle.load(again.bundle)
    assert bundle.model.metadata["distill.embeddings"] == "int4"
    assert "GatherBlockQuantized" in (again.bundle / "onnx/required_operators.config").read_text()
    assert json.loads((again.bundle / "MANIFEST.json").read_text())["embeddings"] == "int4"
    assert "int8 with int4 embeddings" in (again.bundle / "README.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    (row,) = [row for row in results["models"] if row["role"] == "student-int8"]
    models = json.loads((result.folder / "results.json").read_text())["models"]
    (before,) = [row for row in models if row["role"] == "student-int8"]
    (table,) = [table for table in results["tables"] if table["bits"] == 4]
    assert row["format"] == "ONNX int8, int4 embeddings"
    assert before["bytes"] - row["bytes"] == pytest.approx(table["int8_bytes"] - table["bytes"], abs=600)
    assert [rung["form"] for rung in results["verification"][-1]["ladder"]["rungs"]][-1].endswith("embeddings in int4")


def test_the_baseline_takes_as_many_steps_as_the_student(finished, tmp_path, intents_folder):
    """Of 40 labelled rows and 400 more, batches round up in different ways."""
    few = tmp_path / "few.csv"
    header, *rows = (intents_folder / "train.csv").read_text().splitlines()
    few.write_text("\n".join([header, *rows[:: len(rows) // 40][:40]]))
    free = tmp_path / "free.txt"
    free.write_text("\n".join(f"when does my card come number {number}" for number in range(400)))
    recipe = recipe_for(
        tmp_path / "run",
        intents_folder,
        "",
        teacher={"start": "", "checkpoint": str(finished[1].folder / "teacher")},
        data={
            "train": str(few),
            "validation": str(intents_folder / "validation.csv"),
            "unlabelled": [str(free)],
            "max_length": 32,
        },
        training={"epochs": 2, "learning_rate": 3e-3, "batch_size": 32},
    )
    facts = run_stages(recipe, until="train").facts
    points = [
        [point["step"] for point in facts[name]["curve"] if "accuracy" in point] for name in ("train", "baseline")
    ]
    assert points[0] == points[1] == [14, 28]
