"""Recipes: every problem at once, every field documented, what is written can be read."""

import tomllib

import pytest

from distill.errors import RecipeError
from distill.recipe import Recipe

MINIMAL = {"teacher": {"checkpoint": "some/model"}, "data": {"train": "train.csv"}}


def test_all_problems_are_reported_at_once():
    values = {
        "training": {"epoch": 3, "batch_size": 0},
        "objective": {"terms": [{"los": "soft_labels"}]},
        "data": {"labels": ["a", "a"], "text_pair": "b", "augment": {"copies": 1, "ways": ["masked"]}},
        "studnt": {},
    }
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(values)
    text = str(caught.value)
    for part in (
        "`training.epoch` is not a setting. Did you mean `epochs`?",
        "`training.batch_size` input should be greater than or equal to 1; got 0",
        "`objective.terms.0.loss` must be given",
        "`studnt` is not a setting. Did you mean `student`?",
        "`teacher.checkpoint` must name a fine-tuned model",
        "`data.train` must name the training data",
        "`data.labels` must be distinct",
        "`data.augment.model` must name a masked language model",
        "`data.augment.copies` must be 0 with `data.text_pair`",
    ):
        assert part in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("comments", [True, False])
def test_a_written_recipe_reads_back_the_same(comments):
    terms = [{"loss": "soft_labels", "weight": {"schedule": "linear", "from": 0.2, "end": 0.0}, "temperature": 4.0}]
    recipe = Recipe.parse(
        {**MINIMAL, "name": 'a "quoted" näme', "objective": {"terms": terms}, "student": {"layers": 3}}
        | {"teacher": {"checkpoint": "m", "label_map": {"LABEL 0": "neg"}}}
    )
    assert Recipe.parse(tomllib.loads(recipe.to_toml(comments=comments))) == recipe


def test_signs_that_toml_escapes_otherwise_than_json_read_back_the_same():
    label_map = {"\U0001f600": "delete \x7f", "\x7f \U0001f600": "\u2028"}
    recipe = Recipe.parse({**MINIMAL, "teacher": {"checkpoint": "m", "label_map": label_map}})
    assert tomllib.loads(recipe.to_toml())["teacher"]["label_map"] == label_map


def test_every_field_says_what_it_is():
    text = Recipe.parse(MINIMAL).to_toml(comments=True)
    settings = [number for number, line in enumerate(text.splitlines()) if " = " in line and not line.startswith("#")]
    lines = text.splitlines()
    undocumented = [lines[number] for number in settings if not lines[number - 1].startswith("# ")]
    assert undocumented == []
    assert len(settings) > 40


def test_overrides_take_toml_values_and_plain_strings(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(Recipe.parse(MINIMAL).to_toml().replace('name = ""\n', ""))
    recipe = Recipe.load(path, ["training.epochs=2.5", "student.card=layers-6", "bench.lengths=[8, 16]"])
    assert (recipe.training.epochs, recipe.student.card, recipe.bench.lengths) == (2.5, "layers-6", [8, 16])
    assert recipe.name == "mine"
    with pytest.raises(RecipeError, match=r"`--set training.epochs` must be KEY=VALUE"):
        Recipe.load(path, ["training.epochs"])
    with pytest.raises(RecipeError, match=r"`training.epoch` is not a setting"):
        Recipe.load(path, ["training.epoch=2"])


def test_overrides_reach_into_lists_and_refuse_what_is_not_there(tmp_path):
    path = tmp_path / "r.toml"
    recipe = Recipe.parse({**MINIMAL, "objective": {"terms": [{"loss": "hidden_mse"}]}})
    path.write_text(recipe.to_toml())
    assert Recipe.load(path, ["objective.terms.0.weight=2"]).objective.terms[0].weight == 2.0
    with pytest.raises(RecipeError, match=r"objective.terms.3"):
        Recipe.load(path, ["objective.terms.3.weight=2"])
    with pytest.raises(RecipeError, match=r"training.epochs.x"):
        Recipe.load(path, ["training.epochs.x=2"])


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"there is no such file. `distill new` writes one"):
        Recipe.load(tmp_path / "none.toml")
    marked = tmp_path / "marked.toml"  # as some editors save it
    marked.write_text(Recipe.parse({**MINIMAL, "name": ""}).to_toml(), encoding="utf-8-sig")
    assert Recipe.load(marked).name == "marked"
    broken = tmp_path / "broken.toml"
    broken.write_text("[teacher\n")
    with pytest.raises(RecipeError, match=r"not a readable TOML file"):
        Recipe.load(broken)


