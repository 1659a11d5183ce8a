"""The latency harness: models side by side, each in its own process, their calls interleaved in one run.

    report = bench([Path("teacher.onnx"), Path("runs/demo/run/bundle")], lengths=[16, 128])

Interleaving matters more than many runs: on a shared machine two runs minutes apart differ by more than two models do.
"""

from __future__ import annotations

from distill.bench.harness import ROUNDS, bench
from distill.bench.results import COLUMNS, NOISY, TEXT, BenchReport, Cell
from distill.bench.targets import Target

__all__ = ["COLUMNS", "NOISY", "ROUNDS", "TEXT", "BenchReport", "Cell", "Target", "bench"]
