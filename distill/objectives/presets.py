"""First form."""

from __future__ import annotations

from typing import Any

from distill.recipe import TermRecipe


def preset_terms(name: str) -> list[TermRecipe]:
    if name == "none":
        return [TermRecipe(loss="hard_labels")]
    return [TermRecipe(loss="soft_labels", temperature=4.0), TermRecipe(loss="hidden_mse")]


def resolve_terms(
    recipe: Any, preset: str, student: Any, teacher: Any, *, examples: int
) -> tuple[list[TermRecipe], str]:
    if recipe.terms:
        return recipe.terms, "given by the recipe"
    return preset_terms(preset if recipe.preset == "auto" else recipe.preset), "first form"
