"""Of every task: a row that cannot be used stops the command with its own exit code, or is skipped and counted."""

import json
import sys

import pytest

from distill import cli
from distill.errors import DataError, TeacherError
from distill.tasks import TASKS

PIXELS = [[0, 255], [255, 0]]
ANSWER = {"text": ["mat"], "answer_start": [8]}
ROWS = {
    "text-classification": ({"text": "a film", "label": "good"}, {"text": "a film", "label": None}, "missing"),
    "multi-label": ({"text": "a film", "label": ["good"]}, {"text": "a film", "label": 1.5}, "not a list of labels"),
    "regression": ({"text": "a film", "label": 1.5}, {"text": "a film", "label": "good"}, "is no number"),
    "token-classification": ({"text": ["a"], "label": ["O"]}, {"text": ["a"], "label": ["O", "O"]}, "2 tags for 1"),
    "question-answering": (
        {"text": "on what?", "text_pair": "sat on a mat", "label": {"text": ["mat"], "answer_start": [9]}},
        {"text": "on what?", "text_pair": "sat on a mat", "label": ANSWER},
        "does not start at character 8",
    ),
    "image-classification": ({"text": PIXELS, "label": "one"}, {"text": "none.png", "label": "one"}, "no image file"),
    "image-text": ({"text": PIXELS, "text_pair": "a one"}, {"text": PIXELS, "text_pair": " "}, "is empty"),
    "causal-lm": ({"text": "a film"}, {"text": ""}, "is empty"),
    "image-captioning": ({"text": PIXELS, "label": "a one"}, {"text": PIXELS, "label": ""}, "is empty"),
    "seq2seq": ({"text": "a film", "label": "ein Film"}, {"text": "a film", "label": None}, "is missing"),
    "sentence-embedding": ({"text": "a film"}, {"text": 7}, "is int, not text"),
    "masked-lm": ({"text": "a film"}, {"text": None}, "is missing"),
}
"""By task a row, one that cannot be used, and what is wrong with it."""
OTHERS = {
    "text-classification": "bad",
    "multi-label": ["bad"],
    "token-classification": ["B-one"],
    "image-classification": "two",
}
"""A second label, where a classifier needs two."""


def good_rows(task):
    """20 rows that differ in what they say."""
    row, _, _ = ROWS[task]
    rows = []
    for number in range(20):
        text = row["text"]
        if isinstance(text, str):
            text = f"{number} {text}"
        elif TASKS[task].inputs == "image":
            text = [[number, 255], [255, 0]]
        else:
            text = [str(number)]
        other = {"label": OTHERS[task]} if task in OTHERS and number % 2 else {}
        rows.append({**row, "text": text, **other})
    return rows


@pytest.mark.parametrize("task", list(TASKS))
def test_a_bad_row_ends_the_command_or_is_counted(task, rows_file, tmp_path, monkeypatch, capsys):
    """The teacher has no weights: with such rows left out, that is what stops the command."""
    _, bad, problem = ROWS[task]
    data = rows_file([*good_rows(task), bad])
    pair = '"text_pair"' if TASKS[task].pairs == "required" else '""'
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'task = "{task}"\n[teacher]\ncheckpoint = {json.dumps(str(tmp_path / "teacher"))}\n'
        f"[data]\ntrain = {json.dumps(str(data))}\ntext_pair = {pair}\nvalidation_fraction = 0.3\n"
    )
    monkeypatch.setenv("COLUMNS", "600")

    def ended(on_bad_row):
        changes = [f'output="{tmp_path / on_bad_row}"', f'data.on_bad_row="{on_bad_row}"']
        overrides = [part for change in changes for part in ("--set", change)]
        monkeypatch.setattr(sys, "argv", ["distill", "label", str(recipe), *overrides])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, capsys.readouterr().err

    code, said = ended("error")
    assert code == DataError.exit_code
    assert f"{data} row 21: " in said
    assert problem in said
    code, said = ended("skip")
    assert code == TeacherError.exit_code
    assert f"{data}: 1 of 21 rows skipped (1 " in said
    assert problem in said
