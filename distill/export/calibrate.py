"""What flows into the products of an exported graph, seen on real text: ranges, channels, means.

    seen = observe("model.onnx", batches)
    seen.ranges("percentile")

Texts go through ONNX Runtime one at a time and without padding, twice: first for the extremes, then for histograms
between them. What is kept does not grow with the number of texts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from distill.errors import ExportError
from distill.export.onnx_model import OnnxModel
from distill.export.passes.match import products
from distill.export.passes.shapes import gemm_as_product

Array = np.ndarray
Batch = Mapping[str, Array]
Method = Literal["min-max", "percentile", "entropy"]
METHODS: tuple[Method, ...] = ("min-max", "percentile", "entropy")

BINS = 2048
ENTROPY_BINS, QUANTIZED_BINS = 512, 128  # the search for the least divergence is quadratic in the bins
PERCENTILE = 99.99


@dataclass(frozen=True)
class Range:
    """Where the numbers of a value lie; 0 is always within.

    Attributes:
        low: Smallest number that is kept, 0 or less.
        high: Largest number that is kept, 0 or more.
        axes: How many the value has: 3 for (B, L, K).
    """

    low: float
    high: float
    axes: int = 3

    @property
    def scale(self) -> np.float32:
        """Width of one of the 255 steps of a uint8."""
        return np.float32(max(self.high - self.low, 1e-12) / 255)

    @property
    def zero(self) -> np.uint8:
        """The uint8 that stands for 0."""
        return np.uint8(np.clip(np.rint(-self.low / self.scale), 0, 255))


@dataclass
class Seen:
    """What was seen of one value (..., K).

    Attributes:
        low: Smallest number.
        high: Largest number.
        channels: (K,) largest absolute number of each channel.
        total: (K,) float64 sums.
        rows: How many vectors (K,).
        histogram: (BINS,) counts, evenly between -limit and limit.
        axes: How many the value has.
    """

    low: float
    high: float
    channels: Array
    total: Array
    rows: int
    histogram: Array
    axes: int = 3

    @property
    def limit(self) -> float:
        """Largest absolute number."""
        return max(abs(self.low), abs(self.high), 1e-12)

    @property
    def mean(self) -> Array:
        """(K,) float32 means of the channels."""
        return (self.total / max(1, self.rows)).astype(np.float32)

    def range_by(self, method: Method) -> Range:
        """The range of the value by `min-max`, `percentile` (99.99%) or `entropy` (least KL divergence)."""
        low, high = self.low, self.high
        if method != "min-max":
            bottom, top = self._percentile() if method == "percentile" else self._entropy()
            low, high = max(low, bottom), min(high, top)
        return Range(min(float(low), 0.0), max(float(high), 0.0), self.axes)

    def _percentile(self) -> tuple[float, float]:
        edges = np.linspace(-self.limit, self.limit, BINS + 1)
        shares = np.cumsum(self.histogram) / self.histogram.sum()
        tail = (1 - PERCENTILE / 100) / 2
        first, last = (int(np.searchsorted(shares, share)) for share in (tail, 1 - tail))
        return float(edges[first]), float(edges[min(last + 1, BINS)])

    def _entropy(self) -> tuple[float, float]:
        from onnxruntime.quantization.calibrate import HistogramCollector

        edges = np.linspace(-self.limit, self.limit, ENTROPY_BINS + 1).astype(np.float32)
        counts = self.histogram.reshape(ENTROPY_BINS, -1).sum(axis=1)
        collector = HistogramCollector("entropy", False, ENTROPY_BINS, QUANTIZED_BINS, PERCENTILE, "same")
        found = (counts, edges, np.float32(self.low), np.float32(self.high), np.float32(self.limit))
        low, high, *_ = collector.get_entropy_threshold(found, QUANTIZED_BINS)
        return float(low), float(high)


@dataclass(frozen=True)
class Observed:
    """What was seen of every value that a product with weights reads, by name of the value."""

    values: Mapping[str, Seen]

    def ranges(self, method: Method, *, wide: bool = False) -> dict[str, Range]:
        """By name of the value.

        Args:
            method: How a range is found.
            wide: Only the widest values, which are those inside feed-forward blocks: to look for their extremes at each
                call costs most.
        """
        widest = max(len(seen.channels) for seen in self.values.values())
        return {
            name: seen.range_by(method)
            for name, seen in self.values.items()
            if not wide or len(seen.channels) == widest
        }

    @property
    def means(self) -> dict[str, Array]:
        """(K,) means of the channels, by name of the value."""
        return {name: seen.mean for name, seen in self.values.items()}


def observe(fp32_path: str | Path, batches: Sequence[Batch]) -> Observed:
    """Runs real text through an exported fp32 graph and looks at the inputs of its products.

    Args:
        fp32_path: What `export_graph` wrote.
        batches: Real text of all lengths that matter; padding is cut off.

    Raises:
        ExportError: There is no text.
    """
    if not batches:
        raise ExportError("there is no text to calibrate on", where=str(fp32_path), fix="Give validation data.")
    model = ir.load(fp32_path)
    gemm_as_product(model)
    inputs = dict.fromkeys(found.x for found in products(model.graph))
    watched = [value for value in inputs if value.producer() is not None and not value.is_graph_output()]
    for value in watched:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    names = [str(value.name) for value in watched]
    with tempfile.TemporaryDirectory(prefix="distill-calibrate-") as folder:
        path = Path(folder) / "watched.onnx"
        ir.save(model, path)
        session = OnnxModel(path)
        seen: dict[str, Seen] = {}
        for text in _texts(batches):
            outputs = session.predict(text)
            for name in names:
                _extremes(seen, name, outputs[name])
        for text in _texts(batches):
            outputs = session.predict(text)
            for name in names:
                counts, _ = np.histogram(outputs[name], BINS, range=(-seen[name].limit, seen[name].limit))
                seen[name].histogram += counts
    return Observed(seen)


def _texts(batches: Sequence[Batch]) -> Iterator[dict[str, Array]]:
    """Row by row, without padding on the right; images and what a decoder is shown as they are."""
    for batch in batches:
        masks = batch["attention_mask"]
        for row, mask in enumerate(masks):
            length = max(1, int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 1)
            cut = {name: column[row : row + 1] for name, column in batch.items() if column.ndim > 1}
            for name, column in cut.items():
                if batch[name].shape == masks.shape and not name.startswith("decoder_"):
                    cut[name] = column[:, :length]
            yield cut


def _extremes(seen: dict[str, Seen], name: str, numbers: Array) -> None:
    rows = numbers.reshape(-1, numbers.shape[-1])
    width = rows.shape[1]
    if name not in seen:
        channels, counts = np.zeros(width, np.float32), np.zeros(BINS, np.int64)
        seen[name] = Seen(np.inf, -np.inf, channels, np.zeros(width), 0, counts, numbers.ndim)
    known = seen[name]
    known.low, known.high = min(known.low, float(rows.min())), max(known.high, float(rows.max()))
    known.channels = np.maximum(known.channels, np.abs(rows).max(axis=0))
    known.total = known.total + rows.sum(axis=0, dtype=np.float64)
    known.rows += len(rows)
