"""Data: labelled splits and unlabelled text, checked row by row, split by content.

A row belongs to a side because of what its text says, never because of where it stands: re-ordering a file, or adding
rows to it, moves no sentence from one side to another, and no sentence stands on two sides.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

from distill.data.corpus import write_corpus
from distill.data.fields import INPUTS, TARGETS
from distill.data.rows import (
    Columns,
    Rows,
    UsableRows,
    content_fraction,
    content_key,
    count_names,
    name_labels,
    usable_rows,
)
from distill.data.sampling import LengthBucketSampler
from distill.data.streams import is_large, read_parts
from distill.data.tables import load_table, read_table
from distill.errors import DataError
from distill.files import sha256_json

__all__ = ["LengthBucketSampler", "Splits", "content_fraction", "content_key", "load_splits", "load_table"]

Source = str | Path


CHUNK = 8192
"""Rows that are hashed together."""


@dataclass(frozen=True)
class Splits:
    """Data that is ready for a task.

    Attributes:
        train: Columns `text`, `text_pair` (pairs only) and `label`, a name or what else the task's labels are.
        validation: Chooses checkpoints; the same columns.
        test: Reported on; the validation rows where no test data is given.
        unlabelled: The same columns, every `label` None; may have no rows.
        labels: Label names in order; empty where labels are no names.
        report: What was left out, moved or worth knowing, a line each.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset
    unlabelled: datasets.Dataset
    labels: list[str]
    report: list[str]

    @property
    def test_is_validation(self) -> bool:
        """No test data was given, so numbers are reported on the rows that also chose."""
        return self.test is self.validation

    @property
    def measured(self) -> str:
        """What the rows that numbers are reported on are called: `test` or `validation`."""
        return "validation" if self.test_is_validation else "test"

    def sha256(self) -> str:
        """Of every text and label, in order."""
        digest = hashlib.sha256()
        for rows in (self.train, self.validation, self.test, self.unlabelled):
            for name in sorted(rows.column_names if rows is not None else []):
                for begin in range(0, len(rows), CHUNK):
                    digest.update(sha256_json([name, rows[begin : begin + CHUNK][name]]).encode())
        return digest.hexdigest()


def load_splits(
    train: Source,
    *,
    validation: Source | None = None,
    test: Source | None = None,
    unlabelled: Sequence[Source] = (),
    text: str = "text",
    text_pair: str | None = None,
    label: str = "label",
    labels: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    on_bad_row: Literal["error", "skip"] = "error",
    inputs: str = "text",
    target: str = "class",
    group: str = "",
    prefix: str = "",
    folder: Path | None = None,
) -> Splits:
    """Reads, checks and splits the data of a run.

    Where a text stands on several sides it is kept on the one that measures: test before validation before train
    before unlabelled.

    Args:
        train: Labelled data; `load_table` says which sources there are.
        validation: Labelled data that chooses; None sets `validation_fraction` of train aside, by content.
        test: Labelled data that is only reported on; None reports on the validation data.
        unlabelled: Sources of text for the teacher to label; what `is_large` is read in parts.
        text: Column with the text.
        text_pair: Column with the second text of a pair.
        label: Column with the label: names, class numbers, or a ClassLabel.
        labels: Label names in order. None: the ClassLabel's own order, else sorted. Where the data holds class numbers
            only, they are taken as positions in this list.
        validation_fraction: Share of the contents, in (0, 1).
        on_bad_row: `error` stops at the first unusable row, `skip` leaves such rows out and counts them.
        inputs: Kind of the column `text`: a key of `INPUTS`.
        target: Kind of the column `label`: a key of `TARGETS`.
        group: Column of labelled data whose values are kept as `group`; empty keeps none.
        prefix: Put before each text, of those that are strings.
        folder: Where large unlabelled text is kept; None reads everything into memory.

    Raises:
        DataError: A source or column is missing, a row is unusable, or the labels make no sense.
    """
    columns = Columns(text, text_pair, label, on_bad_row == "skip", INPUTS[inputs], TARGETS[target], group, prefix)
    report: list[str] = []
    tables = {"train": read_table(train, "train")}
    if validation is not None:
        tables["validation"] = read_table(validation, "validation")
    if test is not None:
        tables["test"] = read_table(test, "test")
    sides = {role: usable_rows(table, columns, report) for role, table in tables.items()}
    if test is None:
        report.append("no test data: numbers are reported on the validation data, which also chooses")
    names, sides = name_labels(sides, tables["train"].label_names.get(label), labels, columns.skip, report)
    _report_conflicts(sides["train"], report)
    free = Rows("unlabelled", pairs=None if text_pair is None else [], input=columns.input, target=columns.target)
    large: list[str | Path] = []
    for source in unlabelled:
        in_parts = inputs != "image" and is_large(source)
        if in_parts and folder is not None:
            large.append(source)
            continue
        usable = UsableRows(columns, labelled=False)
        for table in read_parts(source, "unlabelled") if in_parts else [read_table(source, "unlabelled")]:
            free.extend(usable.of(table))
        usable.finish(str(source), report)
    sides["unlabelled"] = free
    if "validation" not in sides:
        sides["train"], sides["validation"] = _set_aside(sides["train"], validation_fraction)
        counts = f"{len(sides['validation'].keys):,} of {len(tables['train']):,} rows"
        report.append(f"{tables['train'].name}: {counts} set aside by content for validation")
    taught = count_names(sides["train"])
    sides = _one_side_each(sides, report)
    gone = sorted(taught.keys() - count_names(sides["train"]).keys())
    if gone:
        report.append(
            f"train: no row is left of the label {', '.join(gone[:8])}, all of whose texts stand elsewhere too"
        )
    made = {role: rows.dataset() for role, rows in sides.items()}
    if folder is not None and large:
        keys = {role: rows.keys for role, rows in sides.items()}
        more = write_corpus(large, columns, keys, folder, made["unlabelled"].features, report)
        made["unlabelled"] = datasets.concatenate_datasets([made["unlabelled"], more])
    return Splits(
        made["train"], made["validation"], made.get("test", made["validation"]), made["unlabelled"], names, report
    )


