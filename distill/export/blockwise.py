"""Weights in blocks of 8 or 4 bits in the place of int8, and refused where they lose too much."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill.errors import ExportError
from distill.export.ladder import LadderResult, Measure, Rung, lost
from distill.export.lookups import FewBits
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
    tables: FewBits = "int8",
) -> LadderResult:
    """`quantize_weights`, refused where it loses more than `max_drop`; the arguments are those of `quantize_within`.

    Raises:
        ExportError: It loses too much, or its table of tokens cannot be in int4. What was at `path` before is gone.
    """
    made = quantize_weights(fp32_path, path, bits=8 if bits == 8 else 4, tables=tables, metadata=metadata)
    reference = measure(Path(fp32_path))
    metric = measure(made.path)
    drop = lost(reference, metric, relative)
    name = f"weights in {bits} bits" + (", embeddings in int4" if tables == "int4" else "")
    if not drop <= max_drop:  # also where it is not a number
        made.path.unlink()
        first = 'Set export.embeddings = "int8", or ' if tables == "int4" else "Set "
        raise ExportError(
            f"{name} lose {drop:.2f} points, more than max_drop = {max_drop:g}",
            where=str(path),
            fix=f'{first}export.weights = "int8", which repairs itself, or allow more with export.max_drop.',
        )
    target = (metadata or {}).get("distill.target", "portable")
    graph = QuantizedGraph(made.path, made.bytes, target, made.weights, (), made.tables, made.components)
    return LadderResult(graph, reference, (Rung(name, (), metric, drop, made.bytes),), ())
