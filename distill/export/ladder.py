"""int8 that repairs itself: when a file loses too much, the products that hurt most go back to fp32.

    result = quantize_within(fp32, int8, measure=accuracy, max_drop=0.5, batches=batches)

Rung 1 is plain dynamic int8. On rung 2 every product is tried alone in int8, ranked by what that does to the logits,
and the worst are kept in fp32, twice as many at each try. The first file within `max_drop` wins; there is no other
outcome but an error, so a file that answers worse than promised is never written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import ExportError
from distill.export.quantize import QuantizedGraph, Target, product_names, quantize_dynamic_int8
from distill.export.runtime import OnnxModel
from distill.progress import SILENT, Progress

Array = np.ndarray
Batch = Mapping[str, Array]
Measure = Callable[[Path], float]


@dataclass(frozen=True)
class Rung:
    """One file that was tried.

    Attributes:
        kept: Names of the weights whose products were left in fp32 besides those that always are.
        metric: What the file reached, in [0, 1].
        drop: Points below the fp32 file: 100 * (fp32 - int8).
        bytes: Size of the file.
    """

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
        rungs: Every file tried, in order; the last one is the file that was kept.
        sensitivity: The worst product first; empty where the first rung was good enough.
    """

    graph: QuantizedGraph
    reference: float
    rungs: tuple[Rung, ...]
    sensitivity: tuple[Sensitivity, ...]

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
    progress: Progress = SILENT,
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
        progress: Told about the search, where there has to be one.

    Raises:
        ExportError: No rung loses little enough; names the products that hurt most.
    """
    source, path = Path(fp32_path), Path(int8_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    reference = measure(source)
    rungs: list[Rung] = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".ladder-") as folder:
        trial = Path(folder) / "trial.onnx"

        def attempt(kept: Sequence[str]) -> QuantizedGraph | None:
            made = quantize_dynamic_int8(source, trial, target=target, metadata=metadata, keep=kept)
            metric = measure(trial)
            drop = 100.0 * (reference - metric)
            rungs.append(Rung(tuple(kept), metric, drop, made.bytes))
            return made if drop <= max_drop else None

        made = attempt(())
        ranking: tuple[Sensitivity, ...] = ()
        if made is None:
            ranking = rank_products(source, batches, target=target, progress=progress)
            made = _keep_more_and_more([each.name for each in ranking], attempt)
        if made is None:
            raise _nothing_good_enough(rungs, ranking, max_drop, path)
        os.replace(trial, path)
    graph = QuantizedGraph(**{**vars(made), "path": path})
    return LadderResult(graph, reference, tuple(rungs), ranking)


def _keep_more_and_more(
    worst_first: Sequence[str], attempt: Callable[[Sequence[str]], QuantizedGraph | None]
) -> QuantizedGraph | None:
    """Keeps 1, 2, 4, ... of the worst products in fp32, at most half: beyond that int8 is not worth its name."""
    count = 1
    while count <= max(1, len(worst_first) // 2):
        if (made := attempt(worst_first[:count])) is not None:
            return made
        count *= 2
    return None


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
    exact = _logits(source, batches)
    spread = float(exact.std()) or 1.0
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="distill-ladder-") as folder,
        progress.stage("Looking for the products that int8 hurts", total=len(names), unit="products") as stage,
    ):
        for name in names:
            trial = Path(folder) / "trial.onnx"
            others = [other for other in names if other != name]
            quantize_dynamic_int8(source, trial, target=target, keep=others, tables=False)
            error = float(np.sqrt(np.mean((_logits(trial, batches) - exact) ** 2))) / spread
            found.append(Sensitivity(name, error))
            stage.advance()
    return tuple(sorted(found, key=lambda each: -each.error))


def _logits(path: Path, batches: Sequence[Batch]) -> Array:
    model = OnnxModel(path)
    return np.concatenate([model.predict(batch)["logits"].astype(np.float64).reshape(-1) for batch in batches])


def _nothing_good_enough(
    rungs: Sequence[Rung], ranking: Sequence[Sensitivity], max_drop: float, path: Path
) -> ExportError:
    best = min(rungs, key=lambda rung: rung.drop)
    culprits = ", ".join(f"{each.name} ({each.error:.2g})" for each in ranking[:3])
    return ExportError(
        f"int8 loses {best.drop:.2f} points at best ({rungs[0].drop:.2f} without repair, {len(rungs)} files tried), "
        f"more than max_drop = {max_drop:g}; it hurts most in {culprits}",
        where=str(path),
        fix="Train longer, take a card with more layers, or allow more with export.max_drop. No file was written.",
    )
