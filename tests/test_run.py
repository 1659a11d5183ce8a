"""What a run says of its data before it works with it."""

import pytest
from transformers import AutoTokenizer

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


@pytest.mark.parametrize(("task", "bf16"), [("regression", False), ("text-classification", True)])
def test_a_teacher_of_numbers_answers_in_fp32(task, bf16, tmp_path):
    """In bf16 the years 1989 and 1994 are one number."""
    values = {"task": task, "teacher": {"checkpoint": "none"}, "data": {"train": "none.csv"}}
    recipe = Recipe.parse({**values, "training": {"precision": "bf16"}, "output": str(tmp_path)})
    assert Run(recipe, Ledger(tmp_path / "state"), SILENT).taught_in_bf16 is bf16
