"""Rows: what each says and is called, and what is wrong with those that cannot be used."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import datasets

from distill.data.fields import INPUTS, TARGETS, Input, Target
from distill.data.tables import Table
from distill.errors import DataError
from distill.heads.base import whole

_SKIP = 'Mend it, or set data.on_bad_row = "skip" to leave such rows out.'


@dataclass
class Rows:
    """Usable rows of one side. `numbers` are rows of the source, from 1, for errors."""

    name: str
    texts: list[Any] = field(default_factory=list)
    pairs: list[str] | None = None
    labels: list[Any] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    input: Input = INPUTS["text"]
    target: Target = TARGETS["class"]
    groups: list[str] | None = None

    def keep(self, wanted: Sequence[bool]) -> Rows:
        """The rows for which `wanted` is true."""

        def chosen(values: Sequence[Any]) -> list[Any]:
            return [value for value, keep in zip(values, wanted, strict=True) if keep]

        pairs = None if self.pairs is None else chosen(self.pairs)
        groups = None if self.groups is None else chosen(self.groups)
        return replace(
            self,
            texts=chosen(self.texts),
            pairs=pairs,
            labels=chosen(self.labels),
            keys=chosen(self.keys),
            numbers=chosen(self.numbers),
            groups=groups,
        )

    def label_names(self, row: int) -> Sequence[str]:
        """The names of classes in a row's label; none where it has no label, or labels are no names."""
        label = self.labels[row]
        return () if label is None or self.target.names is None else self.target.names(label)

    def extend(self, more: Rows) -> None:
        """Adds the rows of another source of the same side."""
        self.texts += more.texts
        self.labels += more.labels
        self.keys += more.keys
        self.numbers += more.numbers
        if self.pairs is not None and more.pairs is not None:
            self.pairs += more.pairs

    def columns(self) -> dict[str, list[Any]]:
        """Values of `text`, [`text_pair`], [`group`] and `label`."""
        columns: dict[str, list[Any]] = {"text": self.texts}
        if self.pairs is not None:
            columns["text_pair"] = self.pairs
        if self.groups is not None:
            columns["group"] = self.groups
        return {**columns, "label": self.labels}

    def dataset(self) -> datasets.Dataset:
        """Columns `text`, [`text_pair`], [`group`] and `label`, of the kinds that input and target have."""
        kinds = {
            "text": self.input.feature,
            "text_pair": datasets.Value("string"),
            "group": datasets.Value("string"),
            "label": self.target.feature,
        }
        columns = self.columns()
        return datasets.Dataset.from_dict(columns, features=datasets.Features({name: kinds[name] for name in columns}))


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, of which kinds, and what an unusable row does."""

    text: str
    text_pair: str | None
    label: str
    skip: bool
    input: Input = INPUTS["text"]
    target: Target = TARGETS["class"]
    group: str = ""
    prefix: str = ""


def content_key(text: str, text_pair: str | None = None) -> bytes:
    """sha256 of what a row says: case, kind of white space and Unicode form do not matter."""
    parts = [text] if text_pair is None else [text, text_pair]
    plain = (" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in parts)
    return hashlib.sha256("\x1f".join(plain).encode("utf-8", "surrogatepass")).digest()


def content_fraction(key: bytes, salt: str = "") -> float:
    """A number in [0, 1), uniform over contents and fixed for each: what decides the side of a row.

    Args:
        key: From `content_key`.
        salt: Another salt is another, independent number.
    """
    digest = hashlib.sha256(salt.encode() + key).digest() if salt else key
    return int.from_bytes(digest[:6], "big") / 2**48


def usable_rows(table: Table, columns: Columns, report: list[str], *, labelled: bool = True) -> Rows:
    """The rows that can be used; the others are an error or, where asked for, skipped and counted."""
    usable = UsableRows(columns, labelled=labelled)
    rows = usable.of(table)
    usable.finish(table.name, report)
    return rows


class UsableRows:
    """`usable_rows` of a source that is read in parts.

    Args:
        columns: Which columns hold what.
        labelled: Read the labels too.
    """

    def __init__(self, columns: Columns, *, labelled: bool = True) -> None:
        self.columns, self.labelled = columns, labelled and columns.target.column
        self._skipped: Counter[str] = Counter()
        self._met = 0

    def of(self, table: Table) -> Rows:
        """The usable rows of one part.

        Raises:
            DataError: A row cannot be used, and such rows are not to be skipped.
        """
        columns = self.columns
        texts = table.column("text" if table.running else columns.text, "data.text")
        pairs = None if columns.text_pair is None else table.column(columns.text_pair, "data.text_pair")
        raw = table.column(columns.label, "data.label") if self.labelled else [None] * len(texts)
        groups = table.column(columns.group, "data.group") if columns.group and self.labelled else None
        class_names = table.label_names.get(columns.label)
        rows = Rows(table.name, pairs=None if pairs is None else [], input=columns.input, target=columns.target)
        rows.groups = None if groups is None else []
        self._met += len(texts)
        for row, raw_text in enumerate(texts):
            pair, label = None if pairs is None else pairs[row], columns.target.blank(table.running)
            value, problem = columns.input.read(columns.input.located(raw_text, table.folder), columns.text)
            problem = table.broken.get(row) or problem
            if problem is None and columns.text_pair is not None:
                pair, problem = INPUTS["text"].read(pair, columns.text_pair)
            if problem is None and self.labelled:
                label, problem = columns.target.read(raw[row], columns.label, class_names)
                problem = problem or columns.target.fits(value, pair, label)
            if problem is not None:
                if not columns.skip:
                    raise DataError(problem, where=f"{table.name} row {table.first + row + 1}", fix=_SKIP)
                self._skipped[problem.split(";")[0] if row not in table.broken else "not readable"] += 1
                continue
            rows.texts.append(columns.prefix + value if columns.prefix else value)
            if rows.pairs is not None:
                rows.pairs.append(str(pair))
            rows.labels.append(label)
            if rows.groups is not None and groups is not None:
                rows.groups.append(whole(str(groups[row])))
            rows.keys.append(content_key(columns.input.content(value), None if columns.input.alone else pair))
            rows.numbers.append(table.first + row + 1)
        return rows

    def finish(self, name: str, report: list[str]) -> None:
        """Reports what was skipped.

        Raises:
            DataError: No row of the source can be used.
        """
        skipped = self._skipped
        if skipped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common(4))
            report.append(f"{name}: {sum(skipped.values()):,} of {self._met:,} rows skipped ({reasons})")
        if self._met == sum(skipped.values()):
            raise DataError("no row is usable", where=name, fix="Look at data.text and data.label.")


def name_labels(
    sides: dict[str, Rows],
    class_names: list[str] | None,
    wanted: Sequence[str] | None,
    skip: bool,
    report: list[str],
    *,
    least: int = 2,
) -> tuple[list[str], dict[str, Rows]]:
    """Label names in order, and the sides with labels of those names alone; no names where labels are none.

    Args:
        sides: By role; `train` has the labels.
        class_names: What the file calls its classes.
        wanted: What the recipe calls them.
        skip: Rows of unknown labels are left out, not refused.
        report: Gets a line for what was done.
        least: So many labels have to occur: two to learn from, none to measure with.
    """
    if sides["train"].target.names is None:
        return [], sides
    seen = count_names(sides["train"])
    if wanted and _are_positions(seen, wanted):
        sides = {role: _rename(rows, wanted) for role, rows in sides.items()}
        report.append("labels: " + ", ".join(f"{number} is {name}" for number, name in enumerate(wanted)))
        seen = count_names(sides["train"])
    names = list(wanted or class_names or sorted(seen, key=_numerically))
    if len(seen) < least:
        raise DataError(
            f"{next(iter(seen))!r} is the only label" if seen else "no row has a label",
            where=sides["train"].name,
            fix="A classifier needs two at least: look at data.label, and at how the file was made.",
        )
    total = sum(seen.values())
    if not wanted and not class_names and total >= 100 and len(seen) > total / 2:
        raise DataError(
            f"there are {len(seen):,} different labels in {total:,} rows, such as {next(iter(seen))!r:.40}",
            where=sides["train"].name,
            fix="Set data.label to the column with the classes.",
        )
    for alike in _alike(names):
        report.append(f"{sides['train'].name}: the labels {' and '.join(map(repr, alike))} differ in spelling alone")
    absent = [name for name in names if name not in seen]
    if absent:
        report.append(f"{sides['train'].name}: no row has the label {', '.join(absent[:8])}")
    return names, {role: _known_labels(rows, set(names), names, skip, report) for role, rows in sides.items()}


def _alike(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in case, spaces, hyphens or underscores alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(plain_name(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def plain_name(name: str) -> str:
    """`NEGATIVE` and `negative` name the same label, as do `card arrival` and `card_arrival`."""
    return name.strip().casefold().replace(" ", "_").replace("-", "_")


def count_names(rows: Rows) -> Counter[str]:
    """Rows of each label; none where labels are no names."""
    return Counter(name for row in range(len(rows.labels)) for name in rows.label_names(row))


def _known_labels(rows: Rows, known: set[str], names: list[str], skip: bool, report: list[str]) -> Rows:
    strangers = [row for row in range(len(rows.labels)) if not known.issuperset(rows.label_names(row))]
    if not strangers:
        return rows
    label = next(name for name in rows.label_names(strangers[0]) if name not in known)
    if not skip:
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise DataError(
            f"the label {label!r} is not among those of the training data or data.labels ({listed})",
            where=f"{rows.name} row {rows.numbers[strangers[0]]}",
            fix=_SKIP,
        )
    report.append(f"{rows.name}: {len(strangers):,} rows skipped (labels never seen, such as {label!r})")
    lost = set(strangers)
    kept = rows.keep([row not in lost for row in range(len(rows.labels))])
    if not kept.texts:
        raise DataError("no row has a known label", where=rows.name, fix=f"Labels are {', '.join(names[:8])}.")
    return kept


def _are_positions(seen: Iterable[str], wanted: Sequence[str]) -> bool:
    """The data has class numbers and `wanted` gives them names."""
    return all(label.isdecimal() and int(label) < len(wanted) and label not in wanted for label in seen)


def _rename(rows: Rows, names: Sequence[str]) -> Rows:
    new = {str(number): name for number, name in enumerate(names)}
    return replace(rows, labels=[None if label is None else rows.target.rename(label, new) for label in rows.labels])


def _numerically(name: str) -> tuple[int, float, str]:
    """0, 1, 2.0, 10 before words."""
    return (0, float(name), name) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) else (1, 0.0, name)
