"""The latency harness: models side by side, each in its own process, their calls interleaved in one run.

    report = bench([Path("teacher.onnx"), Path("runs/demo/bundle")], lengths=[16, 128])

Interleaving matters more than many runs: on a shared machine two runs minutes apart differ by more than two models do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from distill.errors import BundleError, DistillError, needs_extra
from distill.machine import describe_machine
from distill.progress import SILENT, Progress

QUANTIZED = Path("onnx/model_quantized.onnx")
ROUNDS = 10
"""How often the models take turns in a cell."""

NOISY = 0.15
"""Spread (interquartile range over median) from which a cell is called noisy."""


@dataclass(frozen=True)
class Target:
    """A model to measure.

    Attributes:
        name: Short and unique.
        path: What is loaded: an ONNX file, or a folder with a PyTorch checkpoint.
        format: `ONNX` or `PyTorch`.
        bytes: Of the file, or of the checkpoint's weights.
        load_ms: From the file to a session that answers.
        memory_bytes: Peak of its process above what the libraries alone take.
    """

    name: str
    path: str
    format: str
    bytes: int
    load_ms: float = 0.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Cell:
    """One model at one shape. Latencies are milliseconds a call."""

    target: str
    threads: int
    batch: int
    length: int
    p50: float
    p90: float
    p99: float
    spread: float
    calls: int

    @property
    def sentences_per_second(self) -> float:
        """At the median."""
        return 1000.0 * self.batch / self.p50


@dataclass(frozen=True)
class BenchReport:
    """What was measured, on what."""

    targets: list[Target]
    cells: list[Cell]
    created: str
    machine: dict[str, Any] = field(default_factory=describe_machine)
    versions: dict[str, str] = field(default_factory=dict)

    def cell(self, target: str, *, length: int, batch: int = 1, threads: int = 1) -> Cell:
        """The cell of that shape."""
        wanted = (target, threads, batch, length)
        return next(cell for cell in self.cells if (cell.target, cell.threads, cell.batch, cell.length) == wanted)

    def ratio(self, target: str, **shape: int) -> float:
        """How many times faster than the first model at that shape, by medians."""
        return self.cell(self.targets[0].name, **shape).p50 / self.cell(target, **shape).p50

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows: medians in ms, and how many times faster than the first model."""
        lengths = sorted({cell.length for cell in self.cells})
        columns = ["model", "MB", "load ms", "memory MB", "batch", "threads", *(f"ms at {n}" for n in lengths)]
        rows = []
        for batch, threads in sorted({(cell.batch, cell.threads) for cell in self.cells}):
            for target in self.targets:
                cells = [self.cell(target.name, length=n, batch=batch, threads=threads) for n in lengths]
                ratios = [self.ratio(target.name, length=n, batch=batch, threads=threads) for n in lengths]
                size, memory = f"{target.bytes / 1e6:.1f}", f"{target.memory_bytes / 1e6:.0f}"
                shown = [f"{cell.p50:.2f} ({ratio:.1f}x)" for cell, ratio in zip(cells, ratios, strict=True)]
                rows.append([target.name, size, f"{target.load_ms:.0f}", memory, str(batch), str(threads), *shown])
        return columns, rows

    def notes(self) -> list[str]:
        """What a reader of the table should know."""
        noisy = [cell for cell in self.cells if cell.spread > NOISY]
        notes = [f"{self.machine['cpu']}, {self.machine['cores']} cores; medians of interleaved calls, ms"]
        if noisy:
            notes.append(
                f"noisy: in {len(noisy)} of {len(self.cells)} cells the middle half of the calls spreads over more "
                f"than {NOISY:.0%} of the median; trust ratios, not milliseconds"
            )
        return notes

    def to_json(self) -> dict[str, Any]:
        """Every number, as JSON values."""
        cells = [
            {
                **asdict(cell),
                "sentences_per_second": round(cell.sentences_per_second, 2),
                "tokens_per_second": round(cell.sentences_per_second * cell.length, 1),
            }
            for cell in self.cells
        ]
        return {
            "created": self.created,
            "machine": self.machine,
            "versions": self.versions,
            "targets": [asdict(target) for target in self.targets],
            "cells": cells,
            "notes": self.notes(),
        }


