"""The handle of a model's own process: one question, one answer, and one line when it dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from distill.bench.targets import Target
from distill.errors import BundleError, DistillError


class Worker:
    """A process that has loaded a target and times it on request; a context manager.

    Args:
        target: The model.
        threads: Threads of its session.
    """

    def __init__(self, target: Target, threads: int) -> None:
        self.target, self.threads = target, threads
        self.loaded: dict[str, Any] = {}
        # A file, not a pipe: a library that prints a lot would fill a pipe that nobody reads, and stop.
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "distill.bench.worker", target.path, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
            # The same modules as here, and none from the folder that a person happens to stand in.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def __enter__(self) -> Self:
        try:
            self.loaded = self._answer("cannot be loaded")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()

    def ask(self, request: dict[str, Any], *, doing: str = "cannot be measured") -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Args:
            request: As `distill.bench.worker` lists them.
            doing: Begins the error when the answer is one.

        Raises:
            BundleError: The model cannot do what was asked.
            DistillError: Its process ended.
        """
        with suppress(BrokenPipeError):  # it died: what it said last is read below
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer(doing)

    def _answer(self, doing: str) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line.endswith("\n"):
            raise self._died()
        answer = dict(json.loads(line))
        if "error" in answer:
            fix = answer["fix"] or "Check that it is complete and takes this shape."
            raise BundleError(f"{doing} ({answer['error'].rstrip('.')})", where=self.target.path, fix=fix)
        return answer

    def _died(self) -> DistillError:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        said = f", saying {lines[-1][:200]!r}" if lines else ""
        return DistillError(
            f"its process {how}{said}",
            where=self.target.path,
            fix="Measure it alone; if memory was short, with a smaller batch or length.",
        )