def test_what_does_not_change_the_weights_does_not_change_the_fingerprint():
    recipe = Recipe.parse(MINIMAL)
    moved = Recipe.parse({**MINIMAL, "output": "elsewhere", "bench": {"runs": 7}})
    longer = Recipe.parse({**MINIMAL, "training": {"epochs": 9}})
    assert recipe.fingerprint() == moved.fingerprint() != longer.fingerprint()


@pytest.mark.parametrize(
    "export, says",
    [
        ({"weights": "fp16"}, r'`export.embeddings` must be "int8" with `export.weights = "fp16"`'),
        ({"weights": "fp32"}, r'`export.embeddings` must be "int8" with `export.weights = "fp32"`'),
        ({"target": "portable"}, r'`export.embeddings` must be "int8" with `export.target = "portable"`'),
    ],
)
def test_embeddings_in_int4_go_with_few_bits_and_operators_of_the_runtime(export, says):
    """Accepted in silence, the file would be another one than was asked for."""
    values = {"teacher": {"checkpoint": "a"}, "data": {"train": "b.csv"}}
    with pytest.raises(RecipeError, match=says):
        Recipe.parse({**values, "export": {**export, "embeddings": "int4"}})
    assert Recipe.parse({**values, "export": export}).export.embeddings == "int8"
    for fine in ({}, {"target": "wasm"}, {"target": "auto"}, {"weights": "blocks-4", "target": "portable"}):
        assert Recipe.parse({**values, "export": {**fine, "embeddings": "int4"}}).export.embeddings == "int4"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            {"teacher": "my/model"},
            "`teacher` must be a section with settings such as checkpoint, card, start; got 'my/m",
        ),
        ({"data": "rows.csv"}, "`data` must be a section with settings such as train"),
        ({"teacher": {"checkpoint": "m", "ensemble_weights": 3}}, "`teacher.ensemble_weights` input should be a valid"),
        ({"data": {"train": "t.csv", "augment": {"ways": 3}}}, "`data.augment.ways` input should be a valid list"),
        ({"bench": {"lengths": [0]}}, "`bench.lengths.0` input should be greater than or equal to 1; got 0"),
        ({"bench": {"batches": []}}, "`bench.batches` list should have at least 1 item"),
        ({"training": {"epochs": float("inf")}}, "`training.epochs` input should be a finite number"),
        ({"student": {"vocabulary": -5}}, "than or equal to 1 or input should be 'full' or 'used'; got -5"),
        ({"student": {"inherit_layers": [0]}}, "`student.inherit_layers"),
        (
            {"objective": {"terms": [{"loss": "soft_labels", "weight": "x"}]}},
            "`objective.terms.0.weight` input should be a valid number, unable to parse string as a number or "
            "must be a section with settings such as schedule",
        ),
        ({"objective": {"terms": [{"loss": "hidden_mse", "layers": [[1, 2], [3]]}]}}, "`objective.terms.0.layers"),
    ],
)
def test_what_is_of_another_kind_is_named(values, problem):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({**MINIMAL, **values})
    assert problem in str(caught.value)
    assert "[" not in str(caught.value).partition("`")[2].partition("`")[0]  # the setting, not how pydantic found it
