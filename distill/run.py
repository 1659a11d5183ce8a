"""What one run works with: each thing is loaded when it is first asked for, and once."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from distill import processes
from distill.cache.cached_teacher import encoded_hash
from distill.cache.labelling import label_rows
from distill.cards import StudentCard, TeacherCard, load_student_card, load_teacher_card
from distill.checks import check_columns, check_problem
from distill.data.augmentation import kept_texts
from distill.data.packing import pack_on_disk
from distill.data.splits import Splits, content_key, load_splits
from distill.devices import placed, teacher_device, training_device
from distill.encoding import all_texts, encode_rows
from distill.ensemble import EnsembleTeacher, join
from distill.errors import ObjectiveError
from distill.evaluation import Evaluation, TorchPredictor, by_group, predict_rows
from distill.export.token_table import check_token_table
from distill.features import describe
from distill.files import sha256_file, sha256_json
from distill.ledger import Ledger
from distill.objectives import Objective, build_objective
from distill.objectives.losses import LOSSES
from distill.objectives.objective import check_top_k
from distill.objectives.presets import resolve_terms
from distill.progress import Progress
from distill.recipe import Recipe, TermRecipe
from distill.rewriting import rewritten
from distill.student.build import Student
from distill.student.start import start_student
from distill.student.vocabulary import Trimmed, count_pieces, measure_coverage, trim_vocabulary
from distill.tasks import TASKS, Encoded, Task, concatenate, find_task
from distill.tasks.encoded import Array
from distill.teacher import (
    Checkpoint,
    LiveTeacher,
    Teacher,
    check_length,
    final_names,
    load_checkpoint,
    load_config,
    match_labels,
    numbered,
    rename_labels,
    use_bf16,
)
from distill.training.fit import tensor_collate
from distill.training.frozen import states_passed
from distill.training.sharding import sharded_copy

LARGE_VOCABULARY, FEW_TOKENS = 4096, 64
"""Of more tokens than the first, `cache.top_k = "auto"` keeps as many as the second."""

CHUNK = 8192
"""Rows that are worked on together."""

LARGE = 20_000
"""Rows of a transfer set whose token ids are kept on disk."""

UNSEEN = {"baseline", "checkpoint_seconds", "profile", "teacher_device"}
"""What of `training` leaves the trained student as it is."""

CLASSIFIER = "ForSequenceClassification"
"""How architectures end whose single output is a number."""

SAMPLE = 256
"""Texts that a student is fitted on."""


class Run:
    """A recipe at work in its folder.

    Args:
        recipe: What to do.
        ledger: Which stages are done.
        progress: Told about every long step.
    """

    def __init__(self, recipe: Recipe, ledger: Ledger, progress: Progress) -> None:
        self.recipe, self.ledger, self.progress = recipe, ledger, progress
        self.folder = recipe.folder
        self.work = self.folder / "work"
        self._said: dict[str, Array] = {}
        self._passed: dict[frozenset[str], frozenset[str]] = {}
        self._cut: set[str] = set()

    @cached_property
    def card(self) -> TeacherCard | None:
        """The teacher's card, where the recipe names one."""
        return load_teacher_card(self.recipe.teacher.card) if self.recipe.teacher.card else None

    @cached_property
    def student_card(self) -> StudentCard:
        """The student's card, before the recipe's own changes to it."""
        return load_student_card(self.recipe.student.card)

    @property
    def start(self) -> str:
        """The pretrained model to fine-tune; empty where a fine-tuned one is given."""
        return "" if self.recipe.teacher.checkpoint or self.card else self.recipe.teacher.start

    @property
    def source(self) -> str:
        """Where the fine-tuned teacher is."""
        if self.start:
            return str(self.folder / "teacher")
        return self.recipe.teacher.checkpoint or (self.card.location() if self.card else "")

    @property
    def revision(self) -> str:
        """Commit or tag of a hub id."""
        return self.recipe.teacher.revision or (self.card.revision if self.card and not self.start else "")

    @property
    def floor(self) -> float:
        """The score on validation data below which the teacher is not believed."""
        return max(self.recipe.teacher.floor, self.card.floor.value if self.card and self.card.floor else 0.0)

    @cached_property
    def task(self) -> Task:
        """The recipe's task, or the one the teacher's architecture is made for."""
        if self.recipe.task != "auto":
            task, reason = TASKS[self.recipe.task], "asked for by the recipe"
            if any(other.kin == task.name for other in TASKS.values()):
                made = list(load_config(self.start or self.source, self.revision).architectures or [])
                task = find_task(task.name, made)
                reason += (
                    "" if task.name == self.recipe.task else f" as {self.recipe.task}, and it is a {', '.join(made)}"
                )
        elif self.start:
            task, reason = TASKS["text-classification"], "what `teacher.start` is fine-tuned for where no task is named"
        else:
            config = load_config(self.source, self.revision)
            made = list(config.architectures or [])
            problem = config.problem_type
            if not problem and config.num_labels == 1 and any(name.endswith(CLASSIFIER) for name in made):
                problem = "regression"  # a language model's config may say 1, which says nothing of it
            task = find_task("auto", made, problem=problem, where=self.source)
            reason = f"the teacher is a {', '.join(made)}" + (f" for {problem}" if problem else "")
        self.progress.say(f"task: {task.name} ({reason})")
        check_columns(task, self.recipe)
        return task

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
        if self.card and len(self.card.labels) == len(checkpoint.labels):
            checkpoint.labels = list(self.card.labels)
        if not self.task.named:
            return checkpoint
        names = recipe.data.labels or self.splits.labels
        ordered = bool(recipe.data.labels)
        label_map = recipe.teacher.label_map
        if not label_map and (label_map := numbered(checkpoint.labels, names)):
            self.progress.say("labels: the teacher has no names for its classes, and the data their numbers")
        order = match_labels(checkpoint.labels, names, label_map, where=self.source, ordered=ordered)
        rename_labels(checkpoint, final_names(checkpoint.labels, names, label_map, order), order)
        return checkpoint

    @cached_property
    def others(self) -> list[Checkpoint]:
        """The further teachers of an ensemble, their classes in the order of the first one's."""
        checkpoints = [load_checkpoint(source, self.task) for source in self.recipe.teacher.ensemble]
        for checkpoint in checkpoints:
            check_length(checkpoint, self.recipe.data.max_length)
            join(self.teacher, checkpoint, self.recipe.teacher.label_map)
        return checkpoints

    @property
    def device(self) -> torch.device:
        """Where students are trained and models are measured."""
        return training_device()

    @property
    def teacher_device(self) -> torch.device:
        """Where the teacher answers."""
        return teacher_device(self.recipe.training.teacher_device)

    def teaching(self) -> AbstractContextManager[None]:
        """Within the block the teachers are where they answer; outside, on the CPU as everything is."""
        return placed([self.teacher.model, *(other.model for other in self.others)], self.teacher_device)

    @property
    def shares(self) -> list[float]:
        """How much each teacher of the ensemble counts."""
        return self.recipe.teacher.ensemble_weights or [1.0] * (1 + len(self.recipe.teacher.ensemble))

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

    def encode(self, checkpoint: Checkpoint, rows: Any) -> Encoded:
        """Token ids and class numbers of a split as `checkpoint` has them."""
        encoded = encode_rows(self.task, rows, checkpoint.tokenizer, self.recipe.data.max_length, checkpoint.labels)
        self._say_cut(rows, encoded.cut, checkpoint.tokenizer)
        if self.task.follows and any(rows is split for split in (self.splits.validation, self.splits.test)):
            said: dict[str, Any] = {**encoded.given, self.task.follows: self.said_by_teacher(rows)}
            encoded = replace(encoded, given=said)
        return encoded

    def _say_cut(self, rows: Any, cut: int, tokenizer: Any) -> None:
        """Says once of each split how many of its rows are too long."""
        splits = {name: getattr(self.splits, name) for name in ("train", "validation", "test", "unlabelled")}
        limit = self.recipe.data.max_length
        for name in [name for name, split in splits.items() if cut and rows is split and name not in self._cut]:
            self._cut.add(name)
            self.progress.say(
                f"{cut:,} of {len(rows):,} {name} texts lose their {_lost(tokenizer)}: they are longer than "
                f"data.max_length = {limit} tokens allows"
            )

    def said_by_teacher(self, rows: Any) -> Array:
        """The teacher's output for a split that the task takes for labels."""
        place = "validation" if rows is self.splits.validation else "test"
        if place not in self._said:
            teacher, limit = self.teacher, self.recipe.data.max_length
            encoded = encode_rows(self.task, rows, teacher.tokenizer, limit, teacher.labels)
            with self.teaching():
                found = predict_rows(TorchPredictor(teacher.model, self.task), encoded, self.task, teacher.padding)
            self._said[place] = found[self.task.follows]
        return self._said[place]

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
    def free_text(self) -> datasets.Dataset:
        """Rows without a label, for the teacher to answer: those given, then those made from the training texts."""
        wanted = self.recipe.data.augment
        if not wanted.copies:
            return self.splits.unlabelled
        texts, given = list(self.splits.train["text"]), self.splits.unlabelled
        teacher, path = self.teacher, self.work / "augmented.json"
        made = processes.first_then_all(
            lambda: kept_texts(
                texts, wanted, teacher.model, teacher.tokenizer, path, seed=self.recipe.seed, progress=self.progress
            )
        )
        known = {
            content_key(text) for rows in (self.splits.validation, self.splits.test, given) for text in rows["text"]
        }
        new = [text for text in made if content_key(text) not in known]
        self.progress.say(f"{len(new):,} texts made from {len(texts):,}, such as {new[0]!r}" if new else "no new texts")
        more = datasets.Dataset.from_dict({"text": new, "label": [None] * len(new)}, features=given.features)
        return datasets.concatenate_datasets([given, more])

    def transfer_set(self, checkpoint: Checkpoint) -> Encoded:
        """What a student learns from: labelled training rows, then free text."""
        parts = [rows for rows in self.lessons if len(rows)]
        if sum(map(len, parts)) <= LARGE or not self.encode(checkpoint, parts[0].select([0])).packs:
            return concatenate([self.encode(checkpoint, rows) for rows in parts])
        spans = [(rows, begin) for rows in parts for begin in range(0, len(rows), CHUNK)]
        chunks = (self.encode(checkpoint, rows.select(range(at, min(at + CHUNK, len(rows))))) for rows, at in spans)
        tokenizer, limit = checkpoint.tokenizer_hash(), self.recipe.data.max_length
        key = sha256_json([self.data_hash, self.texts_made, tokenizer, limit, self.task.name, checkpoint.labels])
        folder = self.work / "encoded" / tokenizer[:16]
        return processes.first_then_all(lambda: pack_on_disk(chunks, folder, key=key))

    @property
    def texts_made(self) -> str:
        """What tells of the texts that were made beside those of the data."""
        return sha256_json([self.recipe.data.augment.model_dump(mode="json"), self.recipe.seed, len(self.free_text)])

    @cached_property
    def lessons(self) -> list[datasets.Dataset]:
        """Training rows and free text; the teacher writes targets that are missing, and all where it is asked to."""
        parts = [self.splits.train, self.free_text]
        gold = parts[:1] if self.recipe.objective.targets == "gold" else []
        told = parts[len(gold) :]
        if self.task.target != "text" or not any(map(len, told)):
            return parts
        texts, limit = [text for rows in told for text in rows["text"]], self.recipe.data.max_length
        path = self.work / "targets.json"
        teacher, task, progress = self.teacher, self.task, self.progress
        with self.teaching():
            new = processes.first_then_all(
                lambda: rewritten(texts, teacher, task, path, max_length=limit, progress=progress)
            )
        labels = iter(new)
        return gold + [
            datasets.Dataset.from_dict(
                {**rows.to_dict(), "label": list(islice(labels, len(rows)))}, features=rows.features
            )
            for rows in told
        ]

    @cached_property
    def transfer(self) -> Encoded:
        """The transfer set as the teacher reads it."""
        encoded = self.transfer_set(self.teacher)
        if encoded.cut and not self._cut & {"train", "unlabelled"}:
            self.progress.say(
                f"{encoded.cut:,} of {len(encoded):,} texts are longer than data.max_length = "
                f"{self.recipe.data.max_length} tokens and lose their {_lost(self.teacher.tokenizer)}"
            )
        return encoded

    @cached_property
    def texts_hash(self) -> str:
        """sha256 of the transfer set's token ids."""
        transfer = self.transfer
        return processes.agree(lambda: encoded_hash(transfer))

    @cached_property
    def trimmed(self) -> Trimmed | None:
        """The student's smaller vocabulary; None where it keeps the teacher's."""
        wanted = self.recipe.student.vocabulary
        if wanted == "full":
            return None
        texts = [text for rows in (self.splits.train, self.free_text) for text in all_texts(rows, self.task)]
        counts = count_pieces(texts, self.teacher.tokenizer, progress=self.progress)
        trimmed = trim_vocabulary(self.teacher.tokenizer, counts, keep=wanted)
        width = self.teacher.model.get_input_embeddings().weight.shape[1]
        columns = ["", "pieces", "fp32 bytes", "int8 bytes"]
        self.progress.table("Vocabulary", columns, trimmed.rows(self.recipe.student.hidden_size or width))
        seen = measure_coverage(self.teacher.tokenizer, trimmed, all_texts(self.splits.validation, self.task))
        self.progress.say(
            f"on validation text {seen.identical:,} of {seen.texts:,} texts are split as before, "
            f"{seen.unknown_after - seen.unknown_before:,} more unknown tokens"
        )
        return trimmed

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

    def some_batches(self) -> list[dict[str, Tensor]]:
        """Up to `SAMPLE` rows of the transfer set, evenly spread over it, in batches: what a student is fitted on."""
        step = max(1, len(self.transfer) // SAMPLE)
        rows = [self.transfer[row] for row in range(0, len(self.transfer), step)][:SAMPLE]
        collate = tensor_collate(self.task, self.teacher.padding)
        return [collate(rows[begin : begin + 32]) for begin in range(0, len(rows), 32)]

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

    @property
    def weights_hash(self) -> str:
        """sha256 of the teacher's weights; of an ensemble, of all of them and of how much each counts."""
        own = self.teacher.weights_hash()
        if not self.others:
            return own
        return sha256_json([own, *(other.weights_hash() for other in self.others), *self.shares])

    @property
    def taught_in_bf16(self) -> bool:
        """Whether the teacher answers in bf16: not where it says numbers, of which 1990 and 1993 would be the same."""
        return self.task.target != "number" and use_bf16(self.recipe.training.precision, self.teacher_device)

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

    def text_of(self, example: int) -> str:
        """The text of a row of the transfer set, for errors."""
        known, source = len(self.splits.train), int(self.transfer.sources[example])
        rows, row = (self.splits.train, source) if source < known else (self.free_text, source - known)
        return self.task.plain(rows[row]["text"])

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

        if not self.task.cached or self.recipe.objective.on_policy.share:
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


def _lost(tokenizer: Any) -> str:
    """What a text loses that is too long."""
    words = getattr(tokenizer, "tokenizer", tokenizer)  # beside it an image reader may stand
    return "beginning" if getattr(words, "truncation_side", "right") == "left" else "end"


def _with_options(terms: Sequence[TermRecipe], options: Mapping[str, Any]) -> list[TermRecipe]:
    """The terms with a task's options for the losses that have them, where they are not told otherwise."""
    known = [{name: value for name, value in options.items() if name in LOSSES[term.loss].options} for term in terms]
    return [
        term.model_copy(update={"options": {**more, **term.options}}) for term, more in zip(terms, known, strict=True)
    ]
