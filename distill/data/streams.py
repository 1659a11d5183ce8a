"""Sources that may be larger than memory, read a few thousand rows at a time: one table after the other."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from distill.data.hub import FAILURES, hub_facts, load_hub
from distill.data.remote import fetch, is_remote
from distill.data.tables import FORMATS, Table, csv_tables, is_hub_id, json_tables, lines, read_table
from distill.errors import DataError, first_line

ROWS = 8192
"""Rows a table."""

LARGE = 1 << 26
"""A file of more bytes is read in parts."""

_SAVED = ("dataset_info.json", "dataset_dict.json")


def is_large(source: str | Path) -> bool:
    """Whether a source is one to read in parts: a folder of files, a compressed file, a URL, or 64 MB and more.

    A data set of unknown size on the hub is taken for large.
    """
    path = Path(source).expanduser()
    if is_hub_id(source):
        facts = hub_facts(str(source))
        return facts is not None and (facts[1] is None or facts[1] >= LARGE)
    if is_remote(str(source)):
        return True
    if path.is_dir():
        return not any((path / name).exists() for name in _SAVED)
    return path.is_file() and (path.suffix.lower() == ".gz" or path.stat().st_size >= LARGE)


def files_of(source: str | Path) -> list[Path]:
    """The files behind a source, in the order they are read; none for a hub id or a folder of `save_to_disk`."""
    path = fetch(str(source)) if is_remote(str(source)) else Path(source).expanduser()
    if not path.is_dir():
        return [path] if path.exists() else []
    if any((path / name).exists() for name in _SAVED):
        return []
    return sorted(file for file in path.rglob("*") if file.is_file() and _kind(file) in FORMATS and not _packed(file))


def signature_of(source: str | Path) -> list[Any]:
    """What tells that a source is what it was: path, size and time of each file, or the version on the hub."""
    if is_hub_id(source):
        return [str(source), hub_facts(str(source))]
    files = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files_of(source)]
    return [str(source), files]


def read_parts(source: str | Path, split: str | None = None) -> Iterator[Table]:
    """Tables of up to `ROWS` rows; `Table.first` numbers the rows of each file on.

    Args:
        source: As in `load_table`, or a folder of such files, each of them also with `.gz` behind; a
            hub id is streamed.
        split: Which split of a hub id.

    Raises:
        DataError: It is missing, empty or unreadable.
    """
    if is_hub_id(source):
        yield from _streamed(str(source), split)
        return
    files = files_of(source)
    if not files:
        if Path(source).is_dir() and not any((Path(source) / name).exists() for name in _SAVED):
            raise DataError("holds no file to read", where=str(source), fix=f"Files end in {', '.join(FORMATS)}.")
        yield from _slices(read_table(source, split))
    for path in files:
        try:
            # An empty file among others says nothing, not even which columns it has.
            yield from (table for table in _parts(path) if table.columns or len(files) == 1)
        except (OSError, UnicodeError, EOFError, pyarrow.ArrowInvalid) as error:
            raise DataError(f"cannot be read ({first_line(error)})", where=str(path), fix="Write it anew.") from error


def _kind(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _packed(path: Path) -> bool:
    """Whether it is compressed and of a kind that is read as a whole."""
    return path.suffix.lower() == ".gz" and _kind(path) in (".json", ".parquet")


def _parts(path: Path) -> Iterator[Table]:
    kind = _kind(path)
    if kind in (".csv", ".tsv"):
        yield from csv_tables(path, "," if kind == ".csv" else "\t", ROWS)
    elif kind in (".jsonl", ".ndjson"):
        yield from json_tables(path, ROWS)
    elif kind == ".txt":
        texts, first = (line.strip() for line in lines(path) if line.strip()), 0
        while part := list(islice(texts, ROWS)):
            yield Table(str(path), {"text": part}, first=first, running=True)
            first += len(part)
    elif kind == ".parquet":
        first = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(ROWS):
            yield Table(str(path), batch.to_pydict(), first=first)
            first += batch.num_rows
    else:
        yield from _slices(read_table(path))


def _streamed(source: str, split: str | None) -> Iterator[Table]:
    first = 0
    try:
        for part in load_hub(source, split, streaming=True).iter(ROWS):
            table = Table(source, part, first=first)
            yield table
            first += len(table)
    except DataError:
        raise
    except FAILURES as error:
        raise DataError(
            f"the hub stopped after {first:,} rows ({first_line(error)})", where=source, fix="Run it again."
        ) from error
    if not first:
        raise DataError("holds no rows", where=source, fix="Name another split: name/data:config:split.")


def _slices(table: Table) -> Iterator[Table]:
    """Parts of a table whose rows stay on disk where it has a dataset behind it."""
    rows: Any = table.dataset
    for first in range(0, len(table), ROWS):
        part: dict[str, Any]
        if isinstance(rows, datasets.Dataset):
            part = rows[first : first + ROWS]
        else:
            part = {name: values[first : first + ROWS] for name, values in table.columns.items()}
        broken = {row - first: why for row, why in table.broken.items() if first <= row < first + ROWS}
        yield Table(table.name, part, broken, table.label_names, first=first)
