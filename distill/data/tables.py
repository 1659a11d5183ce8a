"""Reading: a hub id, CSV, TSV, JSONL, Parquet, a text file or an Arrow folder becomes one table.

Local text files are read here, so that every field stays the text that was written (`NA`, `007` and `1.0` are no
numbers) and every error knows its line. Nothing is copied to a cache folder; only hub data goes to the hub's own.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from distill.data.hub import load_hub, pick_split
from distill.data.remote import fetch, is_remote
from distill.errors import DataError, first_line
from distill.files import utf8_lines

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_FIX = f"Give a file ({', '.join(FORMATS)}), a folder written by save_to_disk, or a hub id such as name/data:config."


@dataclass(frozen=True)
class Table:
    """One source as it was read.

    Attributes:
        name: What errors call it.
        columns: Values by column, None where a row has none.
        broken: Rows that could not be read, by row (from 0): why.
        label_names: Columns whose values are class numbers: the names of those classes.
        dataset: The dataset behind the columns, where there is one.
        first: Number of row 0 in the source, where this is a part of it.
        running: The rows are lines of a running text; else each is a text of its own.
    """

    name: str
    columns: Mapping[str, Sequence[Any]]
    broken: Mapping[int, str] = field(default_factory=dict)
    label_names: Mapping[str, list[str]] = field(default_factory=dict)
    dataset: datasets.Dataset | None = None
    first: int = 0
    running: bool = False

    @property
    def folder(self) -> Path | None:
        """Where the paths in it begin; None where it is no file here."""
        path = Path(self.name).expanduser()
        return path if path.is_dir() else path.parent if path.is_file() else None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def column(self, name: str, key: str) -> list[Any]:
        """All values of a column.

        Args:
            name: The column.
            key: The setting that names it, for the error.

        Raises:
            DataError: There is no such column; says which there are and which is near.
        """
        if name in self.columns:
            return list(self.columns[name])
        known = list(self.columns)
        near = difflib.get_close_matches(name, known, n=1) or [c for c in known if c.casefold() == name.casefold()]
        guess = f"Did you mean {near[0]!r}? " if near else ""
        if len(known) == 1 and any(mark in known[0] for mark in ";|\t"):
            guess = "Its fields are not separated by commas: save it with commas, or with tabs as .tsv. "
        raise DataError(
            f"there is no column {name!r}; columns are {', '.join(map(repr, known)) or 'none'}",
            where=self.name,
            fix=f"{guess}Set {key} to a column.",
        )


def load_table(source: str | Path, split: str | None = None) -> datasets.Dataset:
    """Reads one source.

    Args:
        source: A file (.csv, .tsv, .jsonl, .json, .parquet, .txt: a text a line), a folder written by `save_to_disk`,
            a folder with a folder of images a label, or a hub id: `name/data`, `name/data:config`,
            `name/data:config:split`.
        split: Which split of a hub id or of a saved DatasetDict; `train` when None.

    Raises:
        DataError: It is missing, empty or unreadable.
    """
    table = read_table(source, split)
    for row, reason in table.broken.items():
        raise DataError(reason, where=f"{table.name} row {row + 1}", fix="Mend the row.")
    if table.dataset is not None:
        return table.dataset
    try:
        return datasets.Dataset.from_dict(dict(table.columns))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, TypeError) as error:
        raise DataError(
            f"a column holds values of several types ({first_line(error)})",
            where=table.name,
            fix="Write one type a column: texts in quotes, numbers without.",
        ) from error


def read_table(source: str | Path, split: str | None = None) -> Table:
    """`load_table` before its columns are typed: rows that cannot be read are kept apart in `broken`."""
    path = fetch(str(source)) if is_remote(str(source)) else Path(source).expanduser()
    name = str(source)
    try:
        table = _read_local(path, split) if _is_local(str(path), path) else _from_dataset(name, load_hub(name, split))
    except (OSError, UnicodeError, pyarrow.ArrowInvalid) as error:
        raise DataError(f"cannot be read ({first_line(error)})", where=name, fix=_FIX) from error
    if not len(table):
        raise DataError("holds no rows", where=table.name, fix="Give data with a header and at least one row.")
    return table


def is_hub_id(source: str | Path) -> bool:
    """Whether a source is neither a file or folder here nor a URL."""
    return not is_remote(str(source)) and not _is_local(str(source), Path(source).expanduser())


def _is_local(source: str, path: Path) -> bool:
    return path.exists() or path.suffix.lower() in FORMATS or source.startswith((".", "/", "~")) or source == ""


def _read_local(path: Path, split: str | None) -> Table:
    if not path.exists():
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        fix = f"Did you mean {folder / near[0]}?" if near else _FIX
        raise DataError("there is no such file", where=str(path), fix=fix)
    if path.is_dir():
        return _read_folder(path, split)
    readers = {
        ".csv": lambda: next(csv_tables(path, ",")),
        ".tsv": lambda: next(csv_tables(path, "\t")),
        ".jsonl": lambda: _read_json(path),
        ".ndjson": lambda: _read_json(path),
        ".json": lambda: _read_json(path),
        ".txt": lambda: Table(
            str(path), {"text": [line.strip() for line in lines(path) if line.strip()]}, running=True
        ),
        ".parquet": lambda: _from_dataset(str(path), datasets.Dataset(pyarrow.parquet.read_table(path))),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"files ending in {path.suffix!r} are not known", where=str(path), fix=_FIX)
    return reader()


def lines(path: Path) -> Iterator[str]:
    """Lines without their ends; a byte that is not UTF-8 is an error that names its line."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        yield from utf8_lines(file, str(path))


