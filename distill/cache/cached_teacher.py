"""The teacher cache: what the teacher says about every example, computed once and read through memory maps.

A folder holds `index.json` and `shard-00000.safetensors`, ... The index names what the cache was made from and the
sha256 of every shard that is done; both are written beside and renamed. A shard is a pure function of its examples, so
a build that is killed and goes on ends with the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import fcntl
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill import processes
from distill.cache.index import (
    FORMAT,
    INDEX,
    CacheKey,
    Rows,
    cache_key,
    cut_shards,
    encoded_hash,
    intact,
    made_from,
    read_index,
    row_lengths,
    shard_path,
)
from distill.cache.shards import SCALE, Shard, open_shard, pack_batch, shard_bytes, stack_examples, write_shard
from distill.cache.storage import Collate, Recorded
from distill.errors import CacheError, TeacherError
from distill.files import full_disk_is_an_error, read_json, write_json
from distill.progress import SILENT, Progress, Stage

__all__ = ["CacheKey", "CachedTeacher", "build_cache", "cache_key", "encoded_hash"]

MADE = "made-by-"
"""Begins the names of files that say which shards a process other than the first has made so far."""

Answers = tuple[list[int], dict[str, tuple[str, list[Any]]]]
"""What a shard holds: tokens of each example; kind and one array an example, by feature."""

_FIX = "Label again: what is damaged or missing is made anew."


class CachedTeacher:
    """A teacher whose answers were written down; to the trainer the same as a live one.

    Values are what the live teacher gave, except that all but the logits went through fp16 or int8 and that padding is
    zero.
    Features come in fp32 on the batch's device, class numbers (`logits.ids` of `distill.cache.top_k`) in int64.

    Args:
        folder: A complete cache.
        taps: Which features to give; None gives all.
        verify: Compare every shard with its checksum first (about 1 s a GB).

    Raises:
        CacheError: The cache is incomplete or damaged, or lacks a tap.
    """

    on_processor = True  # where it finds what it says: it is best asked before a batch goes to a card

    def __init__(self, folder: Path | str, taps: Iterable[str] | None = None, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None:
            raise CacheError("there is no teacher cache", where=str(self.folder), fix="Label first.")
        records = index["shards"]
        missing = sum(record is None for record in records)
        if missing:
            raise CacheError(f"{missing} of {len(records)} shards are not made yet", where=str(self.folder), fix=_FIX)
        if verify:
            for number, record in enumerate(records):
                if not intact(self.folder, number, record):
                    path = shard_path(self.folder, number)
                    raise CacheError("missing, or not the bytes that were written", where=str(path), fix=_FIX)
        chosen = _choose_taps(index["taps"], taps, self.folder)
        self.taps = frozenset(tap for tap in chosen if not tap.endswith(SCALE))
        self.nbytes = sum(record["bytes"] for record in records)
        self._first: int = index["first"]
        self._starts = np.asarray(index["starts"], np.int64)
        self._shards = [open_shard(shard_path(self.folder, number)) for number in range(len(records))]
        # fp32 where any shard needed it: one dtype for a feature, whichever shards a batch is drawn from.
        self._dtypes = {
            tap: np.result_type(*{shard.tensors[tap].dtype for shard in self._shards}) for tap in sorted(chosen)
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    def features(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The taps for the rows of `batch`, found by `example`.

        Args:
            batch: `example` (B,), rows of the transfer set, and `attention_mask` (B, L).

        Returns:
            fp32 tensors on the batch's device, zero where the batch has padding.

        Raises:
            CacheError: A row is not in the cache, or has another number of tokens there.
        """
        mask = batch["attention_mask"].cpu().numpy().astype(bool)
        places = self._find(batch["example"].cpu().numpy(), mask)
        device = batch["attention_mask"].device
        kinds = self._shards[0].kinds
        found = {
            tap: torch.from_numpy(
                stack_examples([shard.example(tap, row) for shard, row in places], mask, kinds[tap], dtype)
            ).to(device)
            for tap, dtype in self._dtypes.items()
        }
        return {tap: _widened(found[tap], found.get(tap + SCALE)) for tap in sorted(self.taps)}

    def _find(self, examples: np.ndarray, mask: np.ndarray) -> list[tuple[Shard, int]]:
        rows = examples - self._first
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise CacheError(
                f"it holds examples {self._first} to {self._first + len(self) - 1}; asked for {examples.max()}",
                where=str(self.folder),
                fix="Label the transfer set that is trained on.",
            )
        numbers = np.searchsorted(self._starts, rows, "right") - 1
        inside = rows - self._starts[numbers]
        places = [(self._shards[number], int(row)) for number, row in zip(numbers, inside, strict=True)]
        aligned = any(self._shards[0].kinds[tap] != "row" for tap in self.taps)
        for (shard, row), example, tokens in zip(places, examples, mask.sum(1), strict=True):
            if not aligned:  # one answer a row: a student whose tokenizer splits otherwise may read it
                break
            known = shard.tokens[row + 1] - shard.tokens[row]
            if known != tokens:
                raise CacheError(
                    f"example {example} has {tokens} tokens, the cache knows {known}",
                    where=str(self.folder),
                    fix="Label and train with the same tokenizer and data.max_length.",
                )
        return places


