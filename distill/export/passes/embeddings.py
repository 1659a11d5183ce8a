"""Embeddings: rows that are the same for every token are added beforehand, positions are cut off, not looked up."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import array, attribute, constant, maker, node_after, single, take_over

SPREAD = ("Expand", "GatherElements", "Slice", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Cast", "Tile")


def fold_constant_rows(model: ir.Model) -> int:
    """Adds a table's row that every token gets into another table of the same sum.

    A model that is never given token types looks up type 0 for every token. Where the types are an input of the graph
    they matter (a pair's second sentence has type 1), and nothing is folded.
    """
    changed = 0
    for node in list(model.graph):
        row = _constant_row(node)
        if row is None or not single(node):
            continue
        total = node.outputs[0].uses()[0].node
        if total.op_type != "Add" or total.domain != "":
            continue
        other = next((side for side in total.inputs if side is not node.outputs[0]), None)
        home = _other_table(total, other)
        if other is None or home is None:
            continue
        table = array(home.inputs[0])
        assert table is not None
        home.replace_input_with(0, constant(model.graph, table + row, f"{home.inputs[0].name}.folded"))
        take_over(total.outputs[0], other)
        changed += 1
    return changed


def _constant_row(node: ir.Node) -> np.ndarray | None:
    """(H,): the one row that a Gather always gives."""
    if node.domain != "" or node.op_type != "Gather" or attribute(node, "axis", 0) != 0:
        return None
    table = array(node.inputs[0])
    if table is None or table.ndim != 2 or not _all_zero(node.inputs[1]):
        return None
    return table[0]


def _all_zero(index: ir.Value | None) -> bool:
    """Whether an index is 0 everywhere, whatever its shape turns out to be."""
    numbers = array(index)
    if numbers is not None:
        return numbers.size > 0 and not numbers.any()
    spread = maker(index, *SPREAD)
    if spread is not None:
        return _all_zero(spread.inputs[0])
    filled = maker(index, "ConstantOfShape")
    if filled is None:
        return False
    value = filled.attributes.get("value")
    return value is None or not value.as_tensor().numpy().any()


def _other_table(total: ir.Node, other: ir.Value | None) -> ir.Node | None:
    """A lookup in the same sum whose table may take the row: the smallest, since its rows are quantised with it."""
    lookups: list[ir.Node] = []
    pending, seen = [other, *_further_terms(total)], 0
    while pending and seen < 8:  # a sum of embeddings has three or four terms
        seen += 1
        value = pending.pop()
        add = maker(value, "Add")
        if add is not None and single(add):
            pending += list(add.inputs)
        lookup = maker(value, "Gather")
        table = array(lookup.inputs[0]) if lookup is not None else None
        if lookup is None or table is None or table.ndim != 2 or not single(lookup):
            continue
        if _constant_row(lookup) is None and attribute(lookup, "axis", 0) == 0:
            lookups.append(lookup)
    return min(lookups, key=lambda lookup: int(np.prod(lookup.inputs[0].shape.numpy())), default=None)


def _further_terms(total: ir.Node) -> list[ir.Value | None]:
    """What is added to a sum further down, while nothing else reads it on the way."""
    terms: list[ir.Value | None] = []
    while single(total):
        user = total.outputs[0].uses()[0].node
        if user.op_type != "Add" or user.domain != "":
            break
        terms += [side for side in user.inputs if side is not total.outputs[0]]
        total = user
    return terms


def slice_positions(model: ir.Model) -> int:
    """Turns `table[arange(P)[:L]]` into `table[:L]`: rows 0 to L of a table are one piece of memory."""
    changed = 0
    for node in list(model.graph):
        if node.domain != "" or node.op_type != "Gather" or attribute(node, "axis", 0) != 0:
            continue
        table, cut = array(node.inputs[0]), maker(node.inputs[1], "Slice")
        counted = array(cut.inputs[0]) if cut is not None else None
        if cut is None or table is None or counted is None or table.ndim != 2 or counted.ndim != 2:
            continue
        if counted.shape[0] != 1 or not np.array_equal(counted[0], np.arange(counted.shape[1])):
            continue
        if len(table) < counted.shape[1]:
            continue
        rows = constant(model.graph, table[None, : counted.shape[1]], f"{node.inputs[0].name}.rows")
        sliced = node_after(node, "Slice", [rows, *cut.inputs[1:]], node.outputs[0])
        take_over(node.outputs[0], sliced.outputs[0])
        changed += 1
    return changed
