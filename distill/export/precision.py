"""Other precisions than int8, on request: weights in fp16 or fp32, or in 4 or 8 bits with the arithmetic in fp32.

    halve_weights("model.onnx", "model_fp16.onnx")
    quantize_weights("model.onnx", "model_q4.onnx", bits=4)

For encoders int8 products are faster than any of these. For language models, which read all their weights for every
token, fewer bits a weight are what counts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.errors import ExportError
from distill.export.blocks import BLOCK, Bits, pack, round_blocks
from distill.export.ladder import LadderResult, Measure, Rung, lost
from distill.export.lookups import Table, Tables, quantize_tables, store_half
from distill.export.passes.match import (
    Product,
    array,
    constant,
    node_after,
    numbers_of,
    products,
    take_over,
)
from distill.export.passes.shapes import gemm_as_product
from distill.export.quantize import FUSED, QuantizedGraph, stays_exact
from distill.export.sizes import Component, components
from distill.export.token_table import Blocks, as_weight, store_blocks, tied, tied_error

EXACT = 4  # MatMulNBits' accuracy level at which activations are quantised to int8, which is fastest on CPUs


@dataclass(frozen=True)
class SmallerGraph:
    """A written file.

    Attributes:
        path: Where it is.
        bytes: Its size.
        weights: Names of the constants that are stored in fewer bits, tables left out.
        components: Bytes by part of the model.
        tables: The embedding tables that are.
    """

    path: Path
    bytes: int
    weights: tuple[str, ...]
    components: tuple[Component, ...]
    tables: tuple[Table, ...] = ()


def halve_weights(
    fp32_path: str | Path, path: str | Path, *, metadata: Mapping[str, str] | None = None
) -> SmallerGraph:
    """Stores weights in fp16, vectors such as biases in fp32.

    ONNX Runtime widens them once, on loading, and computes in fp32 as fast as before.

    Args:
        fp32_path: What `export_graph` wrote.
        path: The file to write.
        metadata: Strings that are added to, or replace, those of the fp32 file.

    Raises:
        ExportError: A weight is too large for fp16.
    """
    model = ir.load(fp32_path)
    names = []
    for value in list(model.graph.initializers.values()):
        numbers, name = array(value), str(value.name)
        if numbers is None or numbers.dtype != np.float32 or numbers.ndim < 2 or not value.uses():
            continue
        if not store_half(model.graph, value):
            raise ExportError(f"{name} holds {np.abs(numbers).max():.3g}", where=str(fp32_path), fix="Export in fp32.")
        names.append(name)
    return _written(model, Path(path), names, {"distill.weights": "fp16", **(metadata or {})})


def quantize_weights(
    fp32_path: str | Path,
    path: str | Path,
    *,
    bits: Bits = 4,
    block: int = BLOCK,
    tables: Tables = "int8",
    metadata: Mapping[str, str] | None = None,
) -> SmallerGraph:
    """Stores weights in blocks of 4 or 8 bits (MatMulNBits), embedding tables in int8 with one scale a row.

    Args:
        fp32_path: What `export_graph` wrote.
        path: The file to write.
        bits: Bits a weight.
        block: Weights of one column that share a scale: 16, 32, 64, 128 or 256.
        tables: How embedding tables are stored. With `int4` a table that is multiplied with too is in the file once,
            where weights have 4 bits in blocks of 32 and its width is whole blocks.
        metadata: Strings that are added to, or replace, those of the fp32 file.

    Raises:
        ExportError: Nothing in the file can be quantised, or its table of tokens cannot be in int4.
    """
    model = ir.load(fp32_path)
    gemm_as_product(model)
    found = [each for each in products(model.graph) if not stays_exact(each)]
    if not found:
        raise ExportError("no product with weights is in it", where=str(fp32_path), fix="Give the exported fp32 graph.")
    shared = _shared(model.graph, found, bits, block) if tables == "int4" else {}
    stored: dict[ir.Value, Sequence[ir.Value]] = {}
    for each in found:
        _in_blocks(
            each, bits, block, next((blocks for blocks, group in shared.values() if each in group), None), stored
        )
    done = []
    if tables != "fp32":
        done = quantize_tables(model, tables, shared={table: blocks for table, (blocks, _) in shared.items()})
    RemoveUnusedNodesPass()(model)
    model.graph.opset_imports[FUSED] = 1
    said = {"distill.weights": f"int{bits}", **({"distill.embeddings": tables} if tables == "int4" else {})}
    return _written(model, Path(path), [str(each.weight.name) for each in found], {**said, **(metadata or {})}, done)


def _shared(
    graph: ir.Graph, found: list[Product], bits: Bits, block: int
) -> dict[ir.Value, tuple[Blocks, list[Product]]]:
    """By table that is multiplied with too, its constants in blocks of 4 bits and the products that read them.

    Raises:
        ExportError: The product cannot read what the lookup reads.
    """
    shared = {}
    for table, group in tied(graph, found).items():
        if (bits, block) != (4, BLOCK) or numbers_of(table).shape[1] % BLOCK:
            raise tied_error(str(table.name))
        shared[table] = store_blocks(graph, table, half=False), group
    return shared


def pack_blocks(weight: np.ndarray, bits: Bits, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """A weight (in, out) as MatMulNBits has it: symmetric, the zero point in the middle.

    Returns:
        uint8 (out, blocks, block * bits / 8), at 4 bits the even number in the low half; fp32 scales (out, blocks).
    """
    rounded, scales = round_blocks(weight.T, bits, block)
    return pack(rounded, bits), scales


def _in_blocks(
    found: Product, bits: Bits, block: int, shared: Blocks | None, stored: dict[ir.Value, Sequence[ir.Value]]
) -> None:
    """Puts the block-wise product in the place of an fp32 one; the bias stays.

    Args:
        found: The product.
        bits: Bits a weight.
        block: Weights that share a scale.
        shared: The constants of a table that it reads too.
        stored: By weight, the constants made so far: layers may share one.
    """
    graph, weight = found.matmul.graph, found.weight
    assert graph is not None
    rows, columns = numbers_of(weight).shape
    if shared is not None:
        constants: Sequence[ir.Value] = as_weight(found.matmul, shared)
    else:
        if weight not in stored:
            numbers, scales = pack_blocks(numbers_of(weight), bits, block)
            named = {f"{weight.name}.int{bits}": numbers, f"{weight.name}.scale": scales.reshape(-1)}
            stored[weight] = [constant(graph, value, key) for key, value in named.items()]
        constants = stored[weight]
    shape = {"K": rows, "N": columns, "bits": bits, "block_size": block}
    old = found.matmul.outputs[0]
    inputs: list[ir.Value | None] = [found.x, *constants]
    node = node_after(found.matmul, "MatMulNBits", inputs, old, domain=FUSED, **shape, accuracy_level=EXACT)
    take_over(old, node.outputs[0])


def store_floats_within(
    fp32_path: str | Path,
    path: str | Path,
    *,
    half: bool,
    measure: Measure,
    max_drop: float,
    relative: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> LadderResult:
    """The file that ships where a recipe asks for fp16 or fp32; the arguments are those of `quantize_within`.

    Args:
        fp32_path: What `export_graph` wrote.
        path: The file to write.
        half: Whether weights are stored in fp16.
        measure: See `quantize_within`.
        max_drop: See `quantize_within`.
        relative: See `quantize_within`.
        metadata: Strings that are added to, or replace, those of the fp32 file.

    Raises:
        ExportError: A weight is too large for fp16, or fp16 loses too much. What was at `path` before is gone.
    """
    if half:
        small = halve_weights(fp32_path, path, metadata=metadata)
    else:
        small = _written(ir.load(fp32_path), Path(path), [], {"distill.weights": "fp32", **(metadata or {})})
    reference, metric = measure(Path(fp32_path)), measure(small.path)
    drop, name = lost(reference, metric, relative), "fp16" if half else "fp32"
    if not drop <= max_drop:  # also where it is not a number
        small.path.unlink()
        raise ExportError(
            f"weights in {name} lose {drop:.2f} points, more than max_drop = {max_drop:g}",
            where=str(path),
            fix='Set export.weights = "fp32", or allow more with export.max_drop.',
        )
    model = ir.load(fp32_path)
    kept = tuple(str(found.weight.name) for found in products(model.graph))
    target = (metadata or {}).get("distill.target", "portable")
    made = QuantizedGraph(small.path, small.bytes, target, (), kept, (), small.components)
    return LadderResult(made, reference, (Rung(f"weights in {name}", (), metric, drop, made.bytes),), ())


def _written(
    model: ir.Model, path: Path, names: Sequence[str], metadata: Mapping[str, str], tables: Sequence[Table] = ()
) -> SmallerGraph:
    model.metadata_props.update(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    ir.save(model, beside)
    os.replace(beside, path)
    return SmallerGraph(path, path.stat().st_size, tuple(names), components(model), tuple(tables))
