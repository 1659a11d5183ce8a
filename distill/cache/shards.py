"""One shard of the teacher cache: a safetensors file whose rows are read through a memory map.

Padding is never stored. A feature is one of three kinds:
    row     one vector an example, (n, C) fp32: the logits of a sentence
    token   one vector a token, (tokens, H), examples end to end: hidden states, queries, logits of a tagger
    square  one matrix an example and head, flat, heads * sum of squared lengths: attention scores
Logits are fp32. The rest is fp16: 11 bits of precision, at most 65,504; a shard with a larger value holds fp32.
Numbers of classes (`logits.ids`) are integers of two bytes where those do, else of four. A feature in int8 has its
scales beside it, a feature of its own whose name ends in `.scale`: (tokens, 1), or (tokens, heads) of attention scores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from distill.errors import CacheError

Array = np.ndarray
LARGEST = 65504.0
"""The largest finite fp16 number."""

WIDE = 1 << 16
"""Class numbers from here on take four bytes, smaller ones two."""

SCALE = ".scale"
"""Ends the name of what a feature in int8 is multiplied by."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "U16": np.dtype("<u2"),
}
_LENGTHS = "lengths"
_HEADER_LIMIT = 1 << 24


@dataclass(frozen=True)
class Shard:
    """An open shard.

    Attributes:
        tensors: Memory-mapped arrays by feature.
        kinds: `row`, `token` or `square` by feature.
        tokens: (n + 1,) int64: where each example's tokens begin.
        squares: (n + 1,) int64: the same for squared lengths.
    """

    tensors: Mapping[str, Array]
    kinds: Mapping[str, str]
    tokens: Array
    squares: Array

    def __len__(self) -> int:
        return len(self.tokens) - 1

    def example(self, tap: str, row: int) -> Array:
        """One example's values: (C,), (tokens, H) or (heads, tokens, tokens); a view, nothing is copied."""
        values, kind = self.tensors[tap], self.kinds[tap]
        if kind == "row":
            return values[row]
        if kind == "token":
            return values[self.tokens[row] : self.tokens[row + 1]]
        heads = len(values) // max(1, int(self.squares[-1]))
        length = int(self.tokens[row + 1] - self.tokens[row])
        return values[heads * self.squares[row] : heads * self.squares[row + 1]].reshape(heads, length, length)


def pack_batch(tap: str, value: Tensor, mask: Tensor) -> tuple[str, list[Array]]:
    """Takes the padding out of one feature of a batch.

    Args:
        tap: Name of the feature.
        value: (B, ...), (B, L, ...) or (B, heads, L, L).
        mask: (B, L) bool: which tokens are no padding.

    Returns:
        The kind, and one array an example as `Shard.example` gives it back.
    """
    if value.ndim <= 2:
        flat = value.reshape(len(value), -1)
        return "row", list((flat.float() if flat.is_floating_point() else _short(flat)).cpu().numpy())
    if value.ndim == 3:
        packed = _narrow(tap, value[mask])  # (tokens of the batch, H)
        ends = mask.sum(1).cumsum(0).tolist()
        return "token", np.split(packed, ends[:-1])
    rows = [value[row][:, keep][:, :, keep].reshape(-1) for row, keep in enumerate(mask)]
    packed = _narrow(tap, torch.cat(rows))
    sizes = np.cumsum([row.numel() for row in rows])
    return "square", np.split(packed, sizes[:-1])


def _short(numbers: Tensor) -> Tensor:
    """Class numbers in as few bytes as hold them; int8 as it is."""
    if numbers.dtype == torch.int8:
        return numbers
    return numbers.to(torch.uint16 if numbers.numel() == 0 or int(numbers.max()) < WIDE else torch.int32)


def _narrow(tap: str, values: Tensor) -> Array:
    if not values.is_floating_point():
        return _short(values).cpu().numpy()
    fits = tap != "logits" and (values.numel() == 0 or float(values.abs().max()) <= LARGEST)
    return values.to(torch.float16 if fits else torch.float32).cpu().numpy()