def _widened(values: Tensor, scale: Tensor | None) -> Tensor:
    """fp32; int64 for class numbers, which have no scale."""
    if scale is not None:  # (B, L, 1), or (B, L, heads) of (B, heads, L, L)
        scale = scale.float()
        return values.float().mul_(scale if values.ndim == 3 else scale.transpose(1, 2).unsqueeze(-1))
    return values.float() if values.is_floating_point() else values.long()


def serves_with_more(folder: Path, key: CacheKey, taps: Iterable[str]) -> bool:
    """A whole cache with more taps than are asked for is there: it serves as it is, and is not one of this key."""
    index = read_index(folder)
    if index is None or index["key"] == made_from(key) or not _serves(index, made_from(key), sorted(taps)):
        return False
    return all(record and intact(folder, number, record) for number, record in enumerate(index["shards"]))


def build_cache(
    teacher: Recorded,
    encoded: Rows,
    collate: Collate,
    folder: Path | str,
    *,
    key: CacheKey | str,
    shard_examples: int = 1024,
    shard_tokens: int = 32768,
    batch_size: int = 64,
    text_of: Callable[[int], str] | None = None,
    progress: Progress = SILENT,
) -> CachedTeacher:
    """Makes what is missing of a cache and opens it.

    Shards that are there and whole are kept, damaged ones are made anew; a cache with another key is replaced. The
    processes of one launch share the shards, and must all call this; any other process waits and finds the work done.

    Args:
        teacher: Runs on the device its model is on.
        encoded: Rows with `length`, `example` and what the model reads; examples are numbered without gaps.
        collate: Rows to a batch of tensors.
        folder: The cache's own.
        key: From `cache_key`, or any string that stands for everything the answers depend on.
        shard_examples: Examples a shard at most: what a kill can cost, and the shard before it.
        shard_tokens: Tokens a shard at most: 13 features of width 768 take 0.65 GB.
        batch_size: Rows a forward pass.
        text_of: The text of a row, to be shown where the teacher's answer is not finite.
        progress: Told about every batch.

    Raises:
        TeacherError: An answer is not finite.
        CacheError: The folder cannot be written.
        OutputError: The disk is full. What is done stays done.
    """
    folder = Path(folder)
    plan = {"shard_examples": shard_examples, "shard_tokens": shard_tokens, "batch_size": batch_size}
    try:
        with full_disk_is_an_error(folder), _only_builder(folder, progress):
            index = processes.agree(lambda: _begin(folder, teacher, encoded, key, plan, progress))
            _fill(folder, index, teacher, encoded, collate, text_of, progress)
    except OSError as error:
        raise CacheError(
            f"cannot be written ({error.strerror or error})", where=str(folder), fix="Set `output` to another folder."
        ) from error
    return CachedTeacher(folder, teacher.taps, verify=False)


