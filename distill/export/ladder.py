"""int8 that repairs itself: when a file loses too much, it is made with more care, until it is good enough.

    result = quantize_within(fp32, int8, measure=accuracy, max_drop=0.5, batches=batches)

The rungs, each tried only where the one before lost too much:

1. plain dynamic int8;
2. outliers of activations moved into weights, biases corrected, whichever helps the logits most;
3. every product tried alone in int8 and ranked, the worst 1, 2, 4, ... kept in fp32, stored in fp16 where that is good
   enough too;
4. ranges seen beforehand instead of found at each call (least and largest number, percentile, entropy), which cut
   outliers off, alone and with the worst quarter kept in fp32;
5. where the caller can train: weights that were trained on with int8's rounding in the loop, alone and with the worst
   quarter kept in fp32.

The first file within `max_drop` wins; there is no other outcome but an error, so a file that answers worse than
promised is never written. Where it is asked for, that file is made again with the table of its tokens in int4.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import ExportError
from distill.export.calibrate import METHODS, Method, Observed, observe
from distill.export.distance import Distance
from distill.export.lookups import FewBits
from distill.export.quantize import (
    QuantizedGraph,
    Target,
    exact_names,
    product_names,
    quantize_dynamic_int8,
    quantize_int8,
)
from distill.export.smooth import smooth_outliers
from distill.progress import SILENT, Progress

Array = np.ndarray
Batch = Mapping[str, Array]
Measure = Callable[[Path], float]
Learn = Callable[[Path, Sequence[str]], None]
"""Writes an fp32 file with weights that were trained to be rounded; told the names of those that stay exact."""


@dataclass(frozen=True)
class Form:
    """How an int8 file is made.

    Attributes:
        smoothed: Whether outliers of activations are moved into weights.
        corrected: Whether biases take back what rounding does on average.
        ranges: How ranges of activations were found; None where they are found at each call.
        wide: Whether that holds for the widest activations alone.
        kept: Names of the weights whose products stay in fp32 besides those that always do.
        learned: Whether weights were trained on with int8's rounding in the loop.
        half: Whether the weights of `kept` are stored in fp16, and widened on loading.
        tables: How embedding tables are stored.
    """

    smoothed: bool = False
    corrected: bool = False
    ranges: Method | None = None
    wide: bool = False
    kept: tuple[str, ...] = ()
    learned: bool = False
    half: bool = False
    tables: FewBits = "int8"

    def __str__(self) -> str:
        inside = " in feed-forward blocks" if self.wide else ""
        words = ["dynamic" if self.ranges is None else f"static ({self.ranges}){inside}"]
        words += ["trained in int8"] * self.learned
        words += ["smoothed"] * self.smoothed + ["biases corrected"] * self.corrected
        words += [f"{len(self.kept)} in {'fp16' if self.half else 'fp32'}"] if self.kept else []
        words += ["embeddings in int4"] * (self.tables == "int4")
        return ", ".join(words)


@dataclass(frozen=True)
class Rung:
    """One file that was tried.

    Attributes:
        form: How it was made, in words.
        kept: Names of the weights whose products were left in fp32 besides those that always are, whatever their
            weights are stored in.
        metric: What the file reached, in [0, 1].
        drop: Points below the fp32 file: see `lost`.
        bytes: Size of the file.
    """

    form: str
    kept: tuple[str, ...]
    metric: float
    drop: float
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """What one product in int8 does to the logits, everything else in fp32.

    Attributes:
        name: Of its weight.
        error: Root mean square difference of the logits, relative to their standard deviation.
    """

    name: str
    error: float


@dataclass(frozen=True)
class LadderResult:
    """The file that was kept, and how it was found.

    Attributes:
        graph: The written file.
        reference: What the fp32 file reached, in [0, 1].
        rungs: Every file tried; the last one is the file that was kept.
        sensitivity: The worst product first; empty where nothing was to be kept from int8.
    """

    graph: QuantizedGraph
    reference: float
    rungs: tuple[Rung, ...]
    sensitivity: tuple[Sensitivity, ...]

    def said(self, max_drop: float) -> str:
        """What was taken in place of plain int8, in a line; empty where that was good enough."""
        plain, taken = next((rung for rung in self.rungs if rung.form == str(Form())), None), self.rungs[-1]
        if plain is None or plain.drop <= max_drop:
            return ""
        line = f"plain int8 loses {plain.drop:.2f} points; taken instead: {taken.form}, which loses {taken.drop:.2f}"
        return line + (f" ({', '.join(taken.kept[:3])})" if taken.kept else "")

    def as_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "reference": self.reference,
            "rungs": [asdict(rung) for rung in self.rungs],
            "sensitivity": [asdict(each) for each in self.sensitivity],
        }


def quantize_within(
    fp32_path: str | Path,
    int8_path: str | Path,
    *,
    measure: Measure,
    max_drop: float,
    batches: Sequence[Batch],
    target: Target = "arm64",
    metadata: Mapping[str, str] | None = None,
    learn: Learn | None = None,
    progress: Progress = SILENT,
    relative: bool = False,
    repair: bool = True,
    tables: FewBits = "int8",
) -> LadderResult:
    """Writes the smallest int8 file found that loses no more than `max_drop` points.

    Args:
        fp32_path: What `export_graph` wrote.
        int8_path: The file to write; what is there already stays when nothing good enough is found.
        measure: The task's metric of an ONNX file through ONNX Runtime on validation data, in [0, 1].
        max_drop: Points of the metric (hundredths) that int8 may lose against the fp32 file.
        batches: Real text that sensitivities are measured on; a few hundred sentences are enough.
        target: See `quantize_dynamic_int8`.
        metadata: See `quantize_dynamic_int8`.
        learn: Trains the model on with int8's rounding in the loop, the last resort; None where nobody can.
        progress: Told about the search, where there has to be one.
        relative: Points are hundredths of what the fp32 file reaches, where that may be far below 1.
        repair: Whether to climb at all; else it is the plain dynamic file or none.
        tables: How embedding tables are stored. With `int4`, the first file that is good enough is made a second time,
            with that of the tokens in int4, and this one is kept where it is good enough too; without repair, it is
            this one or none.

    Raises:
        ExportError: No rung loses little enough; names the products that hurt most, where they were looked for. Or the
            table of tokens cannot be in int4.
    """
    path = Path(int8_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ladder-") as folder:
        climb = _Climb(
            Path(fp32_path), Path(folder), measure, max_drop, batches, target, metadata, learn, progress, relative,
            tables,
        )  # fmt: skip
        made = climb.run() if repair else climb.plain()
        if made is None:
            raise _nothing_good_enough(climb.rungs, climb.ranking, max_drop, path, tables)
        os.replace(made.path, path)
    return LadderResult(replace(made, path=path), climb.reference, tuple(climb.rungs), climb.ranking)


class _Climb:
    """One search: the files it makes on the way, and what it found out."""

    def __init__(
        self,
        source: Path,
        folder: Path,
        measure: Measure,
        max_drop: float,
        batches: Sequence[Batch],
        target: Target,
        metadata: Mapping[str, str] | None,
        learn: Learn | None,
        progress: Progress,
        relative: bool,
        tables: FewBits,
    ) -> None:
        self._relative, self._tables = relative, tables
        self._source, self._trial, self._smoothed = source, folder / "trial.onnx", folder / "smoothed.onnx"
        self._learned, self._learn, self._folder = folder / "learned.onnx", learn, folder
        self._measure, self._max_drop, self._batches = measure, max_drop, batches
        self._target, self._metadata, self._progress = target, metadata, progress
        self._seen: dict[bool, Observed] = {}
        self.reference = measure(source)
        self.rungs: list[Rung] = []
        self.ranking: tuple[Sensitivity, ...] = ()

    def run(self) -> QuantizedGraph | None:
        """The first file that is good enough."""
        if (made := self._attempt(Form())) is not None:
            return made
        repaired = self._most_exact([Form(True), Form(True, True), Form(False, True)])
        if (made := self._attempt(repaired)) is not None:
            return made
        base = repaired if self.rungs[1].metric >= self.rungs[0].metric else Form()
        self.ranking = rank_products(self._origin(base), self._batches, target=self._target, progress=self._progress)
        worst = tuple(each.name for each in self.ranking)
        count = 1
        while count <= max(1, len(worst) // 2):  # beyond that int8 is not worth its name
            if (made := self._attempt(replace(base, kept=worst[:count]))) is not None:
                return made
            count *= 2
        for kept in dict.fromkeys(((), worst[: len(worst) // 4])):
            if made := self._attempt(self._most_exact([replace(repaired, ranges=by, kept=kept) for by in METHODS])):
                return made
        return self._trained(worst) if self._learn is not None else None

    def plain(self) -> QuantizedGraph | None:
        """The first rung alone, with tables as they are asked for."""
        return self._attempt(Form(tables=self._tables))

    def _trained(self, worst: tuple[str, ...]) -> QuantizedGraph | None:
        """What weights give that were trained to be rounded."""
        assert self._learn is not None
        self._learn(self._learned, exact_names(self._source))
        for kept in dict.fromkeys(((), worst[: len(worst) // 4])):
            if made := self._attempt(Form(learned=True, kept=kept)):
                return made
        return None

    def _attempt(self, form: Form) -> QuantizedGraph | None:
        """Makes and measures a file; where it is good enough, it or a smaller one that is good enough too.

        Smaller are those that store in fp16 what is kept from int8, and in int4 the table of the tokens, if asked for.
        """
        made, rung = self._tried(form, self._trial)
        self.rungs.append(rung)
        if not rung.drop <= self._max_drop:  # also where it is not a number
            return None
        for name, change in self._savings(form).items():
            smaller = replace(form, **change)
            file, rung = self._tried(smaller, self._folder / f"{name}.onnx")
            good = rung.drop <= self._max_drop
            self.rungs.insert(len(self.rungs) - (not good), rung)  # the last one is the file that is kept
            if good:
                made, form = file, smaller
        return made

    def _savings(self, form: Form) -> dict[str, dict[str, Any]]:
        """By name, what makes a file smaller that is good enough."""
        half: dict[str, dict[str, Any]] = {"half": {"half": True}} if form.kept else {}
        return half | ({"int4": {"tables": self._tables}} if self._tables != form.tables else {})

    def _tried(self, form: Form, path: Path) -> tuple[QuantizedGraph, Rung]:
        made = self._make(form, path)
        metric = self._measure(made.path)
        drop = lost(self.reference, metric, self._relative)
        return made, Rung(str(form), form.kept, metric, drop, made.bytes)

    def _most_exact(self, forms: Sequence[Form]) -> Form:
        """The form whose logits are nearest to those of fp32."""
        distance = Distance(self._source, self._batches)
        return min(forms, key=lambda form: distance(self._make(form, self._trial).path))

    def _make(self, form: Form, path: Path) -> QuantizedGraph:
        seen = self._observed(form.smoothed) if form.corrected or form.ranges else None
        return quantize_int8(
            self._origin(form),
            path,
            target=self._target,
            metadata=self._metadata,
            keep=form.kept,
            ranges=seen.ranges(form.ranges) if seen is not None and form.ranges else None,
            means=seen.means if seen is not None and form.corrected else None,
            half=form.half,
            tables=form.tables,
        )

    def _origin(self, form: Form) -> Path:
        """The fp32 file that a form is made from."""
        if form.learned:
            return self._learned
        if form.smoothed and not self._smoothed.exists():
            smooth_outliers(self._source, self._smoothed, self._observed(False))
        return self._smoothed if form.smoothed else self._source

    def _observed(self, smoothed: bool) -> Observed:
        if smoothed not in self._seen:
            path = self._origin(Form(smoothed)) if smoothed else self._source
            with self._progress.stage("Looking at the range of activations"):
                self._seen[smoothed] = observe(path, self._batches)
        return self._seen[smoothed]


def lost(reference: float, metric: float, relative: bool) -> float:
    """Points that were lost: 100 * (reference - metric), of a `relative` metric divided by its reference."""
    return 100.0 * (reference - metric) / (reference if relative and reference else 1.0)


def rank_products(
    fp32_path: str | Path,
    batches: Sequence[Batch],
    *,
    target: Target = "arm64",
    progress: Progress = SILENT,
) -> tuple[Sensitivity, ...]:
    """Tries every product alone in int8 and ranks them by what that does to the logits, the worst first.

    Args:
        fp32_path: What `export_graph` wrote.
        batches: Real text.
        target: See `quantize_dynamic_int8`.
        progress: One step a product.

    Raises:
        ExportError: There is no batch.
    """
    if not batches:
        raise ExportError("there is no text to measure sensitivity on", where="ladder", fix="Give validation data.")
    source = Path(fp32_path)
    names = product_names(source)
    distance = Distance(source, batches)
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="distill-ladder-") as folder,
        progress.stage("Looking for the products that int8 hurts", total=len(names), unit="products") as stage,
    ):
        for name in names:
            trial = Path(folder) / "trial.onnx"
            others = [other for other in names if other != name]
            quantize_dynamic_int8(source, trial, target=target, keep=others, tables="fp32")
            found.append(Sensitivity(name, distance(trial)))
            stage.advance()
    return tuple(sorted(found, key=lambda each: -each.error))


def _nothing_good_enough(
    rungs: Sequence[Rung], ranking: Sequence[Sensitivity], max_drop: float, path: Path, tables: FewBits
) -> ExportError:
    if len(rungs) == 1:
        name, first = "plain int8", ""
        if tables == "int4":
            name, first = "plain int8 with embeddings in int4", ', export.embeddings = "int8"'
        return ExportError(
            f"{name} loses {rungs[0].drop:.2f} points, more than max_drop = {max_drop:g}; repairs are switched off",
            where=str(path),
            fix=f"Set export.repair = true{first}, or allow more with export.max_drop. No file was written.",
        )
    best = min(rungs, key=lambda rung: rung.drop)
    culprits = ", ".join(f"{each.name} ({each.error:.2g})" for each in ranking[:3])
    return ExportError(
        f"int8 loses {best.drop:.2f} points at best ({rungs[0].drop:.2f} without repair, {len(rungs)} files tried), "
        f"more than max_drop = {max_drop:g}; it hurts most in {culprits}",
        where=str(path),
        fix="Train longer, take a card with more layers, or allow more with export.max_drop. No file was written.",
    )
