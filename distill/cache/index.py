"""What a teacher cache was made from, which shards it has, and where they begin."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distill.files import sha256_file, sha256_json

FORMAT = 1
INDEX = "index.json"


class Rows(Protocol):
    """Encoded rows: `length` in tokens, `example` and what else the task has, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class CacheKey:
    """Everything a cache depends on; equal keys mean equal contents.

    Attributes:
        weights: sha256 of the teacher's weights.
        tokenizer: sha256 of its tokenizer.
        max_length: Tokens at most.
        taps: Names of the features, sorted.
        dtype: What the teacher computes in: `fp32` or `bf16`.
        texts: `encoded_hash` of the rows, or another hash of the texts in order.
        top_k: Classes of the logits that are kept; 0 for all.
        kept: How all other features are kept: `fp16`, `int8`, or not at all, `live`.
    """

    weights: str
    tokenizer: str
    max_length: int
    taps: tuple[str, ...]
    dtype: str
    texts: str
    top_k: int = 0
    kept: str = "fp16"

    @property
    def digest(self) -> str:
        """sha256 of the key."""
        return sha256_json(asdict(self))


def cache_key(
    weights_hash: str,
    tokenizer_hash: str,
    max_length: int,
    taps: Iterable[str],
    dtype: str,
    texts_hash: str,
    top_k: int = 0,
    kept: str = "fp16",
) -> CacheKey:
    """A `CacheKey`, its taps in order."""
    return CacheKey(weights_hash, tokenizer_hash, max_length, tuple(sorted(taps)), dtype, texts_hash, top_k, kept)


def made_from(key: CacheKey | str) -> dict[str, Any]:
    """What an index says of its key, as JSON gives it back."""
    return {**asdict(key), "taps": list(key.taps)} if isinstance(key, CacheKey) else {"key": key}


def encoded_hash(encoded: Rows) -> str:
    """sha256 over the token ids, segments and pixels of every row, in order."""
    digest = sha256()
    for row in range(len(encoded)):
        values = encoded[row]
        for name in ("input_ids", "token_type_ids"):
            if name in values:
                ids = np.asarray(values[name], "<i8")
                digest.update(f"{name}{len(ids)}:".encode() + ids.tobytes())
        if "pixel_values" in values:
            pixels = np.ascontiguousarray(values["pixel_values"])
            digest.update(f"pixels{pixels.shape}{pixels.dtype.str}:".encode() + pixels.tobytes())
    return digest.hexdigest()


def row_lengths(encoded: Rows) -> np.ndarray:
    """(rows,) int64: tokens of each row."""
    known = getattr(encoded, "lengths", None)
    return np.asarray([encoded[row]["length"] for row in range(len(encoded))] if known is None else known, np.int64)


def cut_shards(lengths: Sequence[int], examples: int, tokens: int) -> list[int]:
    """Where shards of at most so many examples and tokens begin, and the end of the last."""
    starts, held = [0], 0
    for row, length in enumerate(lengths):
        if row > starts[-1] and (row - starts[-1] == examples or held + length > tokens):
            starts.append(row)
            held = 0
        held += length
    return [*starts, len(lengths)]


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index, None where there is none that can be used: a cache can always be made again."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        whole = {"key", "plan", "taps", "first", "starts", "shards"} <= index.keys()
        usable = whole and index["format"] == FORMAT and len(index["starts"]) == len(index["shards"]) + 1
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index if usable else None


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is: never taken from the index, which might name any file."""
    return folder / f"shard-{number:05d}.safetensors"


def intact(folder: Path, number: int, record: Mapping[str, Any]) -> bool:
    """The shard is there, with the bytes that were recorded."""
    path = shard_path(folder, number)
    try:
        return path.stat().st_size == record["bytes"] and sha256_file(path) == record["sha256"]
    except FileNotFoundError:
        return False
