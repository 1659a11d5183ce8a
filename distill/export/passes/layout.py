"""Sequence first: with the length in front, heads need no moving before their scores are computed.

ONNX Runtime multiplies (L, B, A, d) by heads without a copy: Transpose(1, 2, 0, 3) and MatMul become one FusedMatMul
with `transBatch`. From (B, L, A, d) it has to move query, key and value. So the whole encoder runs as (L, B, H): ids
are turned before the lookup, nothing is turned back, and the classifier takes its token from the other axis.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import array, attribute, constant, maker, node_after, permutation

POINTWISE = ("Add", "Sub", "Mul", "Div", "Sum", "Gelu", "Relu", "Tanh", "Erf", "Sigmoid", "Pow", "Sqrt", "Cast")
INTO_HEADS = ([0, 2, 1, 3], [0, 2, 3, 1])
OUT_OF_HEADS = [0, 2, 1, 3]


def sequence_first(model: ir.Model) -> int:
    """Turns every value (B, L, ...) around attention into (L, B, ...), as far as only layout-blind nodes lie between.

    Left alone where attention does something to its heads before multiplying them (rotary embeddings, DeBERTa), or
    where more than two values would have to be turned by a copy.
    """
    graph = model.graph
    seeds = [value for node in graph for value in _ends_of_attention(node)]
    region = _region(seeds)
    if not region:
        return 0
    copies = _boundaries(region)
    if copies is None or len(copies) > 2:
        return 0
    _turn(graph, region, copies)
    return 1


def _ends_of_attention(node: ir.Node) -> list[ir.Value]:
    """What goes into, and comes out of, a product of two computed values by heads."""
    if node.domain != "" or node.op_type != "MatMul" or any(array(value) is not None for value in node.inputs):
        return []
    ends = []
    for value in node.inputs:
        turn = maker(value, "Transpose")
        if turn is not None and permutation(turn) in INTO_HEADS:
            ends.append(turn.inputs[0])
    for use in node.outputs[0].uses():
        if use.node.op_type == "Transpose" and permutation(use.node) == OUT_OF_HEADS:
            ends.append(use.node.outputs[0])
    return ends


def _region(seeds: Iterable[ir.Value]) -> set[ir.Value]:
    """All values that are turned together; empty where one of them cannot be."""
    region: set[ir.Value] = set()
    pending = list(seeds)
    while pending:
        value = pending.pop()
        if value in region:
            continue
        if value.shape is None or len(value.shape) < 3 or value.is_graph_output():
            return set()
        region.add(value)
        nodes = [use.node for use in value.uses()]
        if value.producer() is not None:
            nodes.append(value.producer())
        for node in nodes:
            if _blind(node):
                pending += [each for each in node.inputs if each is not None and array(each) is None]
                pending += node.outputs
            elif _takes_first(node) is not None and node.inputs[0] in region | {value}:
                pending += [node.inputs[0], node.outputs[0]]
    return region


def _blind(node: ir.Node) -> bool:
    """Whether a node does the same whichever of its first two axes comes first."""
    if node.domain != "":
        return False
    if node.op_type in POINTWISE:
        rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
        return all(_fits(value, rank) for value in node.inputs)
    if node.op_type == "LayerNormalization":
        return attribute(node, "axis", -1) in (-1, _rank(node.outputs[0]) - 1)
    if node.op_type == "MatMul":
        weight = array(node.inputs[1])
        return weight is not None and weight.ndim == 2
    if node.op_type == "Split":
        return attribute(node, "axis", 0) in (-1, _rank(node.inputs[0]) - 1)
    if node.op_type == "Reshape":
        target = array(node.inputs[1])
        copied = target is not None and len(target) >= 3 and list(target[:2]) == [0, 0]
        return copied and attribute(node, "allowzero", 0) == 0
    return False


def _rank(value: ir.Value | None) -> int:
    return 0 if value is None or value.shape is None else len(value.shape)


def _fits(value: ir.Value | None, rank: int | None) -> bool:
    """Whether an operand still means the same when the first two axes of the result change places."""
    numbers = array(value)
    if numbers is not None:
        return numbers.size == 1 or all(length == 1 for length in numbers.shape[:-1])
    return rank is not None and _rank(value) == rank


def _takes_first(node: ir.Node) -> ir.Node | None:
    """A Slice of axis 1 alone."""
    if node.domain != "" or node.op_type != "Slice" or len(node.inputs) < 4:
        return None
    axes = array(node.inputs[3])
    computed = array(node.inputs[0]) is None
    return node if computed and axes is not None and axes.tolist() == [1] and _rank(node.outputs[0]) >= 3 else None


def _boundaries(region: set[ir.Value]) -> list[ir.Value] | None:
    """Values at the edge that have to be turned by a copy; None where an edge cannot be turned at all."""
    copies = []
    for value in region:
        node = value.producer()
        if node is None:
            return None  # an input of the graph
        made_here = _blind(node) or _takes_first(node) is not None
        if not made_here and not _is_exit(node, value) and not _is_lookup(node) and not _is_cut_of_constant(node):
            copies.append(value)
        for use in value.uses():
            known = _blind(use.node) or _takes_first(use.node) is not None
            if not known and not _is_entry(use.node) and not _is_pick(use.node, use.idx):
                return None
    return copies


def _is_entry(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.domain == "" and permutation(node) in INTO_HEADS


def _is_exit(node: ir.Node, value: ir.Value) -> bool:
    return node.op_type == "Transpose" and node.domain == "" and permutation(node) == OUT_OF_HEADS


def _is_pick(node: ir.Node, index: int) -> bool:
    """Whether a Gather takes one position of axis 1."""
    if node.op_type != "Gather" or node.domain != "" or index != 0 or attribute(node, "axis", 0) != 1:
        return False
    position = array(node.inputs[1])
    return position is not None and position.ndim == 0


def _is_lookup(node: ir.Node) -> bool:
    """Whether a Gather looks rows of a table up by ids (B, L)."""
    table = array(node.inputs[0])
    looks_up = node.op_type == "Gather" and node.domain == "" and attribute(node, "axis", 0) == 0
    return looks_up and table is not None and table.ndim == 2 and _rank(node.inputs[1]) == 2


def _is_cut_of_constant(node: ir.Node) -> bool:
    """Whether a Slice takes the first rows of a constant (1, P, H)."""
    if node.op_type != "Slice" or node.domain != "" or len(node.inputs) < 4:
        return False
    table, axes = array(node.inputs[0]), array(node.inputs[3])
    return table is not None and table.ndim == 3 and axes is not None and axes.tolist() == [1]


def _turn(graph: ir.Graph, region: set[ir.Value], copies: list[ir.Value]) -> None:
    """Changes every node at the edge of the region; those inside stay as they are."""
    zero: ir.Value | None = None
    turned_ids: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        reads, makes = bool(node.inputs) and node.inputs[0] in region, node.outputs[0] in region
        if reads and _is_entry(node):
            _set_permutation(node, [{0: 1, 1: 0}.get(axis, axis) for axis in permutation(node)])
        elif makes and not reads and _is_exit(node, node.outputs[0]):
            first, second, *rest = permutation(node)
            _set_permutation(node, [second, first, *rest])
        elif reads and _is_pick(node, 0):
            node.attributes["axis"] = ir.AttrInt64("axis", 0)
        elif makes and _is_lookup(node):
            node.replace_input_with(1, _turned(graph, node, turned_ids))
        elif makes and (_is_cut_of_constant(node) or (reads and _takes_first(node) is not None)):
            if zero is None:
                zero = constant(graph, np.array([0], np.int64), "sequence_axis")
            table = array(node.inputs[0])
            if table is not None:
                name = f"{node.inputs[0].name}.turned"
                node.replace_input_with(0, constant(graph, table.swapaxes(0, 1), name))
            node.replace_input_with(3, zero)
    for value in copies:
        _turn_by_copy(value)
    for value in region.difference(copies):
        first, second, *rest = value.shape
        value.shape = ir.Shape([second, first, *rest])


def _set_permutation(node: ir.Node, axes: list[int]) -> None:
    node.attributes["perm"] = ir.AttrInt64s("perm", axes)


def _turned(graph: ir.Graph, lookup: ir.Node, known: dict[ir.Value, ir.Value]) -> ir.Value:
    """Ids (L, B) of a lookup, turned once for all lookups by the same ids."""
    ids = lookup.inputs[1]
    if ids not in known:
        turn = ir.node("Transpose", [ids], {"perm": [1, 0]})
        first, second = ids.shape
        turn.outputs[0].shape, turn.outputs[0].type = ir.Shape([second, first]), ids.type
        anchor = ids.producer()
        if anchor is None:
            graph.insert_before(graph.node(0), turn)
        else:
            graph.insert_after(anchor, turn)
        known[ids] = turn.outputs[0]
    return known[ids]


def _turn_by_copy(value: ir.Value) -> None:
    """Puts a Transpose behind the node that makes `value`; its readers get the turned one."""
    node = value.producer()
    axes = [1, 0, *range(2, len(value.shape))]
    uses = list(value.uses())
    turn = node_after(node, "Transpose", [value], perm=axes)
    turn.outputs[0].shape, turn.outputs[0].type = ir.Shape([value.shape[axis] for axis in axes]), value.type
    for use in uses:
        use.node.replace_input_with(use.idx, turn.outputs[0])