def _begin(
    folder: Path, teacher: Recorded, encoded: Rows, key: CacheKey | str, plan: dict[str, int], progress: Progress
) -> dict[str, Any]:
    """The index to go on from: the one that is there, or a new one in an emptied folder."""
    if not len(encoded):
        raise CacheError("there is nothing to label", where=str(folder), fix="Give data.train some rows.")
    first, last = int(encoded[0]["example"]), int(encoded[len(encoded) - 1]["example"])
    if last - first != len(encoded) - 1:
        raise CacheError(
            f"{len(encoded)} rows are numbered {first} to {last}", where=str(folder), fix="Number them without gaps."
        )
    index = _usable(folder, made_from(key), sorted(teacher.taps), (first, len(encoded)), plan, progress)
    if index is not None:
        return index
    for path in [folder / INDEX, *folder.glob("shard-*.safetensors*"), *folder.glob(f"{MADE}*")]:
        path.unlink(missing_ok=True)
    starts = cut_shards(row_lengths(encoded).tolist(), plan["shard_examples"], plan["shard_tokens"])
    index = {
        "format": FORMAT,
        "key": made_from(key),
        "plan": plan,
        "taps": sorted(teacher.taps),
        "first": first,
        "starts": starts,
        "shards": [None] * (len(starts) - 1),
    }
    write_json(folder / INDEX, index)
    return index


def _usable(
    folder: Path,
    source: Mapping[str, Any],
    taps: Sequence[str],
    rows: tuple[int, int],
    plan: Mapping[str, int],
    progress: Progress,
) -> dict[str, Any] | None:
    """The index that is there, without the shards that are damaged; None where it does not serve.

    A whole cache serves with more taps than are asked for, and with another batch size. One that is not whole is only
    finished with the very taps and batches it was begun with: sums in bf16 depend on the batch.
    """
    index = read_index(folder)
    if index is None or (index["first"], index["starts"][-1]) != rows or not _serves(index, source, taps):
        return None
    if None in index["shards"] and index["plan"] != plan:
        return None
    records = index["shards"]
    for number, record in _made_by_others(folder, index):
        records[number] = records[number] or record
    damaged = [number for number, record in enumerate(records) if record and not intact(folder, number, record)]
    for number in damaged:
        records[number] = None
    fits = None not in records or index["taps"] == list(taps)
    if damaged:
        what = "are made anew" if fits else "hold more than is read now: all are made anew"
        progress.say(f"teacher cache: {len(damaged)} of {len(records)} shards are damaged and {what}")
    return index if fits else None


def _serves(index: Mapping[str, Any], wanted: Mapping[str, Any], taps: Sequence[str]) -> bool:
    """Made from the same things, and every tap is there; more taps than asked for do no harm."""
    made = {name: value for name, value in index["key"].items() if name != "taps"}
    return made == {name: value for name, value in wanted.items() if name != "taps"} and set(taps) <= set(index["taps"])


def _fill(
    folder: Path,
    index: dict[str, Any],
    teacher: Recorded,
    encoded: Rows,
    collate: Collate,
    text_of: Callable[[int], str] | None,
    progress: Progress,
) -> None:
    """Makes every shard that is missing, in order; several processes take turns, and the first enters all of them.

    While the teacher reads the next shard, another thread writes the last: neither waits for the other.
    """
    starts, records, batch_size = index["starts"], index["shards"], index["plan"]["batch_size"]
    spans = [range(begin, end) for begin, end in itertools.pairwise(starts)]
    missing = [number for number, record in enumerate(records) if record is None]
    if not missing:
        return
    todo = missing[processes.part()]
    alone = processes.count() == 1
    done = len(encoded) - sum(len(spans[number]) for number in missing) if alone else 0
    with progress.stage("Labelling", total=done + sum(len(spans[one]) for one in todo), unit="sentences") as stage:
        stage.advance(done)
        took, since = 0.0, time.monotonic()

        def keep(number: int, shard: Answers) -> None:
            nonlocal took, since
            content = shard_bytes(*shard)
            write_shard(shard_path(folder, number), content)
            records[number] = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
            # Of a million shards an index takes a second to write: it may take a twentieth of the time, no more.
            now = time.monotonic()
            if now - since >= 20 * took:
                _enter(folder, index, todo)
                took, since = time.monotonic() - now, time.monotonic()

        try:
            # The outer autocast is off, and lets the teacher's own keep the weights that it casts for its first batch.
            with ThreadPoolExecutor(1, "shards") as writer, torch.autocast("cpu", enabled=False):
                kept: Future[None] | None = None
                for number in todo:
                    shard = _label(teacher, encoded, spans[number], collate, batch_size, text_of, stage)
                    if kept is not None:
                        kept.result()
                    kept = writer.submit(keep, number, shard)
                if kept is not None:
                    kept.result()
        finally:
            _enter(folder, index, todo)
    if not alone:
        for made in processes.gather([(number, records[number]) for number in todo]):
            for number, record in made:
                records[number] = record
        if processes.is_main():
            write_json(folder / INDEX, index)
            for path in folder.glob(f"{MADE}*"):
                path.unlink()
        processes.wait()


