"""Files that are there whole or not at all, and what a full disk is called."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.errors import DataError, OutputError


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that a reader sees the old file or the new one, never half of it."""
    beside = path.with_name(path.name + ".writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def json_lines(path: Path) -> list[Any]:
    """The values of a JSON Lines file: a line ends at a newline, and at none of the signs that `splitlines` knows.

    Raises:
        ValueError: A line is no JSON, or no UTF-8.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def utf8_lines(file: Iterable[bytes], where: str) -> Iterator[str]:
    """Lines as text, a byte order mark before the first left out.

    Raises:
        DataError: A byte is not UTF-8; names its line of `where`.
    """
    for number, raw in enumerate(file, 1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"byte 0x{raw[error.start]:02x} is not UTF-8",
                where=f"{where} line {number}",
                fix="Save the file as UTF-8.",
            ) from None


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON with sorted keys."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def read_json(path: Path) -> Any | None:
    """The file's value, None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fills a new folder beside `folder` and puts it in its place: a reader never meets a half-written one."""
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        fill(beside)
        for path in sorted(beside.rglob("*")):
            sync(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until the file's bytes are on the disk. Folders and links are left alone."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """Turns every way in which libraries say `no space left on device` into one OutputError."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        out_of_space = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not out_of_space and "No space left" not in str(error):
            raise
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        raise OutputError(
            f"the disk is full ({free / 1e6:.0f} MB free)",
            where=str(folder),
            fix="Free some space, or set `output` to another disk; the same command then goes on where it stopped.",
        ) from error
