"""Every example is a recipe that loads; tests/tasks/ runs each in a shortened form."""

from pathlib import Path

import pytest

from distill.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
OTHER = {"multilingual": "text-classification"}
"""Tasks of the examples that are not called by theirs."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_its_task_says_so(path):
    recipe = Recipe.load(path)
    assert path.stem == recipe.name
    assert recipe.task == OTHER.get(path.stem, path.stem)
    assert f"examples/{path.name}" in (ROOT / "docs/tasks.md").read_text(encoding="utf-8")


def test_there_are_examples():
    assert len(EXAMPLES) >= 5
