"""A teacher cache kept elsewhere: what is finished is uploaded, and another machine fetches it in place of labelling.

Under the address stands a folder for each key, with the shards and `index.json`, which is written last. What is fetched
is compared with its sha256 as every cache is when it is opened: a shard that is damaged is made anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from distill.cache.index import FORMAT, INDEX, CacheKey, intact, made_from, read_index, shard_path
from distill.errors import CacheError, first_line
from distill.files import full_disk_is_an_error, sha256_file, write_json


def pull(store: str, folder: Path, key: CacheKey) -> int:
    """Fetches the shards that a local cache of this key lacks, where the store has them.

    Args:
        store: Any URL that fsspec knows, such as `s3://bucket/caches`.
        folder: The local cache's own; a cache of another key in it is replaced where the store has this one.
        key: Of the cache that is wanted.

    Returns:
        How many were fetched.

    Raises:
        CacheError: The store cannot be reached.
    """
    with _reached(store), full_disk_is_an_error(folder):
        system, home = _home(store, key)
        index = _index(system, home)
        if index.get("format") != FORMAT or index.get("key") != made_from(key):
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        here, fetched = read_index(folder), 0
        if here is None or here["key"] != index["key"]:
            (folder / INDEX).unlink(missing_ok=True)
        for number, record in enumerate(index["shards"]):
            path = shard_path(folder, number)
            if record is None or intact(folder, number, record):
                continue
            beside = path.with_name(path.name + ".writing")
            try:
                with system.open(f"{home}/{path.name}", "rb") as source, beside.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            except FileNotFoundError:  # it has expired there
                index["shards"][number] = None
                continue
            if sha256_file(beside) == record["sha256"]:
                beside.replace(path)
                fetched += 1
            else:
                beside.unlink()
                index["shards"][number] = None
        if fetched or here is None:
            write_json(folder / INDEX, index)
        return fetched


def push(store: str, folder: Path, key: CacheKey) -> int:
    """Uploads the finished shards that the store lacks, then the index.

    Args:
        store: As in `pull`.
        folder: A cache that is complete.
        key: Its key.

    Returns:
        How many were uploaded: none of a cache of another key, such as one with more taps that serves here.

    Raises:
        CacheError: The store cannot be written.
    """
    with _reached(store):
        system, home = _home(store, key)
        index = read_index(folder)
        if index is None or index["key"] != made_from(key):
            return 0
        known = {"shards": [], **_index(system, home)}
        sent = 0
        for number, record in enumerate(index["shards"]):
            name = shard_path(folder, number).name
            if record is None or (record in known["shards"][number : number + 1] and system.exists(f"{home}/{name}")):
                continue
            system.makedirs(home, exist_ok=True)
            system.put_file(str(folder / name), f"{home}/{name}")
            sent += 1
        if sent:
            system.pipe_file(f"{home}/{INDEX}", (folder / INDEX).read_bytes())
        return sent


def _home(store: str, key: CacheKey) -> tuple[Any, str]:
    system, path = fsspec.core.url_to_fs(store)
    return system, f"{path.rstrip('/')}/{key.digest[:32]}"


def _index(system: Any, home: str) -> dict[str, Any]:
    """The index that is there; empty where there is none."""
    if not system.exists(f"{home}/{INDEX}"):
        return {}
    found = json.loads(system.cat_file(f"{home}/{INDEX}"))
    return found if isinstance(found, dict) else {}


@contextmanager
def _reached(store: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        reason, fix = first_line(error), "Install the package it names."
        raise CacheError(f"cannot be reached ({reason})", where=store, fix=fix) from error
    except (OSError, ValueError) as error:
        fix = "Look at `cache.store` and at your credentials, or set it to ''."
        raise CacheError(f"cannot be used ({first_line(error)})", where=store, fix=fix) from error
