"""A classifier reads the first token alone: what only feeds other tokens of the last layer need not be computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import array, attribute, constant, node_after, permutation

POINTWISE = (
    "Add", "Sub", "Mul", "Div", "Sum", "Gelu", "Relu", "Tanh", "Erf", "Sigmoid", "Sqrt", "Pow", "Neg", "Cast", "Where",
    "Identity",
)  # fmt: skip

Use = tuple[ir.Node, int]


def first_token_early(model: ir.Model) -> int:
    """Cuts the first token out as early as nothing but it is wanted, instead of after the last layer.

    Behind the last layer's keys and values only row 0 of everything is read: its query, attention, output product and
    feed-forward block then run on one token instead of L. For a 4-layer model that is a fifth of all products.
    """
    changed = 0
    for node in list(model.graph):
        if node.domain == "" and node.op_type == "Gather" and attribute(node, "axis", 0) == 1:
            index = array(node.inputs[1])
            if index is not None and index.ndim == 0 and int(index) == 0:
                changed += _narrow(model.graph, node)
    return changed


def _narrow(graph: ir.Graph, gather: ir.Node) -> int:
    """Marks, from `gather` upwards, every node of which only position 0 of one axis is read; cuts where that ends."""
    wanted: dict[Use, int] = {(gather, 0): 1}  # this input is read at position 0 of this axis alone
    narrowed: dict[ir.Node, int] = {}
    order = list(graph)
    for node in reversed(order[: order.index(gather)]):
        axis = _axis_wanted(node, wanted)
        operands = _operands(node, axis) if axis is not None else None
        if axis is not None and operands is not None:
            narrowed[node] = axis
            wanted.update({(node, index): of for index, of in operands.items()})
    if not any(node.op_type == "MatMul" for node in narrowed):
        return 0  # nothing dear is saved
    _cut(graph, wanted, narrowed)
    for node, axis in narrowed.items():
        _shorten(node.outputs[0], axis)
    return 1


def _axis_wanted(node: ir.Node, wanted: dict[Use, int]) -> int | None:
    """The axis along which every reader of `node` wants position 0 alone."""
    output = node.outputs[0]
    if node.domain != "" or len(node.outputs) != 1 or output.is_graph_output() or not output.uses():
        return None
    axes = {wanted.get((use.node, use.idx)) for use in output.uses()}
    return axes.pop() if len(axes) == 1 else None


def _operands(node: ir.Node, axis: int) -> dict[int, int] | None:
    """Which inputs, along which axis, `node` needs at position 0 alone to give its output there; None: unknown."""
    shapes = [list(value.shape) for value in node.inputs if value is not None and value.shape is not None]
    output = node.outputs[0].shape
    if output is None or len(shapes) != len(node.inputs):
        return None
    rank = len(output)
    if node.op_type in POINTWISE:
        found = {}
        for index, shape in enumerate(shapes):
            own = axis - (rank - len(shape))
            if own >= 0 and shape[own] != 1:
                found[index] = own
        return found
    if node.op_type in ("LayerNormalization", "Softmax"):
        last = attribute(node, "axis", -1)
        return {0: axis} if last in (-1, rank - 1) and axis < rank - 1 else None
    if node.op_type == "Transpose" and permutation(node):
        return {0: permutation(node)[axis]}
    if node.op_type == "MatMul":
        same = len(shapes[0]) == rank
        return {0: axis} if same and axis == rank - 2 else None
    if node.op_type == "Reshape":
        return {0: axis} if _copies(node, axis) else None
    return None


def _copies(node: ir.Node, axis: int) -> bool:
    """Whether a Reshape takes `axis` over as it is, and would do so at any length of it."""
    target = array(node.inputs[1])
    zero_is_zero = attribute(node, "allowzero", 0) == 1
    return target is not None and not zero_is_zero and list(target[: axis + 1]) == [0] * (axis + 1)


def _cut(graph: ir.Graph, wanted: dict[Use, int], narrowed: dict[ir.Node, int]) -> None:
    """Puts a Slice on every edge that leads from whole values into narrowed nodes, one for each value and axis."""
    begin, end = constant(graph, np.array([0], np.int64), "first"), constant(graph, np.array([1], np.int64), "second")
    slices: dict[tuple[ir.Value, int], ir.Value] = {}
    for (node, index), axis in wanted.items():
        value = node.inputs[index]
        if value is None or value.producer() in narrowed:
            continue
        if (value, axis) not in slices:
            axes = constant(graph, np.array([axis], np.int64), "axis")
            inputs: list[ir.Value | None] = [value, begin, end, axes]
            maker = value.producer()
            if maker is None:
                cut = ir.node("Slice", inputs)
                graph.insert_before(graph.node(0), cut)
                cut.outputs[0].shape, cut.outputs[0].type = value.shape, value.type
            else:
                cut = node_after(maker, "Slice", inputs, value)
            _shorten(cut.outputs[0], axis)
            slices[value, axis] = cut.outputs[0]
        node.replace_input_with(index, slices[value, axis])


def _shorten(value: ir.Value, axis: int) -> None:
    """Notes in the value's shape that `axis` is now 1 long."""
    if value.shape is not None:
        dims = list(value.shape)
        dims[axis] = 1
        value.shape = ir.Shape(dims)
