"""Asks a teacher about a transfer set once: what fits a budget is written down, the rest is asked at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from distill import processes
from distill.cache.cached_teacher import build_cache, cache_key, serves_with_more
from distill.cache.index import Rows, made_from, read_index
from distill.cache.storage import ON_LOGITS, Collate, MixedTeacher, QuantisedTeacher, Recorded, measure_need
from distill.cache.store import pull, push
from distill.cache.top_k import TopKTeacher
from distill.progress import SILENT, Progress


def label_rows(
    teacher_of: Callable[[Iterable[str]], Recorded],
    taps: Iterable[str],
    encoded: Rows,
    collate: Collate,
    folder: Path,
    *,
    inputs: Mapping[str, Any],
    max_bytes: int = 0,
    batch_size: int = 64,
    text_of: Callable[[int], str] | None = None,
    along: Callable[[Iterable[str]], Recorded] | None = None,
    progress: Progress = SILENT,
    store: str = "",
) -> Recorded:
    """A teacher for training: cached, live for what does not fit, or live altogether.

    Args:
        teacher_of: The live teacher of some taps.
        taps: What the objective reads.
        encoded: The transfer set as the teacher reads it.
        collate: Its rows to a batch of tensors.
        folder: The cache's own.
        inputs: Of `cache_key`: what the answers depend on; `top_k` says how many classes are kept.
        max_bytes: What the cache may take; 0 for no limit.
        batch_size: Rows a forward pass.
        text_of: The text of a row, for errors.
        along: As `teacher_of`, for what is asked in every step; the same where none is given.
        progress: Told once what is kept how, and why.
        store: A URL where finished caches are kept for other machines; empty for none.

    Raises:
        CacheError: The logits alone do not fit, or the folder cannot be written.
        TeacherError: An answer is not finite.
    """
    taps = frozenset(taps)
    top_k = inputs.get("top_k", 0)
    asked = teacher_of(taps)
    need = measure_need(asked, encoded, collate, top_k)
    live: Recorded = TopKTeacher(asked, top_k) if top_k else asked
    kept, line = need.choose(max_bytes)
    key = cache_key(**inputs, kept=kept)
    index = read_index(folder)
    if index is None or index["key"] != made_from(key):
        progress.say(line)
    along = along or teacher_of
    if kept == "live" and not taps & ON_LOGITS:
        return along(taps)
    if kept == "live":
        logits = teacher_of(taps & ON_LOGITS)
        written: Recorded = TopKTeacher(logits, top_k) if top_k else logits
    else:
        written = QuantisedTeacher(live) if kept == "int8" else live

    def fetch() -> int:
        return 0 if serves_with_more(folder, key, written.taps) else pull(store, folder, key)

    if store and (fetched := processes.agree(fetch)):
        progress.say(f"teacher cache: {fetched} shards fetched from {store}")
    cached = build_cache(
        written, encoded, collate, folder, key=key, batch_size=batch_size, text_of=text_of, progress=progress
    )
    if store and (sent := processes.agree(lambda: push(store, folder, key))):
        progress.say(f"teacher cache: {sent} shards uploaded to {store}")
    return MixedTeacher(cached, along(taps - ON_LOGITS), encoded, collate) if kept == "live" else cached
