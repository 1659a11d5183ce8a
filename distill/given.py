"""What a run is given: teacher, data and task, each loaded when it is first asked for, and once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import torch

from distill import processes
from distill.cards import TeacherCard, load_teacher_card
from distill.checks import check_columns, check_problem
from distill.data.splits import Splits, load_splits
from distill.devices import placed, teacher_device
from distill.ensemble import join
from distill.errors import CardError, RecipeError, TeacherError
from distill.files import sha256_file, sha256_json
from distill.labels import final_names, match_labels, numbered, rename_labels
from distill.progress import Progress
from distill.recipe import Recipe
from distill.tasks import TASKS, Task, find_task
from distill.teacher import Checkpoint, check_length, load_checkpoint, load_config, use_bf16

CLASSIFIER = "ForSequenceClassification"
"""How architectures end whose single output is a number."""


class Given:
    """What a recipe names.

    Args:
        recipe: What to do.
        progress: Told about every long step.
    """

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        self.folder = recipe.folder
        self.work = self.folder / "work"

    @cached_property
    def card(self) -> TeacherCard | None:
        """The teacher's card, where the recipe names one.

        Raises:
            CardError: There is none, or it does not hold what it must.
            RecipeError: It reads fewer tokens than the recipe's texts may have.
        """
        if not self.recipe.teacher.card:
            return None
        card, longest = load_teacher_card(self.recipe.teacher.card), self.recipe.data.max_length
        if card.task not in TASKS:
            where, known = f"teacher card {card.name!r}", ", ".join(TASKS)
            raise CardError(f"its `task` is {card.task!r}, which is none", where=where, fix=f"There are: {known}.")
        if longest > card.max_length:
            problem = f"`data.max_length` must be at most {card.max_length}, as card {card.name} says; got {longest}"
            raise RecipeError([problem], where="recipe")
        return card

    @property
    def _of_card(self) -> TeacherCard | None:
        """The card, where the model is the one that it names."""
        return None if self.recipe.teacher.checkpoint else self.card

    @cached_property
    def start(self) -> str:
        """The pretrained model to fine-tune; empty where a fine-tuned one is given."""
        card = self._of_card
        if card is None:
            return "" if self.recipe.teacher.checkpoint else self.recipe.teacher.start
        return "" if card.fine_tuned or self._fits(card) else card.location()

    def _fits(self, card: TeacherCard) -> bool:
        """A card's model teaches as it is: there is nothing to fine-tune on, or it has the head that is wanted."""
        made = list(load_config(card.location(), self.revision).architectures or [])
        task = find_task(card.task if self.recipe.task == "auto" else self.recipe.task, made)
        return bool(task.follows) or any(task.fits(name) for name in made)

    @property
    def source(self) -> str:
        """Where the fine-tuned teacher is."""
        if self.start:
            return str(self.folder / "teacher")
        return self.recipe.teacher.checkpoint or (self.card.location() if self.card else "")

    @property
    def revision(self) -> str:
        """Commit or tag of a hub id."""
        return self.recipe.teacher.revision or (self._of_card.revision if self._of_card else "")

    def floor(self, measured: Mapping[str, float]) -> tuple[str, float]:
        """A metric, and its value on validation data below which the teacher is not believed.

        Args:
            measured: Every metric of the teacher. A card's floor, which stands where the recipe has none, is of one.

        Raises:
            CardError: It is of another.
        """
        own = self.card.floor if self.card else None
        if self.recipe.teacher.floor or self.card is None or own is None:
            return self.task.metric, self.recipe.teacher.floor
        if own.metric not in measured:
            raise CardError(
                f"its floor is of {own.metric}, and {self.task.name} measures {', '.join(measured)}",
                where=f"teacher card {self.card.name!r}",
                fix="Name one of these, or set teacher.floor in the recipe.",
            )
        return own.metric, own.value

    @cached_property
    def task(self) -> Task:
        """The recipe's task, else the card's, else the one the teacher's architecture is made for."""
        task, reason = self._choose_task()
        self.progress.say(f"task: {task.name} ({reason})")
        check_columns(task, self.recipe)
        return task

    def _choose_task(self) -> tuple[Task, str]:
        wanted: str = self.recipe.task
        reason = "asked for by the recipe"
        if wanted == "auto" and self._of_card:
            wanted, reason = self._of_card.task, f"card {self._of_card.name} is for it"
        if wanted != "auto":
            if all(other.kin != wanted for other in TASKS.values()):
                return TASKS[wanted], reason
            made = list(load_config(self.start or self.source, self.revision).architectures or [])
            task = find_task(wanted, made)
            return task, reason if task.name == wanted else f"{reason} as {wanted}, and it is a {', '.join(made)}"
        if self.start:
            return TASKS["text-classification"], "what `teacher.start` is fine-tuned for where no task is named"
        config = load_config(self.source, self.revision)
        made = list(config.architectures or [])
        problem = config.problem_type
        if not problem and config.num_labels == 1 and any(name.endswith(CLASSIFIER) for name in made):
            problem = "regression"  # a language model's config may say 1, which says nothing of it
        task = find_task("auto", made, problem=problem, where=self.source)
        return task, f"the teacher is a {', '.join(made)}" + (f" for {problem}" if problem else "")

    @cached_property
    def splits(self) -> Splits:
        """The data, cleaned and split."""
        return processes.first_then_all(self._load_splits)

    def _load_splits(self) -> Splits:
        data = self.recipe.data
        splits = load_splits(
            data.train,
            validation=data.validation or None,
            test=data.test or None,
            unlabelled=data.unlabelled,
            text=data.text,
            text_pair=data.text_pair or None,
            label=data.label,
            labels=data.labels or None,
            validation_fraction=data.validation_fraction,
            on_bad_row=data.on_bad_row,
            inputs=self.task.inputs,
            target=self.task.target,
            group=data.group,
            prefix=data.prefix,
            folder=self.work / "text",
        )
        for line in splits.report:
            self.progress.say(line)
        return splits

    @cached_property
    def data_hash(self) -> str:
        """sha256 of every text and label, in order."""
        splits = self.splits
        return processes.agree(splits.sha256)

    @cached_property
    def teacher(self) -> Checkpoint:
        """The fine-tuned teacher, its classes called and ordered as the data has them."""
        checkpoint = load_checkpoint(self.source, self.task, revision=self.revision)
        recipe = self.recipe
        check_length(checkpoint, recipe.data.max_length)
        check_problem(checkpoint, self.task)
        if not self.task.named:
            return checkpoint
        if self.card and self.card.labels:
            checkpoint.labels = self._labels_of(self.card, len(checkpoint.labels))
        names = recipe.data.labels or self.splits.labels
        ordered = bool(recipe.data.labels)
        label_map = recipe.teacher.label_map
        if not label_map and (label_map := numbered(checkpoint.labels, names)):
            self.progress.say("labels: the teacher has no names for its classes, and the data their numbers")
        order = match_labels(checkpoint.labels, names, label_map, where=self.source, ordered=ordered)
        rename_labels(checkpoint, final_names(checkpoint.labels, names, label_map, order), order)
        return checkpoint

    def _labels_of(self, card: TeacherCard, classes: int) -> list[str]:
        if len(card.labels) != classes:
            raise TeacherError(
                f"its head has {classes} classes, and card {card.name} names {len(card.labels)}: "
                f"{', '.join(card.labels)}",
                where=self.source,
                fix="Name a card that is its own, or leave teacher.card empty.",
            )
        return list(card.labels)

    @cached_property
    def others(self) -> list[Checkpoint]:
        """The further teachers of an ensemble, their classes in the order of the first one's."""
        checkpoints = [load_checkpoint(source, self.task) for source in self.recipe.teacher.ensemble]
        for checkpoint in checkpoints:
            check_length(checkpoint, self.recipe.data.max_length)
            join(self.teacher, checkpoint, self.recipe.teacher.label_map)
        return checkpoints

    @property
    def shares(self) -> list[float]:
        """How much each teacher of the ensemble counts."""
        return self.recipe.teacher.ensemble_weights or [1.0] * (1 + len(self.recipe.teacher.ensemble))

    @property
    def weights_hash(self) -> str:
        """sha256 of the teacher's weights; of an ensemble, of all of them and of how much each counts."""
        own = self.teacher.weights_hash()
        if not self.others:
            return own
        return sha256_json([own, *(other.weights_hash() for other in self.others), *self.shares])

    @cached_property
    def source_hash(self) -> str:
        """Content of the files that the teacher is, or is made from; of a hub id, its commit."""
        source = self.start or self.source
        folder = Path(source)
        if not folder.is_dir():
            config = load_config(source, self.revision)
            return f"{source}@{getattr(config, '_commit_hash', None) or self.revision}"
        files = [
            path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors", ".txt", ".model")
        ]
        return sha256_json({path.name: sha256_file(path) for path in files})

    @property
    def longest(self) -> int:
        """Tokens of a row at most."""
        return self.task.longest(self.teacher.model.config, self.recipe.data.max_length)

    @property
    def teacher_device(self) -> torch.device:
        """Where the teacher answers."""
        return teacher_device(self.recipe.training.teacher_device)

    def teaching(self) -> AbstractContextManager[None]:
        """Within the block the teachers are where they answer; outside, on the CPU as everything is."""
        return placed([self.teacher.model, *(other.model for other in self.others)], self.teacher_device)

    @property
    def taught_in_bf16(self) -> bool:
        """Whether the teacher answers in bf16: not where it says numbers, of which 1990 and 1993 would be the same."""
        return self.task.target != "number" and use_bf16(self.recipe.training.precision, self.teacher_device)
