"""How far a file's logits are from those of the graph it was made from, without holding all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from distill.export.onnx_model import OnnxModel

Array = np.ndarray
Batch = Mapping[str, Array]

KEPT = 2**28
"""Bytes of exact logits that are remembered: all of an encoder's. A language model's, thousands of times as many, are
asked for anew, batch by batch."""


class Distance:
    """By file: the root mean square difference of its logits from the exact ones, relative to their deviation.

    Args:
        exact: The fp32 file.
        batches: What both are asked.
        kept: Bytes of exact logits that may be remembered.
    """

    def __init__(self, exact: Path, batches: Sequence[Batch], *, kept: int = KEPT) -> None:
        self._exact, self._batches = OnnxModel(exact), batches
        self._known: list[list[Array]] = []
        total = squares = 0.0
        count = size = 0
        for batch in batches:
            answers = _logits(self._exact, batch)
            for numbers in answers:
                total += float(numbers.sum(dtype=np.float64))
                squares += float(np.square(numbers, dtype=np.float64).sum())
                count += numbers.size
                size += numbers.nbytes
            if size <= kept:
                self._known.append(answers)
        mean = total / max(1, count)
        self._spread = max(squares / max(1, count) - mean * mean, 0.0) ** 0.5 or 1.0

    def __call__(self, path: Path) -> float:
        """Of one file; infinite where it answers what is no number."""
        model, squares, count = OnnxModel(path), 0.0, 0
        for batch, wanted in zip(self._batches, self._answers(), strict=True):
            for exact, found in zip(wanted, _logits(model, batch), strict=True):
                squares += float(np.square(found.astype(np.float64) - exact).sum())
                count += exact.size
        error = (squares / max(1, count)) ** 0.5 / self._spread
        return error if np.isfinite(error) else float("inf")

    def _answers(self) -> Iterator[list[Array]]:
        """The exact ones of every batch."""
        yield from self._known
        yield from (_logits(self._exact, batch) for batch in self._batches[len(self._known) :])


def _logits(model: OnnxModel, batch: Batch) -> list[Array]:
    return [value for name, value in model.predict(batch).items() if name != "probabilities"]
