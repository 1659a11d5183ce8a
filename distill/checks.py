"""What a task cannot do is refused before anything is learnt: settings of a recipe, teachers made for another task."""

from __future__ import annotations

from transformers.activations import ACT2FN

from distill.cards import load_student_card
from distill.errors import RecipeError, TeacherError
from distill.objectives.losses import LOSSES
from distill.objectives.plan import term_problems
from distill.objectives.presets import preset_terms
from distill.recipe import Recipe
from distill.tasks import Task
from distill.teacher import Checkpoint


def check_names(recipe: Recipe) -> None:
    """Refuses what no teacher and no data could mend: cards, presets, losses and activations that do not exist.

    Raises:
        CardError: Of the student's card.
        ObjectiveError: Of the preset.
        RecipeError: Naming everything else.
    """
    load_student_card(recipe.student.card)
    if recipe.objective.preset != "auto":
        preset_terms(recipe.objective.preset)
    problems = [f"`objective.terms`: {problem}" for problem in term_problems(recipe.objective.terms, LOSSES)]
    activation = recipe.student.activation
    if activation is not None and activation not in ("teacher", *ACT2FN):
        problems.append(f"`student.activation` must be known to transformers, as gelu and relu are; got {activation!r}")
    if problems:
        raise RecipeError(problems, where="recipe")


def check_columns(task: Task, recipe: Recipe) -> None:
    """Refuses settings that the task cannot follow.

    Raises:
        RecipeError: Naming every one.
    """
    problems = []
    if task.pairs == "required" and not recipe.data.text_pair:
        problems.append(f"`data.text_pair` must name a column for {task.name}; got ''")
    if task.pairs == "none" and recipe.data.text_pair:
        problems.append(f"`data.text_pair` must be empty for {task.name}; got {recipe.data.text_pair!r}")
    if recipe.data.prefix and not task.prefixes:
        problems.append(f"`data.prefix` must be empty for {task.name}; got {recipe.data.prefix!r}")
    if recipe.data.prefix and recipe.data.augment.copies:
        problems.append("`data.augment.copies` must be 0 with `data.prefix`: new texts would lose it")
    if recipe.data.augment.copies and not task.augments:
        problems.append(f"`data.augment.copies` must be 0 for {task.name}: new texts have no place for its labels")
    if task.follows and not (recipe.teacher.checkpoint or recipe.teacher.card):
        problems.append(f"`teacher.checkpoint` must be given for {task.name}: there are no labels to fine-tune on")
    if recipe.teacher.ensemble and (task.follows or not task.cached):
        problems.append(f"`teacher.ensemble` must be empty for {task.name}; got {recipe.teacher.ensemble!r}")
    if recipe.objective.on_policy.share and not task.on_policy:
        share = recipe.objective.on_policy.share
        problems.append(
            f"`objective.on_policy.share` must be 0 for {task.name}, whose student writes no text; got {share}"
        )
    if recipe.student.vocabulary != "full" and not task.trims:
        kept = recipe.student.vocabulary
        reason = "it reads images" if "image" in task.reads else "its teacher guesses tokens"
        problems.append(f'`student.vocabulary` must be "full" for {task.name}; got {kept!r}: {reason}')
    if recipe.objective.targets != "gold" and task.target != "text":
        problems.append(f'`objective.targets` must be "gold" for {task.name}: its teacher writes no texts')
    if problems:
        raise RecipeError(problems, where="recipe")


def check_problem(checkpoint: Checkpoint, task: Task) -> None:
    """Refuses a head that was trained for another task; writes down the task's own problem where none is named.

    Raises:
        TeacherError: `problem_type` or the number of outputs belongs to another task.
    """
    config = checkpoint.model.config
    if config.problem_type is not None and config.problem_type not in task.problems:
        raise TeacherError(
            f"its problem_type is {config.problem_type!r}, which is not {task.name}",
            where=checkpoint.source,
            fix='Set task to that of the teacher, or leave it at "auto".',
        )
    if task.outputs is not None and config.num_labels != task.outputs:
        raise TeacherError(
            f"it gives {config.num_labels} outputs, {task.name} reads {task.outputs}",
            where=checkpoint.source,
            fix='Set task to that of the teacher, or leave it at "auto".',
        )
    if task.problem is not None:
        config.problem_type = task.problem
    if reason := task.teaches(checkpoint.model):
        raise TeacherError(reason, where=checkpoint.source)
