"""The table of the tokens in blocks of 4 bits: ONNX Runtime's GatherBlockQuantized widens the rows that it fetches.

Scales are float16, one for 32 numbers, without zero points: 4.5 bits a number. ONNX Runtime has the operator for uint8
since 1.23; up to 1.26 it reads zero points of rows with an odd number of blocks wrongly, so there are none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from distill.encoders import is_captioner
from distill.errors import ExportError
from distill.export.blocks import BLOCK, LARGEST_HALF, pack, round_blocks, widen
from distill.export.passes.match import Product, array, constant, maker, node_after, node_before, numbers_of, take_over

FUSED = "com.microsoft"
TOKENS = ("input_ids", "decoder_input_ids")
"""Inputs that hold tokens."""
FEW_ROWS = 64  # tables this short, such as token types, stay as they are
FEW_COLUMNS = 8  # so do tables so narrow that the scale of a row is as large as the row
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity")
"""What may happen to ids before they are looked up."""


@dataclass(frozen=True)
class Blocks:
    """A table in blocks as constants of a graph.

    Attributes:
        numbers: uint8 (rows, width / 2).
        scales: float16 or float32 (rows, blocks).
        error: Root mean square error, relative to the root mean square of the numbers.
    """

    numbers: ir.Value
    scales: ir.Value
    error: float


def reads_tokens(lookup: ir.Node) -> bool:
    """Whether a lookup's ids are those of the text, moved perhaps but not computed with."""
    ids = lookup.inputs[1]
    while (node := maker(ids, *MOVES)) is not None:
        ids = node.inputs[0]
    return ids is not None and ids.is_graph_input() and ids.name in TOKENS


def store_blocks(graph: ir.Graph, table: ir.Value, *, half: bool = True) -> Blocks:
    """Adds the constants of a table (rows, width), an even width, in blocks of 4 bits.

    Args:
        graph: Where they go.
        table: The float32 constant, which stays.
        half: Whether scales are float16, where no number is too large for that.
    """
    numbers = numbers_of(table)
    half = half and float(np.abs(numbers).max()) <= LARGEST_HALF
    rounded, scales = round_blocks(numbers, 4, half=half)
    error = relative_error(numbers, widen(rounded, scales, 4, numbers.shape[1]))
    packed = pack(rounded, 4).reshape(len(numbers), -1)[:, : numbers.shape[1] // 2]
    return Blocks(
        constant(graph, packed, f"{table.name}.int4"), constant(graph, scales, f"{table.name}.int4.scale"), error
    )


def read_blocks(lookups: Iterable[ir.Node], blocks: Blocks) -> None:
    """Lets lookups of a table read its blocks."""
    settings = {"bits": 4, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    for lookup in lookups:
        inputs = [blocks.numbers, lookup.inputs[1], blocks.scales]
        result = node_after(lookup, "GatherBlockQuantized", inputs, domain=FUSED, **settings)
        if numbers_of(blocks.scales).dtype != np.float32:
            result = node_after(result, "Cast", result.outputs[:1], to=int(ir.DataType.FLOAT))
        result.outputs[0].shape, result.outputs[0].type = lookup.outputs[0].shape, lookup.outputs[0].type
        take_over(lookup.outputs[0], result.outputs[0])


def as_weight(anchor: ir.Node, blocks: Blocks) -> list[ir.Value]:
    """The same constants as MatMulNBits reads them, before `anchor`; ONNX Runtime turns them once, on loading."""
    graph = anchor.graph
    assert graph is not None
    rows, count = numbers_of(blocks.scales).shape
    shapes = ([rows, count, BLOCK // 2], [rows * count])
    return [
        node_before(anchor, "Reshape", [value, constant(graph, np.array(shape, np.int64), f"{value.name}.shape")])
        .outputs[0]
        for value, shape in zip((blocks.numbers, blocks.scales), shapes, strict=True)
    ]  # fmt: skip


def tied(graph: ir.Graph, found: Iterable[Product]) -> Mapping[ir.Value, list[Product]]:
    """By table of tokens, the products that multiply with it, transposed."""
    tables = [value for value in graph.initializers.values() if _token_lookups(value)]
    by_table: dict[ir.Value, list[Product]] = {}
    for each in found:
        weight = numbers_of(each.weight)
        for table in tables:
            numbers = numbers_of(table)
            if numbers.shape == weight.shape[::-1] and np.array_equal(numbers, weight.T):
                by_table.setdefault(table, []).append(each)
    return by_table


def refuse_tied(graph: ir.Graph, found: Iterable[Product]) -> None:
    """Refuses a table that is multiplied with in int8: in int4 it would be in the file a second time.

    Raises:
        ExportError: There is one.
    """
    for table in tied(graph, found):
        raise tied_error(str(table.name))


def tied_error(name: str) -> ExportError:
    """What is wrong with int4 for a table that the last product multiplies with, and what to do."""
    return ExportError(
        f"{name} is multiplied with as well as looked up, and would be stored twice: in int4, and for the product",
        where="export.embeddings",
        fix='Set export.embeddings = "int8", or export.weights = "blocks-4", where both read the same blocks.',
    )


def check_token_table(model: Any, weights: str) -> None:
    """Refuses `export.embeddings = "int4"` for a model whose file could not have it, before anything is trained.

    Args:
        model: The part of a transformers model that is exported.
        weights: `export.weights`.

    Raises:
        ExportError: It reads no tokens, their table is too narrow or of an odd width, or it is multiplied with as well.
    """
    part = model.decoder if is_captioner(model.config) else getattr(model, "text_model", model)
    table = getattr(part.get_input_embeddings(), "weight", None)
    if table is None or table.dim() != 2:
        raise no_table_error()
    rows, width = table.shape
    if width <= FEW_COLUMNS or width % 2 or rows <= FEW_ROWS:
        raise no_table_error(f": {rows:,} tokens, {width} numbers each")
    head = part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None
    if head is not None and head.weight is table and (weights != "blocks-4" or width % BLOCK):
        raise tied_error("The table of the tokens")


def no_table_error(found: str = "") -> ExportError:
    """What is wrong with int4 where there is no table for it, and what to do."""
    return ExportError(
        f"there is no table of tokens that could be in int4{found}",
        where="export.embeddings",
        fix='Set export.embeddings = "int8".',
    )


def relative_error(numbers: np.ndarray, stored: np.ndarray) -> float:
    """Root mean square of the difference, relative to that of the numbers; 0 where all of them are 0."""
    total = float(np.square(numbers, dtype=np.float64).sum())
    lost = float(np.square(numbers.astype(np.float64) - stored).sum())
    return (lost / total) ** 0.5 if total else 0.0


def _token_lookups(value: ir.Value) -> list[ir.Node]:
    numbers = array(value)
    if numbers is None or numbers.dtype != np.float32 or numbers.ndim != 2:
        return []
    nodes = [use.node for use in value.uses() if use.idx == 0]
    return [node for node in nodes if node.op_type == "Gather" and node.domain == "" and reads_tokens(node)]
