"""A file for texts and one for images as one model: NumPy and ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from distill.export.onnx_model import OnnxModel

Array = np.ndarray


class DualEncoder:
    """Two files, parted by `distill.export.dual`; a batch is asked of those whose inputs it has.

    Args:
        text: The file that reads texts; its metadata speaks for both.
        image: The file that reads images.
        threads: Threads of a call.

    Raises:
        BundleError: A file is missing, broken, or not alone.
    """

    encodes, writes = False, False
    width = 1  # one vector a text
    by_token: frozenset[str] = frozenset()
    memory: Mapping[str, tuple[int, ...]] = {}

    def __init__(self, text: str | Path, image: str | Path, *, threads: int = 1) -> None:
        self.parts = OnnxModel(text, threads=threads), OnnxModel(image, threads=threads)
        self.path, self.metadata = self.parts[0].path, self.parts[0].metadata
        self.inputs = tuple(name for part in self.parts for name in part.inputs)
        self.outputs = tuple(name for part in self.parts for name in part.outputs)

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The vectors of what is in the batch."""
        said: dict[str, Array] = {}
        for part in self.parts:
            if batch.keys() >= set(part.inputs):
                said |= part.predict({name: batch[name] for name in part.inputs})
        return said
