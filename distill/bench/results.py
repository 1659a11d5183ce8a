"""What a benchmark found: cells, ratios, tables, and what a reader should know before believing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import numpy as np

from distill.bench.targets import Target

NOISY = 0.15
"""Spread (interquartile range over median) from which a cell is called noisy."""
NO_GAIN = 1.05
"""A model that is less than this many times faster than the first one is called not faster."""
FEW = 100
"""Calls below which a 99th percentile is little more than the slowest call."""
TEXT = 0
"""The length of a cell that was measured on real text, tokenising included."""

COLUMNS = ["model", "batch", "threads", "tokens", "p50 ms", "p90 ms", "p99 ms"]
COLUMNS += ["times faster", "sentences/s", "tokens/s", "spread"]


@dataclass(frozen=True)
class Cell:
    """One model at one shape. Latencies are milliseconds a call.

    Attributes:
        target: The model's name.
        threads: Of its session.
        batch: Sentences a call.
        length: Tokens a sentence; 0 for real text, where tokenising is part of the call.
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
        fastest: The fastest call: what the model takes when nothing else runs.
        spread: Interquartile range over median: how noisy the machine was.
        calls: Timed calls.
        tokens: Mean tokens a sentence: `length`, or what this model's tokenizer makes of the texts.
        rounds: Median of each round, in which all models took a turn.
        ratio: How many times faster than the first model, by medians; 1.0 for the first.
        ratio_low: Lower quartile of the same ratio, taken round by round.
        ratio_high: Upper quartile.
        step: The call reads one token, with so many before it whose keys and values are given.
    """

    target: str
    threads: int
    batch: int
    length: int
    p50: float
    p90: float
    p99: float
    fastest: float
    spread: float
    calls: int
    tokens: float
    rounds: tuple[float, ...] = ()
    ratio: float = 1.0
    ratio_low: float = 1.0
    ratio_high: float = 1.0
    step: bool = False

    @property
    def sentences_per_second(self) -> float:
        """At the median."""
        return 1000.0 * self.batch / self.p50

    @property
    def tokens_per_second(self) -> float:
        """At the median."""
        return self.sentences_per_second * self.tokens


@dataclass(frozen=True)
class Shape:
    """What every model is asked at a time."""

    threads: int
    batch: int
    length: int
    step: bool = False

    def __str__(self) -> str:
        tokens = f"{self.length} tokens" if self.length else "text"
        return f"{'one token behind ' * self.step}{tokens}, batch {self.batch}, threads {self.threads}"


def summarise(
    target: str, shape: Shape, rounds: list[list[int]], first: list[list[int]], tokens: float | None = None
) -> Cell:
    """A cell from the nanoseconds of its calls.

    Args:
        target: The model's name.
        shape: What it was asked.
        rounds: Nanoseconds of each call, round by round.
        first: The same of the first model.
        tokens: Mean tokens a sentence where they are not the shape's length.
    """
    milliseconds = np.concatenate([np.asarray(calls, np.float64) for calls in rounds]) / 1e6
    p25, p50, p75, p90, p99 = (float(value) for value in np.percentile(milliseconds, [25, 50, 75, 90, 99]))
    ours, theirs = (np.asarray([np.median(calls) for calls in side]) / 1e6 for side in (rounds, first))
    low, high = (float(value) for value in np.percentile(theirs / ours, [25, 75]))
    return Cell(
        target,
        shape.threads,
        shape.batch,
        shape.length,
        p50=p50,
        p90=p90,
        p99=p99,
        fastest=float(milliseconds.min()),
        spread=(p75 - p25) / p50,
        calls=len(milliseconds),
        tokens=(1.0 if shape.step else float(shape.length)) if tokens is None else tokens,
        rounds=tuple(round(float(value), 6) for value in ours),
        ratio=float(np.median(np.concatenate(first))) / 1e6 / p50,
        ratio_low=low,
        ratio_high=high,
        step=shape.step,
    )


@dataclass(frozen=True)
class BenchReport:
    """What was measured, on what."""

    targets: list[Target]
    cells: list[Cell]
    created: str
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    load_average: tuple[float | None, float | None] = (None, None)
    """Of the machine, before and after."""

    def cell(self, target: str, *, length: int, batch: int = 1, threads: int = 1, step: bool = False) -> Cell:
        """The cell of that shape.

        Raises:
            KeyError: It was not measured.
        """
        wanted = (target, threads, batch, length, step)
        for cell in self.cells:
            if (cell.target, cell.threads, cell.batch, cell.length, cell.step) == wanted:
                return cell
        raise KeyError(f"no cell for {target} at {Shape(threads, batch, length, step)}")

    def ratio(self, target: str, *, length: int, batch: int = 1, threads: int = 1) -> float:
        """How many times faster than the first model at that shape, by medians."""
        return self.cell(target, length=length, batch=batch, threads=threads).ratio

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows, a row a model: size, load time, memory, medians, times faster than the first model."""
        asked = list(dict.fromkeys((cell.length, cell.step) for cell in self.cells))
        heads = [f"ms {'a token ' * step}at {n}" if n else "ms, text" for n, step in asked]
        columns = ["model", "MB", "load ms", "memory MB", "batch", "threads", *heads]
        rows = []
        for batch, threads in dict.fromkeys((cell.batch, cell.threads) for cell in self.cells):
            for target in self.targets:
                cells = [self.cell(target.name, length=n, batch=batch, threads=threads, step=step) for n, step in asked]
                size, load = _size(target.bytes), _whole_number(target.load_ms)
                shown = [f"{_milliseconds(cell.p50)} ({cell.ratio:.1f}x)" for cell in cells]
                rows.append([target.name, size, load, _size(target.memory_bytes), str(batch), str(threads), *shown])
        return columns, rows

    def rows(self) -> list[list[str]]:
        """A row a cell, under `COLUMNS`: percentiles, ratio to the first model, throughput, noise."""
        return [
            [
                cell.target,
                str(cell.batch),
                str(cell.threads),
                f"{'1 behind ' * cell.step}{cell.length}" if cell.length else f"text, {cell.tokens:.1f}",
                *(_milliseconds(value) for value in (cell.p50, cell.p90, cell.p99)),
                _ratio(cell),
                f"{cell.sentences_per_second:,.0f}",
                f"{cell.tokens_per_second:,.0f}",
                f"{cell.spread:.0%}",
            ]
            for cell in self.cells
        ]

    def notes(self) -> list[str]:
        """What a reader of the table should know."""
        return [*self._conditions(), *self._noise(), *self._no_gain()]

    def _conditions(self) -> Iterable[str]:
        machine = self.machine
        flags = f" ({', '.join(machine['flags'])})" if machine.get("flags") else ""
        yield f"{machine.get('cpu', 'unknown CPU')}{flags}, {machine.get('cores', '?')} cores; {self._method()}"
        limit, cores = machine.get("cpu_limit"), machine.get("cores") or 0
        most = max((cell.threads for cell in self.cells), default=0)
        if limit is not None and limit < most:
            yield f"this container may use {limit:g} cores' worth of time, fewer than the {most} threads asked for"
        if cores and most > cores:
            yield f"threads beyond the {cores} cores of this machine wait for each other: do not conclude from them"
        if machine.get("governor") in ("powersave", "conservative", "schedutil", "ondemand"):
            yield f"the frequency governor is {machine['governor']}: the clock changes while measuring"

    def _method(self) -> str:
        calls = [cell.calls for cell in self.cells] or [0]
        count = str(calls[0]) if min(calls) == max(calls) else f"{min(calls)} to {max(calls)}"
        few = "; p99 of so few calls is close to their slowest" if min(calls) < FEW else ""
        return f"medians of {count} interleaved calls of each model, ms{few}"

    def _noise(self) -> Iterable[str]:
        noisy = [cell for cell in self.cells if cell.spread > NOISY]
        if noisy:
            worst = max(cell.spread for cell in noisy)
            yield (
                f"noisy: in {len(noisy)} of {len(self.cells)} cells the middle half of the calls spreads over more "
                f"than {NOISY:.0%} of the median (worst {worst:.0%}); trust ratios, not milliseconds"
            )
        before, cores = self.load_average[0], self.machine.get("cores") or 1
        if before is not None and before > cores / 2:
            yield f"other work was running: load average {before:.1f} on {cores} cores before the first call"

    def _no_gain(self) -> Iterable[str]:
        for target in self.targets[1:]:
            cells = [cell for cell in self.cells if cell.target == target.name and cell.ratio < NO_GAIN]
            if cells:
                worst = min(cells, key=lambda cell: cell.ratio)
                shape = Shape(worst.threads, worst.batch, worst.length, worst.step)
                yield f"no gain: {target.name} is {worst.ratio:.2f}x as fast as {self.targets[0].name} at {shape}"

    def to_json(self) -> dict[str, Any]:
        """Every number, as JSON values."""
        cells = [
            {
                **asdict(cell),
                "rounds": list(cell.rounds),
                "sentences_per_second": round(cell.sentences_per_second, 2),
                "tokens_per_second": round(cell.tokens_per_second, 1),
            }
            for cell in self.cells
        ]
        return {
            "created": self.created,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "load_average": list(self.load_average),
            "targets": [asdict(target) for target in self.targets],
            "cells": cells,
            "notes": self.notes(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The report that `to_json` wrote; what it works out by itself is left aside."""
        cells = [_take(Cell, cell) for cell in values["cells"]]
        return cls(
            targets=[Target(**_known(Target, target)) for target in values["targets"]],
            cells=cells,
            created=values["created"],
            machine=dict(values["machine"]),
            versions=dict(values["versions"]),
            load_average=tuple(values["load_average"]),
        )


def _take(kind: type[Cell], values: Mapping[str, Any]) -> Cell:
    known = _known(kind, values)
    return kind(**{**known, "rounds": tuple(known["rounds"])})


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _ratio(cell: Cell) -> str:
    """With the quartiles over the rounds where there is something to compare."""
    if cell.ratio == cell.ratio_low == cell.ratio_high:
        return f"{cell.ratio:.2f}x"
    return f"{cell.ratio:.2f}x ({cell.ratio_low:.1f}-{cell.ratio_high:.1f})"


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _size(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def _whole_number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
