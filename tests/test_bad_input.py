"""Bad input is one line that says what, where and what to do; the exit code is not 0; nothing half-written stays."""

import csv
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

from distill.errors import DistillError
from distill.pipeline import run_stages
from distill.recipe import Recipe

LABELS = ["arrival", "exchange", "password"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_start):
    """A classifier of the three intents; what it says does not matter here."""
    config = BertConfig.from_pretrained(tiny_start, num_labels=3, id2label=dict(enumerate(LABELS)))
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(tmp_path, teacher, intents_folder):
    """Runs a recipe with one thing wrong and gives the error's line."""

    def run(until="label", **changes):
        values = {
            "output": str(tmp_path / "run"),
            "teacher": {"checkpoint": str(teacher)},
            "student": {"layers": 1},
            "data": {
                "train": str(intents_folder / "train.csv"),
                "validation": str(intents_folder / "validation.csv"),
                "max_length": 32,
            },
        }
        for section, fields in changes.items():
            values[section] = values.get(section, {}) | fields if isinstance(fields, dict) else fields
        with pytest.raises(DistillError) as caught:
            run_stages(Recipe.parse(values), until=until)
        line = str(caught.value)
        assert len(line.splitlines()) == 1
        assert re.search(
            r"\b(set|give|save|put|fix|free|look|name|leave|say|put|copy|fine-tune|did you mean)\b", line, re.I
        ), line
        assert caught.value.exit_code > 0
        left = [path for path in (tmp_path / "run").rglob("*") if path.name.endswith((".writing", ".old"))]
        assert left == []
        return line

    return run


def table(path, rows, header=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def test_a_missing_file(broken):
    assert "none.csv" in broken(data={"train": "none.csv"})


def test_a_wrong_column(broken):
    line = broken(data={"text": "txt"})
    assert "'txt'" in line
    assert "columns are 'text', 'label'" in line


def test_an_empty_text_names_its_row(broken, tmp_path):
    rows = [("where is it", "arrival"), ("", "arrival"), ("the rate", "exchange")]
    assert "bad.csv row 2" in broken(data={"train": table(tmp_path / "bad.csv", rows)})


def test_a_label_that_training_never_saw(broken, tmp_path):
    rows = [("where is it", "arrival"), ("hello", "greeting")]
    assert "greeting" in broken(data={"validation": table(tmp_path / "validation.csv", rows)})


def test_one_class_only(broken, tmp_path):
    rows = [(f"where is it {number}", "arrival") for number in range(9)]
    assert "one" in broken(data={"train": table(tmp_path / "one.csv", rows)})


def test_labels_that_cannot_be_matched(broken, tmp_path):
    paths = {
        name: table(tmp_path / f"{name}.csv", [(f"a {name} b", "good"), (f"c {name} d", "bad")])
        for name in ("train", "validation")
    }
    line = broken(data=paths)
    assert "good" in line
    assert "arrival" in line
    assert "teacher.label_map" in line


def copy_with(teacher, folder, change):
    shutil.copytree(teacher, folder)
    change(folder)
    return {"checkpoint": str(folder)}


def test_a_tokenizer_of_another_model(broken, teacher, tmp_path, minilm_folder):
    def change(folder):
        AutoTokenizer.from_pretrained(minilm_folder).save_pretrained(folder)

    line = broken(teacher=copy_with(teacher, tmp_path / "teacher", change))
    assert "30521" in line
    assert "belong to different models" in line


def test_a_missing_tokenizer(broken, teacher, tmp_path):
    def change(folder):
        for path in folder.glob("*token*"):
            path.unlink()

    assert "tokenizer" in broken(teacher=copy_with(teacher, tmp_path / "teacher", change))


def test_a_length_past_the_positions(broken):
    line = broken(data={"max_length": 100})
    assert "`data.max_length` is 100, the model has 64 positions" in line


def test_logits_that_are_not_numbers(broken, teacher, tmp_path):
    def change(folder):
        model = BertForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            model.classifier.bias[1] = float("nan")
        model.save_pretrained(folder)

    assert "not finite" in broken(teacher=copy_with(teacher, tmp_path / "teacher", change))


def test_weights_that_are_a_pickle(broken, teacher, tmp_path):
    def change(folder):
        model = BertForSequenceClassification.from_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    assert "safetensors" in broken(teacher=copy_with(teacher, tmp_path / "teacher", change))


def test_a_checkpoint_without_a_trained_head(broken, tiny_start, tmp_path):
    folder = tmp_path / "headless"
    BertModel.from_pretrained(tiny_start).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(folder)
    line = broken(teacher={"checkpoint": str(folder)}, task="text-classification")
    assert "classifier" in line
    assert "teacher.start" in line


def test_a_teacher_below_its_floor(broken):
    assert "below its floor of 0.990" in broken(teacher={"floor": 0.99})


def test_more_layers_than_the_teacher_has(broken):
    assert "layers" in broken(student={"layers": 5})


def test_an_objective_that_does_not_exist(broken):
    assert "soft_labels" in broken(objective={"terms": [{"loss": "soft_label"}]})


def test_another_recipe_in_the_folder(broken, tmp_path):
    broken(teacher={"floor": 0.99})
    assert "holds another recipe's work (teacher.floor was 0.99, is 0.98)" in broken(teacher={"floor": 0.98})


def test_a_full_disk_loses_nothing(broken, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs to be root, to mount a small file system")
    try:
        line = broken(until="train")
        assert "the disk is full" in line
        assert "goes on where it stopped" in line
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_the_command_line_says_it_in_one_line_without_a_traceback(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[teacher]\ncheckpoint = "x"\n[data]\ntrain = "none.csv"\n[training]\nepoch = 3\n')
    command = [sys.executable, "-m", "distill.cli", "train", str(recipe)]
    environment = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.splitlines() == [f"error: {recipe}: `training.epoch` is not a setting. Did you mean `epochs`?"]
    with_debug = subprocess.run(
        [*command, "--debug"], capture_output=True, text=True, check=False, env=environment, cwd=tmp_path
    )
    assert "Traceback" in with_debug.stderr
    assert os.listdir(tmp_path) == ["r.toml"]
