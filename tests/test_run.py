"""What a run says of its data before it works with it."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BertForSequenceClassification

from distill.learning import make_teacher
from distill.ledger import Ledger
from distill.progress import SILENT
from distill.recipe import Recipe
from distill.run import Run
from distill.teacher import Checkpoint


def test_each_split_says_once_that_texts_lose_their_end(tiny_start, intents_folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(SILENT, "say", said.append, raising=False)
    recipe = Recipe.parse(
        {
            "task": "text-classification",
            "output": str(tmp_path / "run"),
            "teacher": {"checkpoint": "none"},
            "data": {
                **{name: str(intents_folder / f"{name}.csv") for name in ("train", "validation", "test")},
                "max_length": 8,
            },
        }
    )
    run = Run(recipe, Ledger(tmp_path / "state"), SILENT)
    checkpoint = Checkpoint(None, AutoTokenizer.from_pretrained(tiny_start), run.splits.labels, "teacher")
    counted = {}
    for _ in range(2):
        for name in ("train", "validation", "test"):
            counted[name] = run.encode(checkpoint, getattr(run.splits, name)).cut
    told = [line for line in said if "lose their end" in line]
    assert all(counted.values())
    assert told == [
        f"{cut} of {len(getattr(run.splits, name))} {name} texts lose their end: they are longer than "
        "data.max_length = 8 tokens allows"
        for name, cut in counted.items()
    ]


def recipe_with(checkpoint, folder, **sections):
    return Recipe.parse(
        {
            "task": "text-classification",
            "output": str(folder / "run"),
            "teacher": {"checkpoint": str(checkpoint), **sections.pop("teacher", {})},
            "data": {"train": str(folder / "rows.csv"), "max_length": 8},
            **sections,
        }
    )


@pytest.fixture
def teacher(tiny_start, tmp_path):
    """Two classes without names of their own, and rows for it."""
    folder = tmp_path / "teacher"
    BertForSequenceClassification.from_pretrained(tiny_start, num_labels=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(folder)
    lines = [f"please tell me {number},{('yes', 'no')[number % 2]}" for number in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *lines]))
    return folder


def inputs_of(recipe):
    return Run(recipe, Ledger(recipe.folder / "state"), SILENT).train_inputs(None)


def test_other_names_of_the_teachers_classes_are_another_student(teacher, tmp_path):
    """Or a corrected `label_map` would ship the labels of the wrong one."""
    one, other = ({"LABEL_0": first, "LABEL_1": last} for first, last in (("no", "yes"), ("yes", "no")))
    made = [inputs_of(recipe_with(teacher, tmp_path, teacher={"label_map": names})) for names in (one, other)]
    assert (made[0]["labels"], made[1]["labels"]) == (["no", "yes"], ["yes", "no"])


def test_a_teacher_without_names_is_asked_by_the_numbers_of_the_data(teacher, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text(rows.read_text().replace(",no", ",0").replace(",yes", ",1"))
    run = Run(recipe_with(teacher, tmp_path), Ledger(tmp_path / "state"), SILENT)
    assert run.teacher.labels == ["0", "1"]
    assert run.teacher.model.config.label2id == {"0": 0, "1": 1}


@pytest.mark.parametrize(
    ("student", "width"),
    [({}, 32), ({"hidden_size": 16, "attention_heads": 2}, 16), ({"card": "factorised-4"}, 128)],
)
def test_a_vocabulary_is_weighed_by_the_students_table(student, width, teacher, tmp_path):
    names = {"label_map": {"LABEL_0": "no", "LABEL_1": "yes"}}
    recipe = recipe_with(teacher, tmp_path, teacher=names, student={"vocabulary": "used", **student})
    tables = []

    class Shown(type(SILENT)):
        def table(self, title, columns, rows):
            tables.append(rows)

    trimmed = Run(recipe, Ledger(tmp_path / "state"), Shown()).trimmed
    assert tables == [trimmed.rows(width)]


def test_another_shape_under_the_same_path_is_another_student(teacher, tmp_path):
    card, made = tmp_path / "mine.toml", []
    for heads in (2, 1):
        card.write_text(f'description = "Mine."\nlayers = 1\nattention_heads = {heads}\n')
        names = {"label_map": {"LABEL_0": "no", "LABEL_1": "yes"}}
        made.append(inputs_of(recipe_with(teacher, tmp_path, teacher=names, student={"card": str(card)})))
    assert made[0] != made[1]


def test_a_teacher_is_fine_tuned_anew_when_what_it_is_made_from_changes(teacher, tiny_start, tmp_path, monkeypatch):
    start, made = tmp_path / "start", []
    shutil.copytree(tiny_start, start)

    def finetuned(**training):
        source = {"checkpoint": "", "start": str(start)}
        recipe = recipe_with("", tmp_path, teacher=source, training={"precision": "fp32", "epochs": 3, **training})
        make_teacher(Run(recipe, Ledger(recipe.folder / "state"), SILENT))
        return len(made)

    def fit(*_, **__):
        made.append(1)
        shutil.copytree(teacher, tmp_path / "run/teacher", dirs_exist_ok=True)
        return {"curve": []}

    monkeypatch.setattr("distill.learning._fit", fit)
    config = json.loads((teacher / "config.json").read_text())
    names = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    (teacher / "config.json").write_text(json.dumps(config | names))
    assert (finetuned(), finetuned()) == (1, 1)
    assert finetuned(epochs=9) == 1  # of the student; the teacher has its own
    assert finetuned(max_grad_norm=0.5) == 2
    weights = load_file(start / "model.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: weights[first] + 1}, start / "model.safetensors", metadata={"format": "pt"})
    assert finetuned(max_grad_norm=0.5) == 3


@pytest.mark.parametrize(("task", "bf16"), [("regression", False), ("text-classification", True)])
def test_a_teacher_of_numbers_answers_in_fp32(task, bf16, tmp_path):
    """In bf16 the years 1989 and 1994 are one number."""
    values = {"task": task, "teacher": {"checkpoint": "none"}, "data": {"train": "none.csv"}}
    recipe = Recipe.parse({**values, "training": {"precision": "bf16"}, "output": str(tmp_path)})
    assert Run(recipe, Ledger(tmp_path / "state"), SILENT).taught_in_bf16 is bf16