def _enter(folder: Path, index: Mapping[str, Any], made: Sequence[int]) -> None:
    """Writes down what this process has made: the first in the index, another beside it."""
    if processes.count() == 1 or processes.is_main():
        write_json(folder / INDEX, index)
        return
    shards = [[number, index["shards"][number]] for number in made if index["shards"][number]]
    write_json(folder / f"{MADE}{processes.number()}.json", {**index, "shards": shards})


def _made_by_others(folder: Path, index: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """Shards of a build that ended too early, which its first process has not entered."""
    for path in folder.glob(f"{MADE}*.json"):
        found = read_json(path) or {}
        if {**found, "shards": None} == {**index, "shards": None}:
            yield from found["shards"]


def _label(
    teacher: Recorded,
    encoded: Rows,
    span: range,
    collate: Collate,
    batch_size: int,
    text_of: Callable[[int], str] | None,
    stage: Stage,
) -> Answers:
    """What a shard holds. Its batches are sorted by length, and depend on nothing but the shard."""
    rows = [encoded[row] for row in span]
    lengths = [int(row["length"]) for row in rows]
    order = np.argsort(lengths, kind="stable").tolist()
    kinds: dict[str, str] = {}
    values: dict[str, list[Any]] = {tap: [None] * len(rows) for tap in sorted(teacher.taps)}
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = collate([rows[place] for place in chosen])
        mask = batch["attention_mask"].bool()
        features = teacher.features(batch)
        for tap in values:
            kinds[tap], packed = pack_batch(tap, features[tap], mask.to(features[tap].device))
            for place, value in zip(chosen, packed, strict=True):
                if value.dtype == np.float32 and not np.isfinite(value).all():  # what went into fp16 is finite
                    _refuse(tap, span[place], rows[place], text_of)
                values[tap][place] = value
        stage.advance(len(chosen))
    return lengths, {tap: (kinds[tap], values[tap]) for tap in values}


def _refuse(tap: str, row: int, values: Mapping[str, Any], text_of: Callable[[int], str] | None) -> None:
    text = repr(text_of(row))[:80] if text_of else f"token ids {list(map(int, values.get('input_ids', ())[:8]))}"
    raise TeacherError(
        f"its {tap.removesuffix(SCALE)} are not finite (NaN or infinite) for row {row + 1} of the transfer set, {text}",
        where="teacher",
        fix='Check its weights; where they are sound, set training.precision = "fp32".',
    )


def _choose_taps(known: Sequence[str], wanted: Iterable[str] | None, folder: Path) -> frozenset[str]:
    chosen = frozenset(known if wanted is None else wanted)
    chosen |= {tap + SCALE for tap in chosen if tap + SCALE in known}
    absent = sorted(chosen - set(known))
    if absent:
        raise CacheError(
            f"it has no {', '.join(absent)}; it has {', '.join(known)}",
            where=str(folder),
            fix="Label again with the objective that needs them.",
        )
    return chosen


@contextmanager
def _only_builder(folder: Path, progress: Progress) -> Iterator[None]:
    """Holds the folder's lock, the first process for all of a launch; the kernel frees it, however the process ends."""
    if not processes.is_main() and processes.count() > 1:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("teacher cache: another process is building it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
