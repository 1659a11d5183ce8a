"""Text without labels that may not fit in memory: cleaned part by part, repetitions dropped, written as one Arrow file.

What is held is a part of `ROWS` rows and eight bytes for each different text: 8 MB a million.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
from datasets.arrow_writer import ArrowWriter

from distill.data.rows import Columns, UsableRows
from distill.data.streams import read_parts, signature_of
from distill.files import read_json, sha256_json, write_json

Keys = npt.NDArray[np.uint64]


class Seen:
    """A set of 64-bit numbers in sorted runs, each at least twice as long as the next: 8 bytes a number.

    Two of n different texts are taken for one with a probability of n^2 / 2^65: 3 in 100 million for a million texts,
    3% for a thousand million.
    """

    def __init__(self) -> None:
        self._runs: list[Keys] = []

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def add(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """Takes numbers in; True for each that is met for the first time."""
        unique, first = np.unique(keys, return_index=True)
        fresh = ~self.holds(unique)
        new = np.zeros(len(keys), bool)
        new[first[fresh]] = True
        self._runs.append(unique[fresh])
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            last = self._runs.pop()
            self._runs[-1] = np.sort(np.concatenate([self._runs[-1], last]), kind="stable")
        return new

    def holds(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """True for each number that was taken in before."""
        known = np.zeros(len(keys), bool)
        for run in self._runs:
            if len(run):
                places = np.searchsorted(run, keys)
                known |= run[np.minimum(places, len(run) - 1)] == keys
        return known


def short_keys(keys: Sequence[bytes]) -> Keys:
    """The first eight bytes of each content key."""
    return np.frombuffer(b"".join(key[:8] for key in keys), "<u8").astype(np.uint64)


def write_corpus(
    sources: Iterable[str | Path],
    columns: Columns,
    taken: Mapping[str, Sequence[bytes]],
    folder: Path,
    features: datasets.Features,
    report: list[str],
) -> datasets.Dataset:
    """Rows of large sources without what stands elsewhere and without repetitions, memory-mapped.

    Made once for the same sources, columns and other sides.

    Args:
        sources: As in `read_parts`.
        columns: Which columns hold what.
        taken: Content keys of the sides that keep a text which stands there too, by name.
        folder: Where the file goes.
        features: Columns of the dataset.
        report: Gets a line about what was left out.

    Raises:
        DataError: A source is missing, or a row is unusable.
    """
    sources = list(sources)
    stamp = sha256_json(
        [
            [signature_of(source) for source in sources],
            [columns.text, columns.text_pair, columns.skip, columns.prefix, str(features)],
            {role: sha256_json(keys) for role, keys in taken.items()},
        ]
    )
    path, facts = folder / "text.arrow", folder / "text.json"
    made = read_json(facts)
    if made is None or made["stamp"] != stamp or not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f"text.{os.getpid()}.writing"
        lines: list[str] = []
        try:
            _write(beside, sources, columns, {role: _set(keys) for role, keys in taken.items()}, features, lines)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        made = {"stamp": stamp, "report": lines}
        write_json(facts, made)
    report.extend(made["report"])
    return datasets.Dataset.from_file(str(path))


def _write(
    path: Path,
    sources: Sequence[str | Path],
    columns: Columns,
    taken: Mapping[str, Seen],
    features: datasets.Features,
    report: list[str],
) -> None:
    own, lost = Seen(), Counter[str]()
    with ArrowWriter(path=str(path), features=features) as writer:
        for source in sources:
            usable = UsableRows(columns, labelled=False)
            for table in read_parts(source, "unlabelled"):
                rows = usable.of(table)
                keys = short_keys(rows.keys)
                keep = np.ones(len(keys), bool)
                for role, known in taken.items():
                    there = keep & known.holds(keys)
                    lost[f"stand in {role} too"] += int(there.sum())
                    keep &= ~there
                lost["repeat another"] += int(keep.sum())
                keep[keep] = own.add(keys[keep])
                lost["repeat another"] -= int(keep.sum())
                kept = rows.keep(keep.tolist())
                if kept.texts:
                    writer.write_batch({name: kept.columns()[name] for name in features})
            usable.finish(str(source), report)
        writer.finalize()
    if any(lost.values()):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items() if count)
        report.append(f"unlabelled: {sum(lost.values()):,} rows dropped ({reasons})")


def _set(keys: Sequence[bytes]) -> Seen:
    seen = Seen()
    seen.add(short_keys(keys))
    return seen
