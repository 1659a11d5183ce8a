"""Encoded rows on disk: arrays that are read through memory maps, for transfer sets larger than memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from distill.files import read_json, replace_folder, write_json
from distill.tasks.encoded import SOURCE, Encoded

_FACTS = "encoded.json"
_FORMAT = 2
"""Of the folder: 1 knew no columns with several numbers a row."""


def pack_on_disk(parts: Iterable[Encoded], folder: Path, *, key: str) -> Encoded:
    """`concatenate` through a folder: one part is held at a time.

    What is there is taken as it is where its key is the same.

    Args:
        parts: Rows of one task; the columns must agree. Columns of rows of numbers (`Ragged`) are not for this.
        folder: The set's own; replaced at once when all is written.
        key: Stands for everything the parts depend on.

    Returns:
        Memory-mapped; an `Encoded` like any other. `given` is not kept.
    """
    facts = read_json(folder / _FACTS)
    if facts is None or (facts["key"], facts.get("format")) != (key, _FORMAT):
        said = {"key": key, "format": _FORMAT}
        replace_folder(folder, lambda beside: write_json(beside / _FACTS, {**said, **_write(parts, beside)}))
        facts = read_json(folder / _FACTS) or {}
    columns = {name: _map(folder / f"{name}.bin", *kind) for name, kind in facts["columns"].items()}
    flat = {name: columns[name] for name in facts["flat"]}
    ragged = {name: columns[name] for name in facts["ragged"]}
    return Encoded(ragged, flat, columns["offsets"], cut=facts["cut"], names=facts["names"])


def _write(parts: Iterable[Encoded], folder: Path) -> dict[str, Any]:
    kinds: dict[str, tuple[str, list[int]]] = {}
    facts: dict[str, Any] = {"columns": kinds, "ragged": [], "flat": [], "cut": 0, "names": []}
    tokens = sources = 0
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}

        def append(name: str, values: np.ndarray) -> None:
            if name not in files:
                files[name] = stack.enter_context((folder / f"{name}.bin").open("wb"))
                kinds[name] = values.dtype.str, list(values.shape[1:])
            np.ascontiguousarray(values, kinds[name][0]).tofile(files[name])

        append("offsets", np.zeros(1, np.int64))
        for part in parts:
            facts |= {"ragged": sorted(part.ragged), "flat": sorted(part.flat), "names": list(part.names)}
            facts["cut"] += part.cut
            append("offsets", part.offsets[1:] + tokens)
            tokens += int(part.offsets[-1])
            for name, values in part.ragged.items():
                append(name, values)
            for name, values in part.flat.items():
                append(name, values + sources if name == SOURCE else values)
            sources += int(part.sources.max(initial=-1)) + 1
    return facts


def _map(path: Path, dtype: str, shape: Sequence[int]) -> np.ndarray:
    """The column in a file, `shape` that of one of its values."""
    if not path.stat().st_size:
        return np.zeros((0, *shape), dtype)
    column = np.memmap(path, dtype, "r").view(np.ndarray)  # slicing a np.memmap costs microseconds, a view a tenth
    return column.reshape(-1, *shape)