def shard_bytes(lengths: Sequence[int], features: Mapping[str, tuple[str, Sequence[Array]]]) -> bytes:
    """The file's content.

    Args:
        lengths: Tokens of each example.
        features: Kind and one array an example, by feature.
    """
    tensors: dict[str, Array] = {_LENGTHS: np.asarray(lengths, np.int64)}
    for tap, (kind, values) in features.items():
        dtype = np.result_type(*{value.dtype for value in values})  # fp32 where any batch needed it
        joined = np.stack(values) if kind == "row" else np.concatenate(values)
        tensors[tap] = np.ascontiguousarray(joined, dtype)
    kinds = {tap: kind for tap, (kind, _) in features.items()}
    # One metadata entry: with several, safetensors would write them in an order of its own choosing.
    return safetensors.numpy.save(tensors, {"distill.kinds": json.dumps(kinds, sort_keys=True)})


def write_shard(path: Path, content: bytes) -> None:
    """Writes beside, waits for the disk, and renames: the shard is there whole or not at all."""
    beside = path.with_name(path.name + ".writing")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def open_shard(path: Path) -> Shard:
    """Maps a shard into memory without reading its values.

    Raises:
        CacheError: The file is not a shard.
    """
    try:
        raw: Array = np.memmap(path, np.uint8, "r")
        size = int(raw[:8].view("<u8")[0])
        if size > min(_HEADER_LIMIT, len(raw) - 8):
            raise ValueError(f"its header claims {size} bytes")
        header: dict[str, Any] = json.loads(raw[8 : 8 + size].tobytes())
        kinds = json.loads(header.pop("__metadata__")["distill.kinds"])
        plain = raw.view(np.ndarray)[8 + size :]  # slicing a np.memmap costs microseconds, a plain view a tenth
        tensors = {name: _view(plain, entry) for name, entry in header.items()}
        lengths = tensors.pop(_LENGTHS)
        # Every feature must have as many rows as the lengths say: a view past the end would fail much later.
        rows = {"row": len(lengths), "token": int(lengths.sum())}
        wrong = [tap for tap, kind in kinds.items() if kind in rows and len(tensors[tap]) != rows[kind]]
        if wrong or tensors.keys() != kinds.keys():
            raise ValueError(f"its features do not fit together: {wrong or sorted(tensors)}")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CacheError(
            f"not a readable shard ({error})", where=str(path), fix="Label again: a damaged shard is made anew."
        ) from error
    begins = np.zeros(1, np.int64)
    return Shard(
        tensors, kinds, np.concatenate([begins, lengths.cumsum()]), np.concatenate([begins, (lengths**2).cumsum()])
    )


def _view(data: Array, entry: Mapping[str, Any]) -> Array:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data):
        raise ValueError(f"data from {begin} to {end} in {len(data)} bytes")
    dtype: np.dtype[Any] = _DTYPES[entry["dtype"]]
    return data[begin:end].view(dtype).reshape(entry["shape"])


def stack_examples(values: list[np.ndarray], mask: np.ndarray, kind: str, dtype: np.dtype) -> np.ndarray:
    """One array for a batch: (B, C), (B, L, H) or (B, heads, L, L), zero where `mask` is False."""
    if kind == "row":
        return np.stack(values).astype(dtype, copy=False)
    rows, length = mask.shape
    begins, ends = mask.argmax(1), length - mask[:, ::-1].argmax(1)
    straight = bool((ends - begins == mask.sum(1)).all())  # no holes: slices copy faster than indices
    places: list[Any] = [
        slice(begin, end) if straight else np.flatnonzero(own)
        for begin, end, own in zip(begins, ends, mask, strict=True)
    ]
    if kind == "token":
        out = np.zeros((rows, length, *values[0].shape[1:]), dtype)
        for row, (place, value) in enumerate(zip(places, values, strict=True)):
            out[row, place] = value
        return out
    out = np.zeros((rows, len(values[0]), length, length), dtype)
    for row, (place, value) in enumerate(zip(places, values, strict=True)):
        out[row][(slice(None), place, place) if straight else (slice(None), *np.ix_(place, place))] = value
    return out
