"""Embedding tables in int8, one scale a row, or that of the tokens in int4: only what is looked up is widened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from distill.export.blocks import LARGEST_HALF
from distill.export.passes.match import array, attribute, constant, node_after, node_before, numbers_of, take_over
from distill.export.token_table import (
    FEW_COLUMNS,
    FEW_ROWS,
    Blocks,
    no_table_error,
    read_blocks,
    reads_tokens,
    relative_error,
    store_blocks,
)

FewBits = Literal["int8", "int4"]
"""How tables are stored in few bits; with `int4`, that of the tokens in blocks of 4 bits and all others in int8."""
Tables = Literal["fp32"] | FewBits


@dataclass(frozen=True)
class Table:
    """An embedding table as it is stored.

    Attributes:
        name: Of its constant.
        bits: Bits a number.
        error: Root mean square error of its numbers, relative to their root mean square.
        bytes: Numbers and scales in the file.
        int8_bytes: What they would be in int8 with one scale a row.
    """

    name: str
    bits: int
    error: float
    bytes: int
    int8_bytes: int


def quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (..., rows, width) and fp32 (..., rows, 1): symmetric, one scale a row."""
    scales = np.abs(table).max(axis=-1, keepdims=True) / 127
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.clip(np.rint(table / scales), -127, 127).astype(np.int8), scales


def quantize_tables(
    model: ir.Model, form: FewBits = "int8", *, shared: Mapping[ir.Value, Blocks] | None = None
) -> list[Table]:
    """Stores embedding tables in few bits; lookups fetch rows of those and widen them alone.

    Args:
        model: Changed in place.
        form: `int8` gives each row a scale; `int4` stores the table of the tokens in blocks of 4 bits.
        shared: By table, the blocks of 4 bits that a product reads too.

    Raises:
        ExportError: With `int4`, there is no table of tokens that could be.
    """
    done, graph = [], model.graph
    for table in list(graph.initializers.values()):
        numbers = array(table)
        uses = table.uses()
        if numbers is None or numbers.dtype != np.float32 or numbers.ndim < 2:
            continue
        width = numbers.shape[-1]
        if width <= FEW_COLUMNS or numbers.size // width <= FEW_ROWS:
            continue
        if not uses or any(use.idx != 0 or use.node.domain != "" for use in uses):
            continue
        kinds = {use.node.op_type for use in uses}
        nodes = [use.node for use in uses]
        if kinds == {"Gather"} and all(attribute(node, "axis", 0) == 0 for node in nodes):
            if form == "int4" and numbers.ndim == 2 and width % 2 == 0 and all(map(reads_tokens, nodes)):
                blocks = (shared or {}).get(table) or store_blocks(graph, table)
                read_blocks(nodes, blocks)
                done.append(_stored(table, 4, blocks.error, (blocks.numbers, blocks.scales)))
                continue
            constants = _widen_after(graph, table, nodes)
        elif kinds <= {"Slice", "LayerNormalization", "Unsqueeze"}:
            constants = _widen_before(graph, table)
        else:
            continue
        rows, scales = (numbers_of(value) for value in constants)
        done.append(_stored(table, 8, relative_error(numbers, rows * scales), constants))
    if form == "int4" and not any(table.bits == 4 for table in done):
        raise no_table_error()
    return done


def _stored(table: ir.Value, bits: int, error: float, constants: tuple[ir.Value, ir.Value]) -> Table:
    numbers = numbers_of(table)
    int8 = numbers.size + 4 * (numbers.size // numbers.shape[-1])
    return Table(str(table.name), bits, error, sum(numbers_of(value).nbytes for value in constants), int8)


def share_tied(model: ir.Model) -> int:
    """Stores a table once that is multiplied with as well: the product reads it transposed, which is done on loading.

    Both have a scale for each token, so that their int8 numbers are the same where both go to 127.

    Args:
        model: Quantised; changed in place.

    Returns:
        How many products now read a table.
    """
    graph = model.graph
    tables = {
        table: numbers
        for table in graph.initializers.values()
        if (numbers := array(table)) is not None and numbers.dtype == np.int8 and numbers.ndim == 2
        if any(use.node.op_type == "Gather" and use.idx == 0 for use in table.uses())
    }
    changed = 0
    for table, numbers in tables.items():
        for weight in list(graph.initializers.values()):
            given = array(weight)
            if weight in tables or given is None or given.dtype != np.int8 or given.shape != numbers.shape[::-1]:
                continue
            if np.array_equal(given, numbers.T):
                turned = node_before(graph.node(0), "Transpose", [table], perm=[1, 0]).outputs[0]
                turned.shape, turned.type = weight.shape, weight.type
                ir.convenience.replace_all_uses_with(weight, turned)
                del graph.initializers[str(weight.name)]
                changed += 1
    return changed


def _widen_after(graph: ir.Graph, table: ir.Value, lookups: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """rows[ids] becomes float(rows8[ids]) * scales[ids]; gives both constants."""
    numbers, scales = quantize_rows(numbers_of(table))
    rows, factors = constant(graph, numbers, f"{table.name}.int8"), constant(graph, scales, f"{table.name}.scale")
    for lookup in lookups:
        ids = lookup.inputs[1]
        small = node_after(lookup, "Gather", [rows, ids])
        factor = node_after(small, "Gather", [factors, ids])
        wide = node_after(factor, "Cast", small.outputs[:1], to=int(ir.DataType.FLOAT))
        exact = node_after(wide, "Mul", [wide.outputs[0], factor.outputs[0]], lookup.outputs[0])
        take_over(lookup.outputs[0], exact.outputs[0])
    return rows, factors


def _widen_before(graph: ir.Graph, table: ir.Value) -> tuple[ir.Value, ir.Value]:
    """A table read in order is small: int8 in the file, widened once when that is loaded; gives both constants."""
    numbers, scales = quantize_rows(numbers_of(table))
    rows, factors = constant(graph, numbers, f"{table.name}.int8"), constant(graph, scales, f"{table.name}.scale")
    uses = table.uses()
    exact = widened(graph.node(0), rows, factors, table)
    for use in uses:
        use.node.replace_input_with(use.idx, exact)
    return rows, factors


def widened(anchor: ir.Node, numbers: ir.Value, scales: ir.Value, like: ir.Value) -> ir.Value:
    """Float(numbers) * scales, before `anchor`: ONNX Runtime computes what follows from constants on loading."""
    wide = node_before(anchor, "Cast", [numbers], to=int(ir.DataType.FLOAT))
    return node_after(wide, "Mul", [wide.outputs[0], scales], like).outputs[0]


def store_half(graph: ir.Graph, value: ir.Value) -> bool:
    """Stores a constant in fp16, widened once, on loading; False where one of its numbers is too large for that."""
    numbers = numbers_of(value)
    if np.abs(numbers).max() > LARGEST_HALF:
        return False
    uses, name = value.uses(), str(value.name)
    half = constant(graph, numbers.astype(np.float16), f"{name}.fp16")
    wide = node_before(graph.node(0), "Cast", [half], to=int(ir.DataType.FLOAT)).outputs[0]
    wide.shape, wide.type = value.shape, value.type
    for use in uses:
        use.node.replace_input_with(use.idx, wide)
    del graph.initializers[name]
    return True
