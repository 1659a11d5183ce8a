"""Rows of the data as a task reads them, and as people do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from distill.tasks import Encoded, Task


def encode_rows(task: Task, rows: Any, tokenizer: Any, max_length: int, labels: Sequence[str]) -> Encoded:
    """Token ids and class numbers of rows as `load_splits` gives them."""
    number = {name: index for index, name in enumerate(labels)}
    columns: dict[str, Sequence[Any]] = {name: rows[name] for name in rows.column_names}
    columns["label"] = [task.number(label, number) for label in rows["label"]]
    return replace(task.encode(columns, tokenizer, max_length), names=tuple(labels))


def all_texts(rows: Any, task: Task) -> Iterator[str]:
    """Every text of the rows, both of a pair."""
    yield from map(task.plain, rows["text"])
    if "text_pair" in rows.column_names:
        yield from rows["text_pair"]


def texts_of(rows: Any, task: Task) -> list[str]:
    """One string a row; a pair is shown with a bar between."""
    texts = [task.plain(text) for text in rows["text"]]
    if "text_pair" not in rows.column_names:
        return texts
    return [f"{one} | {other}" for one, other in zip(texts, rows["text_pair"], strict=True)]
