"""What one run works with: what it is given, what a student learns from it, and here the student and its objective."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from distill import processes
from distill.cache.labelling import label_rows
from distill.cards import StudentCard, load_student_card
from distill.devices import placed, training_device
from distill.encoding import all_texts
from distill.ensemble import EnsembleTeacher
from distill.errors import ObjectiveError
from distill.evaluation import Evaluation, by_group
from distill.export.token_table import check_token_table
from distill.features import describe
from distill.ledger import Ledger
from distill.lessons import Lessons
from distill.objectives import Objective, build_objective
from distill.objectives.losses import LOSSES
from distill.objectives.objective import check_top_k
from distill.objectives.presets import refuse_logits, resolve_terms
from distill.progress import Progress
from distill.recipe import Recipe, TermRecipe
from distill.student.build import Student
from distill.student.start import start_student
from distill.student.vocabulary import Trimmed, count_pieces, measure_coverage, trim_vocabulary
from distill.teacher import Checkpoint, LiveTeacher, Teacher
from distill.training.fit import tensor_collate
from distill.training.frozen import states_passed
from distill.training.sharding import sharded_copy

LARGE_VOCABULARY, FEW_TOKENS = 4096, 64
"""Of more tokens than the first, `cache.top_k = "auto"` keeps as many as the second."""

UNSEEN = {"baseline", "checkpoint_seconds", "profile", "teacher_device"}
"""What of `training` leaves the trained student as it is."""


class Run(Lessons):
    """A recipe at work in its folder: each thing is made when it is first asked for, and once.

    Args:
        recipe: What to do.
        ledger: Which stages are done.
        progress: Told about every long step.
    """

    def __init__(self, recipe: Recipe, ledger: Ledger, progress: Progress) -> None:
        super().__init__(recipe, progress)
        self.ledger = ledger
        self._passed: dict[frozenset[str], frozenset[str]] = {}

    @cached_property
    def student_card(self) -> StudentCard:
        """The student's card, before the recipe's own changes to it."""
        return load_student_card(self.recipe.student.card)

    @property
    def device(self) -> torch.device:
        """Where students are trained and models are measured."""
        return training_device()

    def groups(self, found: Evaluation) -> dict[str, Any]:
        """`groups`: measures on the test rows of each value of `data.group`; empty where there is no such column."""
        rows = self.splits.test
        if "group" not in rows.column_names:
            return {}
        return {"groups": by_group(found, rows["group"], self.task)}

    @property
    def has_baseline(self) -> bool:
        """The same student is trained without its teacher too: asked for, and there are labels to learn from."""
        return self.recipe.training.baseline and not self.task.follows

    @cached_property
    def trimmed(self) -> Trimmed | None:
        """The student's smaller vocabulary; None where it keeps the teacher's."""
        wanted = self.recipe.student.vocabulary
        if wanted == "full":
            return None
        texts = [text for rows in (self.splits.train, self.free_text) for text in all_texts(rows, self.task)]
        counts = count_pieces(texts, self.teacher.tokenizer, progress=self.progress)
        trimmed = trim_vocabulary(self.teacher.tokenizer, counts, keep=wanted)
        self.progress.table("Vocabulary", ["", "pieces", "fp32 bytes", "int8 bytes"], trimmed.rows(self._table_width()))
        seen = measure_coverage(self.teacher.tokenizer, trimmed, all_texts(self.splits.validation, self.task))
        self.progress.say(
            f"on validation text {seen.identical:,} of {seen.texts:,} texts are split as before, "
            f"{seen.unknown_after - seen.unknown_before:,} more unknown tokens"
        )
        return trimmed

    def _table_width(self) -> int:
        """Numbers a token in the student's table."""
        card, teacher = self.student_card, self.teacher.model
        own = int(teacher.get_input_embeddings().weight.shape[1])
        follows = own == getattr(teacher.config, "hidden_size", own)  # a table may have a width of its own
        sizes = (card.embedding_size, *((self.recipe.student.hidden_size, card.hidden_size) if follows else ()))
        return next((size for size in sizes if isinstance(size, int)), own)

    def new_student(self) -> Student:
        """The student as it is before training; the same one each time."""
        return replace(self.student, model=copy.deepcopy(self.student.model))

    def checkpoint_of(self, student: Student) -> Checkpoint:
        """The student with the tokenizer that it will ship with."""
        tokenizer = self.trimmed.tokenizer if self.trimmed else self.teacher.tokenizer
        return Checkpoint(student.model, tokenizer, self.teacher.labels, str(self.folder / "student"))

    @cached_property
    def student(self) -> Student:
        """The student before training, as a template for plans and objectives: it is not trained itself.

        Raises:
            StudentError: When it cannot be built.
            ExportError: When its tokens' table cannot be stored as the recipe asks for.
        """
        wanted, export = self.recipe.student, self.recipe.export
        open_to_task = wanted.dropout is None and self.student_card.dropout is None
        student = start_student(
            self.teacher.model,
            self.student_card,
            self.some_batches,
            overrides={
                "layers": wanted.layers,
                "decoder_layers": wanted.decoder_layers,
                "hidden_size": wanted.hidden_size,
                "attention_heads": wanted.attention_heads,
                "intermediate_size": wanted.intermediate_size,
                "activation": wanted.activation,
                "dropout": self.task.dropout if open_to_task else wanted.dropout,
            },
            layers=wanted.inherit_layers,
            init=wanted.init,
            seed=self.recipe.seed,
            kept_ids=self.trimmed.kept_ids if self.trimmed else None,
            progress=self.progress,
        )
        if export.embeddings == "int4":
            check_token_table(self.task.shipped(student.model), export.weights)
        return student

    def objective(self) -> tuple[Objective, str]:
        """The recipe's objective, and why it is this one."""
        student, teacher = describe(self.student.model), describe(self.teacher.model)
        recipe = self.recipe.objective
        same_tokens = self.same_tokens
        terms, reason = resolve_terms(
            recipe,
            self.task.preset,
            student,
            teacher,
            examples=len(self.transfer),
            labelled=any(label is not None for label in self.splits.train["label"]),
            same_tokens=same_tokens,
            losses=self.task.losses,
        )
        if not self.task.logits:
            refuse_logits(terms, self.task.name)
        terms = _with_options(terms, self.task.options(self.teacher.model))
        layers = self.student.layer_map
        objective = build_objective(terms, student, teacher, layer_map=layers, seed=self.recipe.seed)
        by_row = set() if self.task.by_token else {"logits"}
        by_token = sorted(objective.teacher_taps - by_row)
        if by_token and not same_tokens:
            raise ObjectiveError(
                f"it reads {', '.join(by_token)} token by token, and a student of {self.recipe.student.vocabulary} "
                "pieces splits texts into other tokens than its teacher",
                where="objective",
                fix='Set student.vocabulary = "used", or take a preset on logits alone.',
            )
        return objective, reason

    @cached_property
    def same_tokens(self) -> bool:
        """Whether the student splits every text of the transfer set as its teacher does."""
        if self.trimmed is None or self.recipe.student.vocabulary == "used":
            return True
        texts = [text for rows in (self.splits.train, self.free_text) for text in all_texts(rows, self.task)]
        seen = measure_coverage(self.teacher.tokenizer, self.trimmed, texts)
        return seen.identical == seen.texts

    def teacher_taps(self, objective: Objective) -> frozenset[str]:
        """What is asked of the teacher: what the objective reads, and what stands for the student's frozen layers."""
        return objective.teacher_taps | self.frozen_states(objective)

    def frozen_states(self, objective: Objective) -> frozenset[str]:
        """The teacher's taps that stand for the student's frozen layers; empty where these run in every step.

        Within a budget of bytes they are not kept for their own sake: a teacher that ran along would cost more.
        """
        if not self.recipe.training.freeze_layers:
            return frozenset()
        states = self._states_passed(objective.student_taps)
        return frozenset() if self.recipe.cache.max_bytes and not states <= objective.teacher_taps else states

    def _states_passed(self, student_taps: frozenset[str]) -> frozenset[str]:
        if student_taps not in self._passed:
            settings, student, teacher = self.recipe.training, self.student.model, self.teacher.model
            batch = self.some_batches()[0]
            with placed([teacher], torch.device("cpu")):
                self._passed[student_taps] = states_passed(student, teacher, settings, student_taps, batch)
        return self._passed[student_taps]

    def cache_inputs(self, objective: Objective) -> dict[str, Any]:
        """Everything the teacher cache depends on."""
        return {
            "weights_hash": self.weights_hash,
            "tokenizer_hash": self.teacher.tokenizer_hash(),
            "max_length": self.recipe.data.max_length,
            "taps": sorted(self.teacher_taps(objective)),
            "dtype": "bf16" if self.taught_in_bf16 else "fp32",
            "texts_hash": self.texts_hash,
            "top_k": self.top_k(objective),
            "max_bytes": self.recipe.cache.max_bytes,
        }

    def top_k(self, objective: Objective) -> int:
        """Tokens whose logits are kept; 0 keeps all."""
        wanted = self.recipe.cache.top_k
        if wanted != "auto":
            return wanted
        head = self.teacher.model.get_output_embeddings()  # None where classes are no tokens
        if head is None or head.weight.shape[0] <= LARGE_VOCABULARY or "logits" not in objective.teacher_taps:
            return 0
        try:
            check_top_k(objective.plans)
        except ObjectiveError:
            return 0
        return FEW_TOKENS

    def train_inputs(self, objective: Objective | None) -> dict[str, Any]:
        """Everything the trained student depends on."""
        recipe = self.recipe
        return {
            "teacher": self.cache_inputs(objective) if objective else {"weights_hash": self.weights_hash},
            "data": self.data_hash,
            "max_length": recipe.data.max_length,
            "augment": recipe.data.augment.model_dump(mode="json"),
            "student": recipe.student.model_dump(mode="json"),
            "card": self.student_card.model_dump(mode="json"),
            "labels": self.teacher.labels,
            "objective": objective.describe() if objective else None,
            "on_policy": recipe.objective.on_policy.model_dump(mode="json"),
            "training": recipe.training.model_dump(mode="json", exclude=UNSEEN),
            "seed": recipe.seed,
            **({"targets": recipe.objective.targets} if recipe.objective.targets != "gold" else {}),
            **({"rules": rules} if (rules := self.task.rules(self.teacher.model)) else {}),
        }

    def cache(self, objective: Objective) -> Teacher:
        """The teacher cache for the transfer set: built, completed or opened; a live teacher where none is kept.

        It is asked for, and used, within `teaching`.
        """
        bf16 = self.taught_in_bf16

        def teacher_of(taps: Iterable[str]) -> LiveTeacher | EnsembleTeacher:
            live = LiveTeacher(self.teacher.model, taps, bf16=bf16)
            if not self.others:
                return live
            further = [LiveTeacher(other.model, ["logits"], bf16=bf16) for other in self.others]
            return EnsembleTeacher([live, *further], self.shares)

        def along(taps: Iterable[str]) -> LiveTeacher | EnsembleTeacher:
            if self.recipe.teacher.sharding == "none" or processes.count() == 1 or self.others:
                return teacher_of(taps)
            return LiveTeacher(sharded_copy(self.teacher.model, training_device()), taps, bf16=bf16)

        reads_padding = any(plan.reads_padding for plan in objective.plans)
        if reads_padding or not self.task.cached or self.recipe.objective.on_policy.share:
            return along(self.teacher_taps(objective))
        inputs = self.cache_inputs(objective)
        if inputs["top_k"]:
            check_top_k(objective.plans)
        return label_rows(
            teacher_of,
            self.teacher_taps(objective),
            self.transfer,
            tensor_collate(self.task, self.teacher.padding),
            self.work / "cache",
            max_bytes=inputs.pop("max_bytes"),
            inputs=inputs,
            batch_size=self.recipe.teacher.batch_size,
            text_of=self.text_of,
            along=along,
            progress=self.progress,
            store=self.recipe.cache.store,
        )


def _with_options(terms: Sequence[TermRecipe], options: Mapping[str, Any]) -> list[TermRecipe]:
    """The terms with a task's options for the losses that have them, where they are not told otherwise."""
    known = [{name: value for name, value in options.items() if name in LOSSES[term.loss].options} for term in terms]
    return [
        term.model_copy(update={"options": {**more, **term.options}}) for term, more in zip(terms, known, strict=True)
    ]
