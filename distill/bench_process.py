"""The driver's side of `bench_worker`: starts a model's process, asks it, tells what it died of."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Self

from distill.errors import BundleError, DistillError


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


class Worker:
    """A model's own process."""

    def __init__(self, target: Target, threads: int) -> None:
        self.target, self._threads = target, threads
        self._loaded: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._said = TemporaryFile("w+", encoding="utf-8", errors="replace")  # a pipe nobody reads would fill up
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distill.bench_worker", self.target.path, str(self._threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )
        try:
            self._loaded = self._answer()
            if "error" in self._loaded:
                reason = self._loaded["error"]
                raise BundleError(
                    f"cannot be loaded ({reason})", where=self.target.path, fix="Check that it is complete."
                )
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def run(self, batch: int, length: int, calls: int) -> list[int]:
        """Nanoseconds of each of some calls.

        Raises:
            BundleError: The model does not take this shape.
        """
        answer = self.ask({"cell": [batch, length], "calls": calls})
        if "error" in answer:
            raise BundleError(
                f"cannot be run on {batch} x {length} tokens ({answer['error']})",
                where=self.target.path,
                fix="Measure lengths that the model takes: --lengths 16,32.",
            )
        return list(answer["ns"])

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
            code = self._process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            raise DistillError(
                f"its process ended with code {code} ({said[-1] if said else 'no message'})",
                where=self.target.path,
                fix="Measure it alone to see whether memory was short.",
            )
        return dict(json.loads(line))
