"""Shapes that are known need not be computed at every call."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import array, attribute, constant, node_after, same_dim, take_over


def constant_shapes(model: ir.Model) -> int:
    """Writes the target of a Reshape down, where at most one axis of it is neither a number nor copied in place.

    `Concat(Shape(x)[0], Shape(x)[1], [12], [32])` becomes `[0, 0, 12, 32]`: in ONNX a 0 copies the axis. The graph then
    also runs at another length between two such places, which `first_token_early` relies on.
    """
    changed = 0
    for node in model.graph:
        if node.domain == "" and node.op_type == "Reshape" and array(node.inputs[1]) is None:
            target = _target(node)
            if target is not None:
                node.replace_input_with(1, constant(model.graph, np.array(target, np.int64), "shape"))
                node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
                changed += 1
    return changed


def _target(node: ir.Node) -> list[int] | None:
    """The constant second input of a Reshape: lengths, 0 for `as it was`, at most one -1."""
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.shape is None or result.shape is None:
        return None
    target: list[int] = []
    for axis, dim in enumerate(result.shape):
        if isinstance(dim, int):
            target.append(dim)
        elif axis < len(source.shape) and same_dim(dim, source.shape[axis]):
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 and not (0 in target and 0 in result.shape) else None


def gemm_as_product(model: ir.Model) -> int:
    """Turns `Gemm(x, W, b)` with constant W into MatMul and Add, the one form that the other passes know."""
    changed = 0
    for node in list(model.graph):
        if node.domain != "" or node.op_type != "Gemm" or attribute(node, "transA", 0) or len(node.inputs) < 2:
            continue
        weight = array(node.inputs[1])
        if weight is None or attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
            continue
        if attribute(node, "transB", 0):
            weight = weight.T
        name = str(node.inputs[1].name)
        own = constant(model.graph, weight, name if name.endswith(".product") else f"{name}.product")
        last = node_after(node, "MatMul", [node.inputs[0], own], node.outputs[0])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            last = node_after(last, "Add", [last.outputs[0], node.inputs[2]], node.outputs[0])
        take_over(node.outputs[0], last.outputs[0])
        changed += 1
    return changed
