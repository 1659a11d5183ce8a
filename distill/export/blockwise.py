"""Weights in 8 or 4 bits by blocks, products in `MatMulNBits`: for language models, whose speed is that of memory.

A block is 32 numbers of a column that share a scale, so single large weights spoil 32 others and not a whole column.
ONNX Runtime rounds activations to int8 by blocks as well (`accuracy_level` 4). Embedding tables are int8 by rows, as in
`distill.export.quantize`; what is left in fp32 is the same as there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.errors import ExportError
from distill.export.ladder import LadderResult, Measure, Rung, lost
from distill.export.lookups import quantize_tables
from distill.export.passes.match import Product, constant, node_after, numbers_of, products, take_over
from distill.export.passes.shapes import gemm_as_product
from distill.export.quantize import FUSED, QuantizedGraph, stays_exact
from distill.export.sizes import components

BLOCK = 32
INT8_ACTIVATIONS = 4


def quantize_blocks(
    fp32_path: str | Path, path: str | Path, *, bits: int = 8, metadata: Mapping[str, str] | None = None
) -> QuantizedGraph:
    """Writes an exported fp32 graph with its weights in blocks. The fp32 file stays as it is.

    Args:
        fp32_path: What `export_graph` wrote.
        path: The file to write; replaced only once the new one is complete.
        bits: 8 or 4.
        metadata: Strings that are added to, or replace, those of the fp32 file.

    Raises:
        ExportError: There is no product in it.
    """
    source, path = Path(fp32_path), Path(path)
    model = ir.load(source)
    gemm_as_product(model)
    done: list[str] = []
    kept: list[str] = []
    for found in products(model.graph):
        exact = stays_exact(found)
        if not exact:
            _in_blocks(found, bits)
        (kept if exact else done).append(str(found.weight.name))
    if not done:
        raise ExportError("nothing in it can be quantised", where=str(source), fix="Give the exported fp32 graph.")
    tables = quantize_tables(model)
    RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[FUSED] = 1
    model.metadata_props.update(metadata or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    ir.save(model, beside)
    os.replace(beside, path)
    target = model.metadata_props.get("distill.target", "portable")
    return QuantizedGraph(path, path.stat().st_size, target, tuple(done), tuple(kept), tuple(tables), components(model))


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
    """`quantize_blocks`, refused where it loses more than `max_drop`; the arguments are those of `quantize_within`.

    Raises:
        ExportError: It loses too much. What was at `path` before is gone.
    """
    reference, made = measure(Path(fp32_path)), quantize_blocks(fp32_path, path, bits=bits, metadata=metadata)
    metric = measure(made.path)
    drop = lost(reference, metric, relative)
    if drop > max_drop:
        made.path.unlink()
        raise ExportError(
            f"weights in {bits} bits lose {drop:.2f} points, more than max_drop = {max_drop:g}",
            where=str(path),
            fix='Set export.weights = "int8", which repairs itself, or allow more with export.max_drop.',
        )
    return LadderResult(made, reference, (Rung(f"weights in {bits} bits", (), metric, drop, made.bytes),), ())


def pack_blocks(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight (in, out) as MatMulNBits has it: symmetric, the zero point in the middle.

    Returns:
        uint8 (out, blocks, BLOCK * bits / 8), at 4 bits the even number in the low half; fp32 scales (out, blocks).
    """
    rows, columns = weight.shape
    padded = np.zeros((columns, -(-rows // BLOCK) * BLOCK), np.float32)
    padded[:, :rows] = weight.T
    blocks = padded.reshape(columns, -1, BLOCK)
    middle = 1 << (bits - 1)
    scales = np.abs(blocks).max(axis=-1) / (middle - 1)
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    numbers = (np.rint(blocks / scales[..., None]) + middle).astype(np.uint8)
    return (numbers if bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4), scales


def _in_blocks(found: Product, bits: int) -> None:
    """Puts the block-wise product in the place of an fp32 one; the bias stays behind it."""
    graph = found.matmul.graph
    assert graph is not None
    weight = numbers_of(found.weight)
    numbers, scales = pack_blocks(weight, bits)
    inputs: list[ir.Value | None] = [
        found.x,
        constant(graph, numbers, f"{found.weight.name}.int{bits}"),
        constant(graph, scales.reshape(-1), f"{found.weight.name}.scale"),
    ]
    shape = {"K": weight.shape[0], "N": weight.shape[1], "bits": bits, "block_size": BLOCK}
    old = found.matmul.outputs[0]
    node = node_after(found.matmul, "MatMulNBits", inputs, old, domain=FUSED, **shape, accuracy_level=INT8_ACTIVATIONS)
    take_over(old, node.outputs[0])
