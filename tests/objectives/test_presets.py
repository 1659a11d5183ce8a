"""Every preset builds and trains; `auto` chooses by what it is told and says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distill.encoders import Architecture
from distill.errors import ObjectiveError
from distill.objectives import build_objective
from distill.objectives.losses import LOSSES
from distill.objectives.plan import term_problems
from distill.objectives.presets import PRESETS, auto, preset_terms, refuse_logits, resolve_terms
from distill.recipe import ObjectiveRecipe, TermRecipe
from distill.tasks import TASKS

BASE = Architecture("bert", layers=12, width=768, heads=12, labels=2, vocab=30522)
SIX = Architecture("bert", layers=6, width=768, heads=12, labels=2, vocab=30522)
NARROW = Architecture("bert", layers=6, width=384, heads=12, labels=2, vocab=30522)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("student", [SIX, NARROW], ids=["wide", "narrow"])
def test_every_preset_builds(name: str, student: Architecture) -> None:
    paired = name == "image-text"
    objective = build_objective(preset_terms(name), replace(student, paired=paired), replace(BASE, paired=paired))
    assert len(objective.plans) == len(PRESETS[name])
    for progress in (0.0, 0.3, 0.5, 0.74, 0.99):
        assert any(objective.weights(progress).values()), progress
    assert ("logits" in objective.teacher_taps) == (name not in ("none", "embedding"))


def test_the_presets_of_the_papers_are_there() -> None:
    assert set(PRESETS) == {
        "none", "logits", "logits+hidden", "logits+relations", "labels+logits", "labels+logits+hidden",
        "labels+logits+relations", "embedding", "image-text", "language", "forward-kl", "reverse-kl", "jsd",
        "textbrewer-default", "distilbert", "tinybert",
        "minilm-v1", "minilm-v2", "pkd", "mobilebert",
    }  # fmt: skip


def test_a_misspelt_preset() -> None:
    with pytest.raises(ObjectiveError, match=r"preset 'tinybret' does not exist\. Did you mean 'tinybert'\?"):
        preset_terms("tinybret")
    with pytest.raises(ObjectiveError, match=r"Known: auto, none, logits"):
        preset_terms("?")


def names(terms: list[TermRecipe]) -> list[str]:
    return [term.loss for term in terms]


@pytest.mark.parametrize(
    ("default", "student", "examples", "first", "said"),
    [
        ("logits+hidden", SIX, 10_000, "hidden_mse", "both are 768 wide, so 6 layers can follow the teacher's 12"),
        ("logits+hidden", SIX, 2_000_000, None, "hidden states of 2,000,000 examples would take about 688 GB"),
        ("none", SIX, 10_000, None, "none: the task's default"),
    ],
)
def test_auto(default: str, student: Architecture, examples: int, first: Any, said: str) -> None:
    terms, reason = auto(default, student, BASE, examples)
    assert said in reason
    assert reason.startswith(("logits", "none"))
    assert names(terms)[1:2] == ([first] if first else [])
    build_objective(terms, student, BASE)


def test_auto_learns_from_labels_where_there_are_any() -> None:
    terms, reason = auto("logits+hidden", SIX, BASE, 10_000, labelled=True)
    assert names(terms) == ["hard_labels", "soft_labels", "hidden_mse"]
    assert reason.startswith("labels+logits+hidden: both are 768 wide")
    assert names(auto("logits+hidden", NARROW, BASE, 10_000, labelled=True)[0])[:3] == [
        "hard_labels", "soft_labels", "query_relation",
    ]  # fmt: skip


def test_auto_compares_no_tokens_that_are_not_the_same() -> None:
    terms, reason = auto("logits+hidden", SIX, BASE, 10_000, same_tokens=False)
    assert names(terms) == ["soft_labels"]
    assert "splits texts into other tokens" in reason


def test_auto_for_a_narrower_student() -> None:
    terms, reason = auto("logits+hidden", NARROW, BASE, 10_000)
    assert "the student is 384 wide, the teacher 768; relations need no projection" in reason
    assert names(terms) == ["soft_labels", "query_relation", "key_relation", "value_relation"]
    assert list(build_objective(terms, NARROW, BASE).parameters()) == []
    unlisted = Architecture("ernie", layers=12, width=768, heads=12, labels=2, vocab=30522)
    terms, reason = auto("logits+hidden", NARROW, unlisted, 10_000)
    assert names(terms) == ["soft_labels", "hidden_mse"]
    assert "with a projection between" in reason
    assert len(list(build_objective(terms, NARROW, unlisted).parameters())) > 0


def test_a_recipes_own_words_come_first() -> None:
    def resolve(**fields: Any) -> tuple[list[TermRecipe], str]:
        return resolve_terms(ObjectiveRecipe.model_validate(fields), "logits+hidden", SIX, BASE, examples=100)

    terms, reason = resolve(terms=[{"loss": "hard_labels", "weight": 0.5}], preset="logits")
    assert (names(terms), terms[0].weight, reason) == (["hard_labels"], 0.5, "the recipe's own terms")
    terms, reason = resolve(preset="logits")
    assert (names(terms), reason) == (["soft_labels"], "logits: asked for by the recipe")
    terms, _ = resolve(temperature=7.0)
    assert [term.temperature for term in terms] == [7.0, None]
    assert preset_terms("logits")[0].temperature == 4.0  # the preset itself is as it was
    assert names(resolve()[0]) == ["soft_labels", "hidden_mse"]


def test_a_term_without_a_layer_map_follows_the_layers_it_was_built_from() -> None:
    terms = [TermRecipe(loss="hidden_mse"), TermRecipe(loss="value_relation")]
    three = Architecture("bert", layers=3, width=768, heads=12, labels=2, vocab=30522)
    built = build_objective(terms, three, BASE, layer_map=[(1, 2), (2, 7), (3, 12)])
    assert list(built.layer_maps.values()) == [[(0, 0), (1, 2), (2, 7), (3, 12)], [(1, 2), (2, 7), (3, 12)]]


@pytest.mark.parametrize("task", ["regression", "multi-label", "question-answering", "image-text"])
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_fits_a_task_or_is_refused(task: str, preset: str) -> None:
    """A softmax over one output has no gradient, and one over independent labels is another model."""
    losses = TASKS[task].losses
    one = Architecture("bert", layers=4, width=32, heads=4, labels=2, vocab=100)

    def resolve() -> list[TermRecipe]:
        return resolve_terms(ObjectiveRecipe(preset=preset), "logits", one, one, examples=9, losses=losses)[0]

    if preset in ("jsd", "reverse-kl"):
        with pytest.raises(
            ObjectiveError, match="compares distributions over classes, and this task's outputs are non"
        ):
            resolve()
        return
    terms = resolve()
    assert not any(LOSSES[term.loss].classes for term in terms)
    assert not list(term_problems(terms, LOSSES))


@pytest.mark.parametrize("loss", ["soft_labels", "soft_spans", "soft_labels_multilabel", "jsd", "reverse_kl"])
def test_one_temperature_for_every_soft_label(loss: str) -> None:
    recipe = ObjectiveRecipe.model_validate({"temperature": 2.5, "terms": [{"loss": loss}, {"loss": "hidden_mse"}]})
    terms, _ = resolve_terms(recipe, "logits", SIX, BASE, examples=9)
    assert [term.temperature for term in terms] == [2.5, None]


def test_logits_are_refused_where_models_give_vectors() -> None:
    for preset in ("auto", *PRESETS):
        recipe = ObjectiveRecipe(preset=preset)
        task = TASKS["sentence-embedding"]
        terms, _ = resolve_terms(recipe, task.preset, SIX, SIX, examples=9, losses=task.losses)
        if preset == "auto":
            refuse_logits(terms, task.name)
        elif any(LOSSES[term.loss].feature in ("", "logits") for term in terms):
            with pytest.raises(ObjectiveError, match="reads logits, and models for sentence-embedding give vectors"):
                refuse_logits(terms, task.name)
