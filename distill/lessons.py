"""What a student learns from: the transfer set, as its teacher reads it and as it does itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from distill import processes
from distill.cache.cached_teacher import encoded_hash
from distill.data.augmentation import kept_texts
from distill.data.packing import pack_on_disk
from distill.data.splits import content_key
from distill.encoding import encode_rows
from distill.evaluation import TorchPredictor, predict_rows
from distill.files import sha256_file, sha256_json
from distill.given import Given
from distill.progress import Progress
from distill.recipe import Recipe
from distill.rewriting import rewritten
from distill.tasks import Encoded, concatenate
from distill.tasks.encoded import Array
from distill.teacher import Checkpoint
from distill.training.fit import tensor_collate

CHUNK = 8192
"""Rows that are worked on together."""

LARGE = 20_000
"""Rows of a transfer set whose token ids are kept on disk."""

SAMPLE = 256
"""Texts that a student is fitted on."""


class Lessons(Given):
    """The rows that a recipe's data and its teacher make, and their tokens."""

    def __init__(self, recipe: Recipe, progress: Progress) -> None:
        super().__init__(recipe, progress)
        self._said: dict[str, Array] = {}
        self._cut: set[str] = set()

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

    @cached_property
    def lessons(self) -> list[datasets.Dataset]:
        """Training rows and free text; the teacher writes targets that are missing, and all where it is asked to."""
        parts = [self.splits.train, self.free_text]
        if not self._rewrites:
            return parts
        gold = parts[:1] if self.recipe.objective.targets == "gold" else []
        told = parts[len(gold) :]
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

    def transfer_set(self, checkpoint: Checkpoint) -> Encoded:
        """What a student learns from: labelled training rows, then free text."""
        parts = [rows for rows in self.lessons if len(rows)]
        if sum(map(len, parts)) <= LARGE or not self.encode(checkpoint, parts[0].select([0])).packs:
            return concatenate([self.encode(checkpoint, rows) for rows in parts])
        spans = [(rows, begin) for rows in parts for begin in range(0, len(rows), CHUNK)]
        chunks = (self.encode(checkpoint, rows.select(range(at, min(at + CHUNK, len(rows))))) for rows, at in spans)
        tokenizer, limit = checkpoint.tokenizer_hash(), self.recipe.data.max_length
        key = sha256_json([self.data_hash, self._made, tokenizer, limit, self.task.name, checkpoint.labels])
        folder = self.work / "encoded" / tokenizer[:16]
        return processes.first_then_all(lambda: pack_on_disk(chunks, folder, key=key))

    @property
    def _made(self) -> list[str]:
        """What tells of the texts and targets that were made beside those of the data."""
        names = ["augmented.json"] * (self.recipe.data.augment.copies > 0) + ["targets.json"] * self._rewrites
        return [sha256_file(self.work / name) for name in names]

    @property
    def _rewrites(self) -> bool:
        """The teacher writes targets: all of them where it is asked to, else those that are missing."""
        told = self.recipe.objective.targets != "gold" or len(self.free_text) > 0
        return self.task.target == "text" and told

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

    def some_batches(self) -> list[dict[str, Tensor]]:
        """Up to `SAMPLE` rows of the transfer set, evenly spread over it, in batches: what a student is fitted on."""
        places = np.linspace(0, len(self.transfer) - 1, min(SAMPLE, len(self.transfer))).astype(int)
        rows = [self.transfer[int(row)] for row in places]
        collate = tensor_collate(self.task, self.teacher.padding)
        return [collate(rows[begin : begin + 32]) for begin in range(0, len(rows), 32)]

    def text_of(self, example: int) -> str:
        """The text of a row of the transfer set, for errors."""
        known, source = len(self.splits.train), int(self.transfer.sources[example])
        rows, row = (self.splits.train, source) if source < known else (self.free_text, source - known)
        return self.task.plain(rows[row]["text"])


def _lost(tokenizer: Any) -> str:
    """What a text loses that is too long."""
    words = getattr(tokenizer, "tokenizer", tokenizer)  # beside it an image reader may stand
    return "beginning" if getattr(words, "truncation_side", "right") == "left" else "end"
