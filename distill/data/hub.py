"""Data sets on the hub, `name/data:config:split`: fetched whole into the hub's own cache, or streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets

from distill.errors import DataError, first_line

_FIX = "Give a file, a folder written by save_to_disk, or a hub id such as name/data:config."
FAILURES = (datasets.exceptions.DatasetsError, OSError, ValueError)
"""What `datasets` raises where a data set, or the hub, is not as it should be."""

_KIN = {"validation": ("validation", "dev", "valid", "val"), "unlabelled": ("unsupervised", "unlabelled", "train")}
"""The splits that hub data sets use in a split's place."""


def load_hub(source: str, split: str | None, *, streaming: bool = False) -> Any:
    """One split of a data set on the hub.

    Args:
        source: Its id; config and split after the name may be left out or empty.
        split: The split wanted where the id names none; `train` when None.
        streaming: Give an IterableDataset, of which nothing is kept here, in place of a Dataset.

    Raises:
        DataError: There is no such data set or split, or the hub cannot be reached.
    """
    name, config, named = _parts(source)
    try:
        with _quiet():
            if named or split is None:
                return datasets.load_dataset(name, config, split=named or "train", streaming=streaming)
            return pick_split(datasets.load_dataset(name, config, streaming=streaming), split, source)
    except DataError:
        raise
    except FAILURES as error:
        raise DataError(
            f"neither a file here nor readable from the hub ({first_line(error)})", where=source, fix=_FIX
        ) from error


def hub_facts(source: str) -> tuple[str, int | None] | None:
    """The version that the hub has now, and its bytes, None where the hub does not know; None out of its reach."""
    if datasets.config.HF_HUB_OFFLINE:
        return None
    name, config, _ = _parts(source)
    try:
        with _quiet():
            builder = datasets.load_dataset_builder(name, config)
    except FAILURES:  # whoever reads it says why
        return None
    return f"{builder.config.name} {builder.hash}", builder.info.download_size


def pick_split(splits: Mapping[str, Any], split: str | None, where: str) -> Any:
    """The split asked for, or the one that stands in its place.

    Raises:
        DataError: There is neither; says which there are.
    """
    for name in _KIN.get(split or "train", (split or "train",)):
        if name in splits:
            return splits[name]
    raise DataError(
        f"has no split {split or 'train'!r}; splits are {', '.join(map(repr, splits))}",
        where=where,
        fix="Name one at the end of a hub id: name/data:config:split.",
    )


def _parts(source: str) -> tuple[str, str | None, str]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    return name, config or None, split


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of `datasets`: ours is drawn elsewhere."""
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()