def bench(
    targets: Sequence[str | Path],
    *,
    lengths: Iterable[int] = (16, 32, 64, 128),
    batches: Iterable[int] = (1,),
    threads: Iterable[int] = (1,),
    runs: int = 100,
    warmup: int = 5,
    progress: Progress = SILENT,
) -> BenchReport:
    """Measures models side by side.

    Args:
        targets: ONNX files, bundles, or folders with a PyTorch checkpoint (needs the `train` extra).
        lengths: Tokens a sentence.
        batches: Sentences a call.
        threads: Threads a session.
        runs: Timed calls of each model in each cell.
        warmup: Calls before them that are not counted.
        progress: Told about every turn.

    Raises:
        BundleError: A target is not there or does not load.
        DistillError: A model's process died.
        MissingExtraError: A PyTorch checkpoint without torch.
    """
    known = [_recognise(Path(target)) for target in targets]
    named = [Target(name, *facts) for name, facts in zip(_short_names([f[0] for f in known]), known, strict=True)]
    shapes = [(batch, length) for batch in batches for length in lengths]
    counts = list(threads)
    cells: list[Cell] = []
    total = len(counts) * len(shapes) * ROUNDS
    with progress.stage("Measuring latency", total=total, unit="turns") as stage:
        for count in counts:
            with ExitStack() as stack:
                workers = [stack.enter_context(_Worker(target, count)) for target in named]
                for batch, length in shapes:
                    times = _take_turns(workers, batch, length, runs, warmup, stage.advance)
                    cells += [
                        _cell(target.name, count, batch, length, taken)
                        for target, taken in zip(named, times, strict=True)
                    ]
                if count == counts[0]:
                    named = [worker.facts() for worker in workers]
    versions = {name: found for name in ("distill", "onnxruntime", "torch", "numpy") if (found := _version(name))}
    return BenchReport(named, cells, datetime.now(UTC).isoformat(timespec="seconds"), versions=versions)


def _take_turns(
    workers: list[_Worker], batch: int, length: int, runs: int, warmup: int, advance: Any
) -> list[list[int]]:
    """Nanoseconds of each call by model. In each round another model begins."""
    for worker in workers:
        worker.ask({"cell": [batch, length], "calls": warmup})
    times: list[list[int]] = [[] for _ in workers]
    share = [runs // ROUNDS + (round_ < runs % ROUNDS) for round_ in range(ROUNDS)]
    for number, calls in enumerate(share):
        order = [(number + step) % len(workers) for step in range(len(workers))]
        for index in order:
            if calls:
                times[index] += workers[index].ask({"cell": [batch, length], "calls": calls})["ns"]
        advance()
    return times


def _cell(target: str, threads: int, batch: int, length: int, nanoseconds: list[int]) -> Cell:
    milliseconds = np.asarray(nanoseconds) / 1e6
    p25, p50, p75, p90, p99 = (float(value) for value in np.percentile(milliseconds, [25, 50, 75, 90, 99]))
    return Cell(target, threads, batch, length, p50, p90, p99, (p75 - p25) / p50, len(nanoseconds))


class _Worker:
    """A model's own process."""

    def __init__(self, target: Target, threads: int) -> None:
        self.target = target
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distill.bench_worker", target.path, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._loaded: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._loaded = self._answer()
        if "error" in self._loaded:
            raise BundleError(
                f"cannot be loaded ({self._loaded['error']})", where=self.target.path, fix="Check that it is complete."
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        with suppress(BrokenPipeError):  # it died: what it said last is read below
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def facts(self) -> Target:
        """The target with its load time and memory."""
        peak = self.ask({"memory": True})["peak_bytes"] - self._loaded["idle_bytes"]
        target = self.target
        return Target(target.name, target.path, target.format, target.bytes, self._loaded["load_ns"] / 1e6, peak)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            said = (self._process.communicate()[1] or "").strip().splitlines()
            raise DistillError(
                f"its process ended with code {self._process.returncode} ({said[-1] if said else 'no message'})",
                where=self.target.path,
                fix="Measure it alone to see whether memory was short.",
            )
        return dict(json.loads(line))


def _recognise(path: Path) -> tuple[str, str, int]:
    """Path to load, format and bytes of a target."""
    if path.is_file() and path.suffix == ".onnx":
        return str(path), "ONNX", path.stat().st_size
    if (path / QUANTIZED).is_file():
        return str(path / QUANTIZED), "ONNX", (path / QUANTIZED).stat().st_size
    weights = list(path.glob("model*.safetensors"))
    if (path / "config.json").is_file() and weights:
        if find_spec("torch") is None or find_spec("transformers") is None:
            raise needs_extra("train", "torch")
        return str(path), "PyTorch", sum(file.stat().st_size for file in weights)
    what = "is neither an ONNX file, nor a bundle, nor a PyTorch checkpoint" if path.exists() else "is not there"
    raise BundleError(what, where=str(path), fix="Give FILE.onnx, a bundle's folder, or a folder with config.json.")


def _short_names(paths: list[str]) -> list[str]:
    """The shortest endings of the paths that tell them apart."""
    names = [Path(path).parts[-1:] for path in paths]
    for size in range(2, 12):
        doubled = {name for name in names if names.count(name) > 1}
        names = [Path(path).parts[-size:] if name in doubled else name for path, name in zip(paths, names, strict=True)]
    shown = ["/".join(name) for name in names]
    return [name if shown.count(name) == 1 else f"{name} #{number + 1}" for number, name in enumerate(shown)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