def _set_aside(rows: Rows, fraction: float) -> tuple[Rows, Rows]:
    """Train and validation by content. A label keeps its contents in train where all would be set aside."""
    aside = {key for key in rows.keys if content_fraction(key) < fraction} or {min(rows.keys)}
    names = [rows.label_names(row) for row in range(len(rows.keys))]
    staying = {name for key, found in zip(rows.keys, names, strict=True) if key not in aside for name in found}
    aside -= {key for key, found in zip(rows.keys, names, strict=True) if not staying.issuperset(found)}
    contents = len(set(rows.keys))
    if len(aside) in (0, contents):
        raise DataError(
            f"{len(rows.texts)} rows ({contents} different) are too few to set some aside for validation",
            where=rows.name,
            fix="Give more rows, or data.validation.",
        )
    chosen = [key in aside for key in rows.keys]
    return rows.keep([not one for one in chosen]), rows.keep(chosen)


def _one_side_each(sides: dict[str, Rows], report: list[str]) -> dict[str, Rows]:
    """Drops what a side that measures has already, and repetitions within the unlabelled text."""
    taken: dict[bytes, str] = {}
    result: dict[str, Rows] = {}
    for role in (role for role in ("test", "validation", "train", "unlabelled") if role in sides):
        rows = sides[role]
        lost: Counter[str] = Counter()
        keep = []
        for key in rows.keys:
            reason = taken.get(key)
            keep.append(reason is None or reason == role)
            if not keep[-1]:
                lost[f"stand in {reason} too"] += 1
            elif role == "unlabelled" and reason == role and not (rows.input.alone and rows.pairs):
                keep[-1] = False
                lost["repeat another"] += 1
            taken.setdefault(key, role)
        if lost:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
            report.append(f"{role}: {sum(lost.values()):,} rows dropped ({reasons})")
        result[role] = rows.keep(keep)
        if not any(keep) and role != "unlabelled":
            raise DataError(
                "every text stands in the validation or test data too", where=rows.name, fix="Give each its own data."
            )
    return result


def _report_conflicts(rows: Rows, report: list[str]) -> None:
    """Says how many texts carry different labels in different rows."""
    first: dict[bytes, Any] = {}
    conflicting: dict[bytes, str] = {}
    for key, label, text in zip(rows.keys, rows.labels, rows.texts, strict=True):
        if first.setdefault(key, label) != label:
            conflicting.setdefault(key, rows.input.content(text))
    if conflicting:
        example = next(iter(conflicting.values()))
        report.append(
            f"{rows.name}: {len(conflicting):,} texts have rows with different labels, such as {example[:60]!r}"
        )
