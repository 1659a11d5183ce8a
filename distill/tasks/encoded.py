"""Encoded rows, packed, and what fills them up to a batch: NumPy alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distill.heads.images import Preprocessing

Array = np.ndarray
Batch = dict[str, Array]
"""What the model reads, such as input_ids (B, L) int64; attention_mask (B, L) int64, 1 where there is a token, be it of
text or a patch of an image; labels; scored bool; example (B,) int64."""
NO_LABEL = -100
SOURCE = "source"
"""Name of the flat column that numbers the row of the data, where a row may be read in several windows."""


@dataclass(frozen=True)
class Ragged:
    """A flat column whose every value is a row of numbers of its own length, such as the tokens of a translation.

    Attributes:
        values: All rows end to end.
        offsets: (rows + 1,) int64; row i is `values[offsets[i]:offsets[i + 1]]`.
    """

    values: Array
    offsets: Array

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> Ragged:
        """Packs lists of numbers."""
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        return Ragged(np.fromiter((value for row in rows for value in row), np.int32, int(offsets[-1])), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, rows: Any) -> Any:
        """One row by its number; a column of rows by a list of numbers."""
        if isinstance(rows, (int, np.integer)):
            return self.values[self.offsets[rows] : self.offsets[rows + 1]]
        return Ragged.of([self[int(row)] for row in rows])


def _joined(columns: Sequence[Any]) -> Any:
    if isinstance(columns[0], Ragged):
        return Ragged.of([column[row] for column in columns for row in range(len(column))])
    return np.concatenate(columns)


@dataclass(frozen=True)
class Encoded:
    """Encoded rows, packed: a million sentences of 25 tokens take 100 MB.

    Attributes:
        ragged: Columns with one value a token (`input_ids`, `token_type_ids`, token labels), all rows end to end.
        flat: Columns with one value a row (`labels`): arrays, or `Ragged` where a value is a row of numbers itself.
        offsets: (rows + 1,) int64; row i of a ragged column is `values[offsets[i]:offsets[i + 1]]`.
        first: Number of row 0 in the transfer set, so that `example` is unique over concatenated sets.
        cut: How many rows were longer than the maximum and lost their end.
        names: Label names by class number, where the measures need them.
        given: The columns that were encoded, where the measures need them.
    """

    ragged: Mapping[str, Array]
    flat: Mapping[str, Any]
    offsets: Array
    first: int = 0
    cut: int = 0
    names: Sequence[str] = ()
    given: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        begin, end = self.offsets[row], self.offsets[row + 1]
        values: dict[str, Any] = {name: column[begin:end] for name, column in self.ragged.items()}
        values.update({name: column[row] for name, column in self.flat.items()})
        values["example"], values["length"] = self.first + row, int(end - begin)
        return values

    @property
    def sources(self) -> Array:
        """(rows,) int64: the row of the data that each comes from; a long text may be read in several windows."""
        return self.flat[SOURCE] if SOURCE in self.flat else np.arange(len(self))

    @property
    def lengths(self) -> Array:
        """(rows,) int64: tokens of each row."""
        return np.diff(self.offsets)

    @property
    def packs(self) -> bool:
        """Every column is one array, as `distill.data.packing` writes them."""
        return not any(isinstance(column, Ragged) for column in self.flat.values())

    def select(self, rows: Sequence[int]) -> Encoded:
        """The named rows, in that order, numbered anew from 0."""
        parts = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        ragged = {
            name: np.concatenate([column[part] for part in parts]) if parts else column[:0]
            for name, column in self.ragged.items()
        }
        offsets = np.concatenate([[0], np.cumsum(self.lengths[list(rows)])]).astype(np.int64)
        flat = {name: column[list(rows)] for name, column in self.flat.items()}
        return Encoded(ragged, flat, offsets, names=self.names, given=self.given)


def pack(ragged: Mapping[str, Sequence[Sequence[int]]], flat: Mapping[str, Any], cut: int = 0) -> Encoded:
    """Packs ragged Python lists, as a tokenizer gives them, into `Encoded`."""
    first = next(iter(ragged.values()))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in first])]).astype(np.int64)
    packed = {
        name: np.fromiter((value for row in rows for value in row), np.int32, count=int(offsets[-1]))
        for name, rows in ragged.items()
    }
    return Encoded(packed, dict(flat), offsets, cut=cut)


def concatenate(parts: Sequence[Encoded]) -> Encoded:
    """One set after the other; the columns must agree. `given` is not kept: transfer sets are not measured on."""
    ragged = {name: np.concatenate([part.ragged[name] for part in parts]) for name in parts[0].ragged}
    flat = {name: _joined([part.flat[name] for part in parts]) for name in parts[0].flat}
    if SOURCE in flat:
        rows = np.cumsum([0, *(part.sources.max(initial=-1) + 1 for part in parts)])
        flat[SOURCE] = np.concatenate([part.sources + begin for part, begin in zip(parts, rows, strict=False)])
    lengths = np.concatenate([part.lengths for part in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(ragged, flat, offsets, cut=sum(part.cut for part in parts), names=parts[0].names)


@dataclass(frozen=True)
class Padding:
    """What fills a row up to the longest of its batch: one value a ragged column.

    Attributes:
        values: By column.
        start: The token before the first that a decoder writes.
        images: How pixels become numbers, where the task reads images.
    """

    values: Mapping[str, int] = field(default_factory=dict)
    start: int = 0
    images: Preprocessing | None = None

    def stack(self, rows: Sequence[Mapping[str, Any]], name: str, length: int) -> Array:
        """(B, length) int64 of one ragged column."""
        out = np.full((len(rows), length), self.values.get(name, 0), np.int64)
        for index, row in enumerate(rows):
            out[index, : len(row[name])] = row[name]
        return out


def softmax(logits: Array) -> Array:
    """Over the last axis, in fp32."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def pad_columns(rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
    """input_ids, attention_mask, [token_type_ids] (B, L) and example (B,) of encoded rows."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    longest = int(lengths.max())
    batch = {name: padding.stack(rows, name, longest) for name in ("input_ids", "token_type_ids") if name in rows[0]}
    batch["attention_mask"] = (np.arange(longest) < lengths[:, None]).astype(np.int64)
    batch["example"] = np.array([row["example"] for row in rows], np.int64)
    return batch
