"""The latency harness: every model in its own process, their calls interleaved in one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from distill.bench.driver import Worker
from distill.bench.results import TEXT, BenchReport, Cell, Shape, summarise
from distill.bench.targets import Target, find_targets
from distill.errors import DistillError
from distill.machine import describe_machine, load_average
from distill.progress import SILENT, Progress, Stage

ROUNDS = 10
"""How often the models take turns in a cell."""

LIBRARIES = ("distill", "onnxruntime", "numpy", "tokenizers", "torch", "transformers")

Rounds = list[list[int]]
"""Nanoseconds of each call of one model, round by round."""


def bench(
    targets: Sequence[str | Path],
    *,
    lengths: Iterable[int] = (16, 32, 64, 128),
    batches: Iterable[int] = (1,),
    threads: Iterable[int] = (1,),
    warmup: int = 5,
    runs: int = 100,
    seconds: float | None = None,
    loads: int = 3,
    texts: Sequence[str] = (),
    progress: Progress = SILENT,
) -> BenchReport:
    """Measures models side by side, the first of them the one that ratios are taken against.

    Args:
        targets: ONNX files, bundles (their int8 file), or folders with a PyTorch checkpoint (needs the `train` extra).
        lengths: Tokens a sentence, of random ids without padding. Where every graph takes keys and values of earlier
            tokens, reading one more token behind so many is measured too.
        batches: Sentences a call.
        threads: Threads a session.
        warmup: Calls of each model in each cell that are not counted.
        runs: Timed calls of each model in each cell.
        seconds: Most time for one cell, of all models together; fewer calls are made then, as many of each model.
        loads: Fresh processes whose median is the load time.
        texts: Real sentences to measure as well, tokenising included; needs each model's tokenizer.json.
        progress: Told about every turn.

    Raises:
        BundleError: A target is not there, does not load, or cannot take a shape.
        DistillError: A model's process died, or a setting makes no sense.
        MissingExtraError: A PyTorch checkpoint without torch.
    """
    named = find_targets(targets)
    counts, sizes = _positive("threads", threads), _positive("batches", batches)
    known = list(lengths)
    tokens = [*(_positive("lengths", known) if known or not texts else []), *([TEXT] if texts else [])]
    for name, value, least in (("runs", runs, 1), ("loads", loads, 1), ("warmup", warmup, 0)):
        _at_least(name, value, least)
    machine, before = describe_machine(), load_average()
    shapes = [[Shape(count, batch, length) for batch in sizes for length in tokens] for count in counts]
    cells: list[Cell] = []
    with progress.stage("Measuring latency", total=sum(map(len, shapes)) * ROUNDS, unit="turns") as stage:
        stage.note("loading")
        load_ms = _load_times(named, counts[0], loads - 1)
        for count, wanted in zip(counts, shapes, strict=True):
            with ExitStack() as stack:
                workers = [stack.enter_context(Worker(target, count)) for target in named]
                measured = _Measured(workers, list(texts), stage)
                for shape in measured.shapes(wanted):
                    cells += measured.cells(shape, warmup, runs, seconds)
                    if measured.writes and shape.length != TEXT:
                        cells += measured.cells(replace(shape, step=True), warmup, runs, seconds)
                if count == counts[0]:
                    named = [_with_facts(worker, load_ms) for worker in workers]
    versions = {name: found for name in LIBRARIES if (found := _version(name))}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return BenchReport(named, cells, now, machine, versions, (before, load_average()))


def rota(models: int, rounds: int = ROUNDS) -> list[list[int]]:
    """The order of the models in each round: another one begins each time, so that none always follows the same."""
    return [[(number + step) % models for step in range(models)] for number in range(rounds)]


def shares(runs: int, rounds: int = ROUNDS) -> list[int]:
    """Calls of each model in each round: `runs` in all, as even as they go."""
    return [runs // rounds + (number < runs % rounds) for number in range(rounds)]


class _Measured:
    """Loaded models, asked in turn."""

    def __init__(self, workers: list[Worker], texts: list[str], stage: Stage) -> None:
        self._workers, self._stage = workers, stage
        self.writes = all(worker.loaded["writes"] for worker in workers)
        self._ids = min(worker.loaded["vocabulary"] for worker in workers)  # so that all can be asked the same
        doing = "cannot be measured on texts"
        self._tokens = [worker.ask({"texts": texts}, doing=doing)["tokens"] if texts else None for worker in workers]

    def shapes(self, wanted: list[Shape]) -> list[Shape]:
        """Those asked for; of graphs that read images alone, all lengths are the one they have."""
        fixed = [int(worker.loaded["fixed"]) for worker in self._workers]
        if not all(fixed):
            return wanted
        return list(dict.fromkeys(replace(shape, length=max(fixed)) for shape in wanted))

    def cells(self, shape: Shape, warmup: int, runs: int, seconds: float | None) -> list[Cell]:
        """One cell a model."""
        for worker in self._workers:
            self._ask(worker, shape, warmup)
        times: list[Rounds] = [[] for _ in self._workers]
        for order, calls in zip(rota(len(self._workers)), shares(runs), strict=True):
            if calls and not _spent(times, seconds):
                for index in order:
                    self._stage.note(f"{self._workers[index].target.name}, {shape}")
                    times[index].append(self._ask(self._workers[index], shape, calls))
            self._stage.advance(0 if shape.step else 1)
        return [
            summarise(worker.target.name, shape, taken, times[0], tokens if shape.length == TEXT else None)
            for worker, taken, tokens in zip(self._workers, times, self._tokens, strict=True)
        ]

    def _ask(self, worker: Worker, shape: Shape, calls: int) -> list[int]:
        request = {**asdict(shape), "ids": self._ids, "calls": calls}
        return list(worker.ask(request, doing=f"cannot be measured at {shape}")["ns"])


def _spent(times: list[Rounds], seconds: float | None) -> bool:
    """Whether the calls so far took the time allowed; the first round is always whole."""
    return seconds is not None and bool(times[0]) and sum(sum(map(sum, rounds)) for rounds in times) >= seconds * 1e9


def _load_times(targets: list[Target], threads: int, times: int) -> dict[str, list[float]]:
    """Milliseconds of `times` loads of each model, each in a process of its own, in turn."""
    taken: dict[str, list[float]] = {target.name: [] for target in targets}
    for _ in range(times):
        for target in targets:
            with Worker(target, threads) as worker:
                taken[target.name].append(worker.loaded["load_ns"] / 1e6)
    return taken


def _with_facts(worker: Worker, load_ms: dict[str, list[float]]) -> Target:
    """The target with its load time and memory."""
    peak, idle = worker.ask({"memory": True})["peak_bytes"], worker.loaded["idle_bytes"]
    return replace(
        worker.target,
        load_ms=median([*load_ms[worker.target.name], worker.loaded["load_ns"] / 1e6]),
        memory_bytes=None if peak is None or idle is None else max(0, peak - idle),
        threads=worker.threads,
    )


def _positive(name: str, values: Iterable[int]) -> list[int]:
    """The values, each once, in order."""
    kept = list(dict.fromkeys(values))
    if not kept:
        raise DistillError(f"{name} is empty", where="bench", fix="Give at least one positive whole number.")
    for value in kept:
        _at_least(name, value, 1)
    return kept


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise DistillError(f"{name} holds {value}", where="bench", fix=f"Give whole numbers of at least {least}.")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
