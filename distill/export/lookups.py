"""Embedding tables in int8: one scale a row, only what is looked up is widened; once where a product has them too."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import array, attribute, constant, node_after, node_before, numbers_of, take_over

FEW_ROWS = 64  # tables this short, such as token types, stay as they are
LARGEST_HALF = float(np.finfo(np.float16).max)
FEW_COLUMNS = 8  # so do tables so narrow that the scale of a row is as large as the row


def quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (..., rows, width) and fp32 (..., rows, 1): symmetric, one scale a row."""
    scales = np.abs(table).max(axis=-1, keepdims=True) / 127
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.clip(np.rint(table / scales), -127, 127).astype(np.int8), scales


def quantize_tables(model: ir.Model) -> list[str]:
    """Stores embedding tables in int8 with one scale a row; lookups fetch int8 rows and widen those alone."""
    done = []
    for table in list(model.graph.initializers.values()):
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
        if kinds == {"Gather"} and all(attribute(use.node, "axis", 0) == 0 for use in uses):
            _widen_after(model.graph, table, [use.node for use in uses])
        elif kinds <= {"Slice", "LayerNormalization", "Unsqueeze"}:
            _widen_before(model.graph, table)
        else:
            continue
        done.append(str(table.name))
    return done


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


def _widen_after(graph: ir.Graph, table: ir.Value, lookups: list[ir.Node]) -> None:
    """rows[ids] becomes float(rows8[ids]) * scales[ids]."""
    numbers, scales = quantize_rows(numbers_of(table))
    rows, factors = constant(graph, numbers, f"{table.name}.int8"), constant(graph, scales, f"{table.name}.scale")
    for lookup in lookups:
        ids = lookup.inputs[1]
        small = node_after(lookup, "Gather", [rows, ids])
        factor = node_after(small, "Gather", [factors, ids])
        wide = node_after(factor, "Cast", small.outputs[:1], to=int(ir.DataType.FLOAT))
        exact = node_after(wide, "Mul", [wide.outputs[0], factor.outputs[0]], lookup.outputs[0])
        take_over(lookup.outputs[0], exact.outputs[0])


def _widen_before(graph: ir.Graph, table: ir.Value) -> None:
    """A table read in order is small: it is int8 in the file and widened once, when the file is loaded."""
    numbers, scales = quantize_rows(numbers_of(table))
    rows, factors = constant(graph, numbers, f"{table.name}.int8"), constant(graph, scales, f"{table.name}.scale")
    uses = table.uses()
    exact = widened(graph.node(0), rows, factors, table)
    for use in uses:
        use.node.replace_input_with(use.idx, exact)


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
