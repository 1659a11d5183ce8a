"""`export.target = "auto"`: the forms that a file may take on this machine, each made and measured, the fastest kept.

    choice = fastest({"fused attention": fused, "separate heads": plain}, int8, target=machine_target(), ...)

Which form is fastest depends on processor, runtime and model, so it is not guessed. Those that lose more than the gate
allows are out before anything is timed; where none is left, the ladder repairs the first.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from distill.bench import bench
from distill.export.calibrate import Batch, Observed, observe
from distill.export.ladder import Form, LadderResult, Learn, Measure, Rung, lost, quantize_within
from distill.export.lookups import FewBits
from distill.export.quantize import QuantizedGraph, Target, quantize_int8
from distill.machine import describe_machine
from distill.progress import SILENT, Progress

FORMS = (Form(), Form(ranges="min-max", wide=True), Form(ranges="min-max"))
"""Activations quantised as they come, and to ranges seen beforehand: the second saves a pass, the first adapts."""

RUNS = 40
"""Timed calls of each candidate at each length."""


@dataclass(frozen=True)
class Tried:
    """One candidate.

    Attributes:
        graph: Which form of the graph it was made from.
        form: How its activations are quantised.
        metric: What it reached, in [0, 1].
        drop: Points below the fp32 file.
        bytes: Size of the file.
        good: Whether it passed the gate.
        latency_ms: Median milliseconds by length; empty where it was not good enough to be timed.
        chosen: Whether it is the file that was kept.
    """

    graph: str
    form: str
    metric: float
    drop: float
    bytes: int
    good: bool
    latency_ms: Mapping[int, float]
    chosen: bool = False


@dataclass(frozen=True)
class Choice:
    """What was kept, and what it was chosen from.

    Attributes:
        graph: Name of the fp32 graph that the file was made from.
        result: The file, as the ladder tells of one.
        tried: Every candidate, in the order they were made.
    """

    graph: str
    result: LadderResult
    tried: tuple[Tried, ...]

    def table(self) -> list[dict[str, Any]]:
        """For results.json."""
        rows = [asdict(each) for each in self.tried]
        return [{**row, "latency_ms": {str(n): ms for n, ms in row["latency_ms"].items()}} for row in rows]


def machine_target() -> Target:
    """The target that this machine is."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    flags = describe_machine()["flags"]
    return "x86-vnni" if {"avx512_vnni", "avx_vnni"} & set(flags) else "x86-avx2"


def fastest(
    sources: Mapping[str, Path],
    int8_path: str | Path,
    *,
    measure: Measure,
    max_drop: float,
    batches: Sequence[Batch],
    target: Target,
    lengths: Sequence[int],
    metadata: Mapping[str, str] | None = None,
    learn: Learn | None = None,
    progress: Progress = SILENT,
    relative: bool = False,
    repair: bool = True,
    tables: FewBits = "int8",
    ships: Callable[[Path], Path] | None = None,
) -> Choice:
    """Writes the int8 file that answers fastest on this machine, of those that lose no more than `max_drop` points.

    Args:
        sources: fp32 graphs of one model, by name of their form.
        int8_path: The file to write.
        measure: See `quantize_within`.
        max_drop: See `quantize_within`.
        batches: See `quantize_within`.
        target: See `quantize_int8`.
        lengths: Tokens at which candidates are timed, one sentence a call, one thread; all count alike.
        metadata: See `quantize_int8`.
        learn: See `quantize_within`; for the first graph.
        progress: Told about every candidate.
        relative: See `quantize_within`.
        repair: See `quantize_within`; without it nothing is calibrated either.
        tables: How embedding tables are stored. With `int4`, candidates have that of the tokens in int4, and are made
            again in int8 only where none of them is good enough and repairs are allowed.
        ships: Writes what a candidate ships as, where that is not the file itself (an encoder and a decoder, two
            towers), and says where: that is timed.

    Raises:
        ExportError: No candidate is good enough, and the ladder repairs none.
    """
    path = Path(int8_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"target": target, "metadata": metadata}
    reference, forms = measure(next(iter(sources.values()))), FORMS if repair else FORMS[:1]
    rounds: list[FewBits] = ["int4", "int8"] if tables == "int4" and repair else [tables]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".candidates-") as folder:
        made: list[tuple[Tried, QuantizedGraph]] = []
        seen = {graph: observe(source, batches) for graph, source in sources.items()}
        for stored in rounds:
            if any(tried.good for tried, _ in made):
                break
            with progress.stage("Making candidates", total=len(sources) * len(forms), unit="files") as stage:
                for graph, form in product(sources, (replace(form, tables=stored) for form in forms)):
                    file = _make(sources[graph], Path(folder) / f"{len(made)}.onnx", form, seen[graph], settings)
                    metric = measure(file.path)
                    drop = lost(reference, metric, relative)
                    made.append((Tried(graph, str(form), metric, drop, file.bytes, drop <= max_drop, {}), file))
                    stage.advance()
        made = _timed(made, lengths, progress, ships)
        best = min((each for each in made if each[0].good), key=_time, default=None)
        if best is not None:
            os.replace(best[1].path, path)
    tried = tuple(replace(each, chosen=best is not None and each is best[0]) for each, _ in made)
    if best is None:
        graph, source = next(iter(sources.items()))
        gate: dict[str, Any] = {"measure": measure, "max_drop": max_drop, "batches": batches}
        gate |= {"learn": learn, "progress": progress, "relative": relative, "repair": repair, "tables": tables}
        return Choice(graph, quantize_within(source, path, **gate, **settings), tried)
    rung = Rung(best[0].form, (), best[0].metric, best[0].drop, best[0].bytes)
    return Choice(best[0].graph, LadderResult(replace(best[1], path=path), reference, (rung,), ()), tried)


def _make(source: Path, path: Path, form: Form, seen: Observed, settings: Mapping[str, Any]) -> QuantizedGraph:
    ranges = seen.ranges(form.ranges, wide=form.wide) if form.ranges else None
    means = seen.means if form.corrected else None
    return quantize_int8(source, path, ranges=ranges, means=means, tables=form.tables, **settings)


def _timed(
    made: list[tuple[Tried, QuantizedGraph]],
    lengths: Sequence[int],
    progress: Progress,
    ships: Callable[[Path], Path] | None,
) -> list[tuple[Tried, QuantizedGraph]]:
    """Medians by length for those that are good enough, measured in turns."""
    good = [ships(file.path) if ships else file.path for tried, file in made if tried.good]
    if not good:
        return made
    report = bench(good, lengths=lengths, runs=RUNS, loads=1, progress=progress)
    medians = iter([{n: report.cell(each.name, length=n).p50 for n in lengths} for each in report.targets])
    return [(replace(tried, latency_ms=next(medians)) if tried.good else tried, file) for tried, file in made]


def _time(candidate: tuple[Tried, QuantizedGraph]) -> float:
    """The mean over lengths, each counted alike however long it takes."""
    return sum(map(math.log, candidate[0].latency_ms.values()))