def csv_tables(path: Path, delimiter: str, rows: int = sys.maxsize) -> Iterator[Table]:
    """A file with a header, in tables of up to `rows` rows."""
    limit = csv.field_size_limit(sys.maxsize)  # a text may be longer than the module's 128 kB
    try:
        reader = csv.reader(lines(path), delimiter=delimiter, strict=True)
        header = next(reader, [])
        twice = {name for name in header if header.count(name) > 1}
        if twice:
            raise DataError(
                f"the header names {', '.join(sorted(map(repr, twice)))} twice", where=str(path), fix="Rename one."
            )
        first, whole = 0, True
        while whole:
            found, broken = _csv_rows(reader, header, rows)
            if found or first == 0:
                columns = zip(header, zip(*found, strict=True) if found else [()] * len(header), strict=True)
                yield Table(str(path), {name: list(values) for name, values in columns}, broken, first=first)
            first, whole = first + len(found), len(found) == rows
    except csv.Error as error:
        raise DataError(
            f"not readable as a table ({error})",
            where=f"{path} line {reader.line_num}",
            fix='Put texts in double quotes, and write a quote inside them twice: "".',
        ) from error
    finally:
        csv.field_size_limit(limit)


def _csv_rows(reader: Any, header: list[str], most: int) -> tuple[list[list[str | None]], dict[int, str]]:
    """Up to `most` rows, and what is wrong with those that are broken."""
    found: list[list[str | None]] = []
    broken: dict[int, str] = {}
    for values in reader:
        if not values:  # an empty line
            continue
        if len(values) != len(header):
            broken[len(found)] = (
                f"line {reader.line_num} has {len(values)} fields, the header has {len(header)}; "
                "texts that hold a separator must stand in quotes"
            )
            values = [None] * len(header)
        found.append(values)
        if len(found) == most:
            break
    return found, broken


def _read_json(path: Path) -> Table:
    """JSON lines, or one array of objects. Columns are the union over all rows."""
    start = next((line.lstrip() for line in lines(path) if line.strip()), "")
    if not start.startswith("["):
        if path.suffix.lower() == ".json":
            _refuse_one_object(path)
        return next(json_tables(path))
    try:
        found = json.loads("".join(lines(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON ({error})", where=str(path), fix="Write one object a line.") from None
    return _objects(path, found)


def _refuse_one_object(path: Path) -> None:
    """A file that is one object over several lines, or holds columns rather than rows, as pandas writes them."""
    text = "".join(lines(path)).strip()
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return
    if isinstance(found, dict) and ("\n" in text or all(isinstance(value, (dict, list)) for value in found.values())):
        raise DataError(
            "holds one object, not rows",
            where=str(path),
            fix='Give an array of objects or one object a line: of pandas, to_json(orient="records").',
        )


def json_tables(path: Path, rows: int = sys.maxsize) -> Iterator[Table]:
    """A file with an object a line, in tables of up to `rows` rows; one empty table of an empty file."""
    found: list[Any] = []
    known: list[str] = []
    first = 0
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                found.append(f"line {number} is not JSON ({error.msg})")
        if len(found) == rows:
            part = _objects(path, found, first, known)
            yield part
            known, first, found = list(part.columns), first + len(found), []
    if found or not first:
        yield _objects(path, found, first, known)


def _objects(path: Path, found: Sequence[Any], first: int = 0, known: Sequence[str] = ()) -> Table:
    rows: list[dict[str, Any]] = []
    broken: dict[int, str] = {}
    for row, value in enumerate(found):
        if not isinstance(value, dict):
            broken[row] = value if isinstance(value, str) else f"{value!r:.40} is not an object with columns"
        rows.append(value if isinstance(value, dict) else {})
    names = list(dict.fromkeys([*known, *(name for row in rows for name in row)]))
    if found and not names:
        raise DataError(broken.get(0, "its rows have no columns"), where=str(path), fix="Write one object a line.")
    return Table(str(path), {name: [row.get(name) for row in rows] for name in names}, broken, first=first)


def _read_folder(path: Path, split: str | None) -> Table:
    if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        images = _labelled_images(path)
        if images:
            return Table(str(path), {"image": [one for one, _ in images], "label": [label for _, label in images]})
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        raise DataError(f"is not a folder written by save_to_disk; it holds {inside}", where=str(path), fix=_FIX)
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.Dataset):
        return _from_dataset(str(path), loaded)
    return _from_dataset(str(path), pick_split(loaded, split, str(path)))


def _labelled_images(path: Path) -> list[tuple[str, str]]:
    """(path, label) of every image in a folder with a folder a label."""
    return [
        (file.relative_to(path).as_posix(), file.parent.name)
        for file in sorted(path.glob("*/*"))
        if file.suffix.lower() in IMAGES
        and file.is_file()
        and not file.parent.name.startswith(".")
        and not file.name.startswith(".")
    ]


def _from_dataset(name: str, dataset: datasets.Dataset) -> Table:
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):  # decoded when they are checked, not here
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    each = {column: getattr(feature, "feature", feature) for column, feature in dataset.features.items()}  # of lists
    names = {column: list(kind.names) for column, kind in each.items() if isinstance(kind, datasets.ClassLabel)}
    columns = {column: dataset[column] for column in dataset.column_names}
    return Table(name, columns, label_names=names, dataset=dataset)
