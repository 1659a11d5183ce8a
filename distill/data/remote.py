"""Files elsewhere: whatever fsspec reads (`s3://`, `hf://`, `https://`, ...), kept here under what they are now.

A file is downloaded beside and renamed, so a reader meets the whole of it or nothing; several processes may fetch the
same one. Another content, as its store tells it, is another file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from distill.errors import DataError, first_line
from distill.files import sync


def is_remote(source: str) -> bool:
    """Whether it is a URL."""
    return "://" in source


def cache_folder() -> Path:
    """Where fetched files are kept: the variable DISTILL_CACHE, or `distill` in the user's cache folder."""
    given = os.environ.get("DISTILL_CACHE")
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"


def fetch(source: str, folder: Path | None = None) -> Path:
    """The local copy of a file or folder.

    Args:
        source: A URL that fsspec knows; `file://` gives the file itself.
        folder: Where copies are kept; `cache_folder()` when None.

    Raises:
        DataError: There is nothing there, or the package for such URLs is missing.
    """
    try:
        system, path = fsspec.core.url_to_fs(source)
        if "file" in ([system.protocol] if isinstance(system.protocol, str) else system.protocol):
            return Path(path)
        names = sorted(system.find(path))
        if not names:
            raise FileNotFoundError(source)
        stamp = hashlib.sha256("\n".join([source, *(str(system.ukey(name)) for name in names)]).encode()).hexdigest()
        home = (folder or cache_folder()) / stamp[:32]
        alone = names == [path] or system.isfile(path)
        for name in names:
            within = file_name(name) if alone else os.path.relpath(name, path)
            _copy(system, name, home / within)
        return home / file_name(path) if alone else home
    except ImportError as error:
        raise DataError(
            f"cannot be reached ({first_line(error)})", where=source, fix="Install the package it names."
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot be read ({first_line(error)})", where=source, fix="Look at the address and at your credentials."
        ) from error


def file_name(path: str) -> str:
    """What a file is called: of a URL without the query, unless the query alone says how its name ends."""
    named = Path(urlsplit(path).path if is_remote(path) else path)
    return named.name if named.suffix else Path(path).name


def _copy(system: Any, name: str, target: Path) -> None:
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}.writing")
    try:
        with system.open(name, "rb") as source, beside.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        sync(beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
