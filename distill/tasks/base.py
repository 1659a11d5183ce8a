"""What a task is: how its rows become token ids, how a batch is padded, what is measured, what the graph returns.

Nothing here needs a model. Batches are NumPy arrays, so that PyTorch and ONNX Runtime are fed by one code path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

Array = np.ndarray
Batch = dict[str, Array]
"""input_ids, attention_mask, [token_type_ids] (B, L) int64; labels; scored bool; example (B,) int64."""

NO_LABEL = -100


@dataclass(frozen=True)
class Encoded:
    """Encoded rows, packed: a million sentences of 25 tokens take 100 MB.

    Attributes:
        ragged: Columns with one value a token (`input_ids`, `token_type_ids`, token labels), all rows end to end.
        flat: Columns with one value a row (`labels`).
        offsets: (rows + 1,) int64; row i of a ragged column is `values[offsets[i]:offsets[i + 1]]`.
        first: Number of row 0 in the transfer set, so that `example` is unique over concatenated sets.
        cut: How many rows were longer than the maximum and lost their end.
    """

    ragged: Mapping[str, Array]
    flat: Mapping[str, Array]
    offsets: Array
    first: int = 0
    cut: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Mapping[str, Any]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        begin, end = self.offsets[row], self.offsets[row + 1]
        values: dict[str, Any] = {name: column[begin:end] for name, column in self.ragged.items()}
        values.update({name: column[row] for name, column in self.flat.items()})
        values["example"] = self.first + row
        return values

    @property
    def lengths(self) -> Array:
        """(rows,) int64: tokens of each row."""
        return np.diff(self.offsets)

    def select(self, rows: Sequence[int]) -> Encoded:
        """The named rows, in that order, numbered anew from 0."""
        parts = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        ragged = {
            name: np.concatenate([column[part] for part in parts]) if parts else column[:0]
            for name, column in self.ragged.items()
        }
        offsets = np.concatenate([[0], np.cumsum(self.lengths[list(rows)])]).astype(np.int64)
        return Encoded(ragged, {name: column[list(rows)] for name, column in self.flat.items()}, offsets)


def pack(ragged: Mapping[str, Sequence[Sequence[int]]], flat: Mapping[str, Array], cut: int = 0) -> Encoded:
    """Packs ragged Python lists, as a tokenizer gives them, into `Encoded`."""
    first = next(iter(ragged.values()))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in first])]).astype(np.int64)
    packed = {
        name: np.fromiter((value for row in rows for value in row), np.int32, count=int(offsets[-1]))
        for name, rows in ragged.items()
    }
    return Encoded(packed, dict(flat), offsets, cut=cut)


def concatenate(parts: Sequence[Encoded]) -> Encoded:
    """One set after the other; the columns must agree."""
    ragged = {name: np.concatenate([part.ragged[name] for part in parts]) for name in parts[0].ragged}
    flat = {name: np.concatenate([part.flat[name] for part in parts]) for name in parts[0].flat}
    lengths = np.concatenate([part.lengths for part in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(ragged, flat, offsets, cut=sum(part.cut for part in parts))


@dataclass(frozen=True)
class Padding:
    """What fills a row up to the longest of its batch: one value a ragged column."""

    values: Mapping[str, int] = field(default_factory=dict)

    def stack(self, rows: Sequence[Mapping[str, Any]], name: str, length: int) -> Array:
        """(B, length) int64 of one ragged column."""
        out = np.full((len(rows), length), self.values.get(name, 0), np.int64)
        for index, row in enumerate(rows):
            out[index, : len(row[name])] = row[name]
        return out


@dataclass(frozen=True)
class GraphSpec:
    """What the exported graph takes and returns.

    Attributes:
        inputs: Names of the int64 inputs in order.
        outputs: Names in order; what existing clients look for comes first.
        head: From the model's own output to the tensors named in `outputs`.
        axes: Dynamic axes of each input and output: position to name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    head: Callable[[Any], tuple[Any, ...]]
    axes: Mapping[str, Mapping[int, str]]


class Task(ABC):
    """A kind of problem. It holds no state: one instance serves every model.

    Attributes:
        name: What recipes and bundles call it.
        auto_class: The transformers class that loads its models.
        metric: The measure that chooses checkpoints, higher is better, in [0, 1].
        preset: Name of the default objective.
        suffixes: How the names of its architectures end.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    metric: ClassVar[str]
    preset: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids of `rows`: columns `text`, optionally `text_pair`, and `label` (None where there is none)."""

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """Pads encoded rows to the longest among them."""

    @abstractmethod
    def metrics(self, outputs: Mapping[str, Array], encoded: Encoded) -> dict[str, float]:
        """Measures `outputs` (`logits` and what else the graph returns, one entry a row) against the labels."""

    @abstractmethod
    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """What the exported graph looks like for a tokenizer that gives `inputs`."""

    @abstractmethod
    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Adds to a PyTorch model's outputs what the exported graph adds to them."""
