"""Weights in blocks of 8 or 4 bits in the place of int8, and refused where they lose too much."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.errors import ExportError
from distill.export.ladder import LadderResult, Measure, Rung, lost
from distill.export.precision import quantize_weights
from distill.export.quantize import QuantizedGraph


def quantize_blocks_within(
    fp32_path: str | Path,
    path: str | Path,
    *,
    bits: int,
    measure: Measure,
    max_drop: float,
    relative: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> LadderResult:
    """`quantize_weights`, refused where it loses more than `max_drop`; the arguments are those of `quantize_within`.

    Raises:
        ExportError: It loses too much. What was at `path` before is gone.
    """
    made, reference = (
        quantize_weights(fp32_path, path, bits=8 if bits == 8 else 4, metadata=metadata),
        measure(Path(fp32_path)),
    )
    metric = measure(made.path)
    drop = lost(reference, metric, relative)
    if not drop <= max_drop:  # also where it is not a number
        made.path.unlink()
        raise ExportError(
            f"weights in {bits} bits lose {drop:.2f} points, more than max_drop = {max_drop:g}",
            where=str(path),
            fix='Set export.weights = "int8", which repairs itself, or allow more with export.max_drop.',
        )
    target = (metadata or {}).get("distill.target", "portable")
    graph = QuantizedGraph(made.path, made.bytes, target, made.weights, (), (), made.components)
    return LadderResult(graph, reference, (Rung(f"weights in {bits} bits", (), metric, drop, made.bytes),), ())
