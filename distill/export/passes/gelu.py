"""GELU in one node, whichever of its two forms."""

from __future__ import annotations

import math

import onnx_ir as ir

from distill.export.passes.match import maker, node_after, scalar, take_over


def one_gelu(model: ir.Model) -> int:
    """Turns `0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))` into one Gelu of the same form (Hendrycks & Gimpel 2016).

    Written out it takes eight passes over the widest tensor of a layer, one of them a Pow.
    """
    changed = 0
    for node in list(model.graph):
        if node.domain != "" or node.op_type != "Tanh":
            continue
        x = _cubic(node.inputs[0])
        end = _halved(node, x) if x is not None else None
        if x is not None and end is not None:
            gelu = node_after(end, "Gelu", [x], end.outputs[0], approximate="tanh")
            take_over(end.outputs[0], gelu.outputs[0])
            changed += 1
    return changed


def _times(value: ir.Value | None, factor: float) -> ir.Value | None:
    """The y where `value` is y * factor."""
    node = maker(value, "Mul")
    if node is None:
        return None
    for side, other in (node.inputs, reversed(node.inputs)):
        number = scalar(other)
        if number is not None and math.isclose(number, factor, rel_tol=1e-4):
            return side
    return None


def _cubic(value: ir.Value | None) -> ir.Value | None:
    """The x where `value` is sqrt(2/pi) (x + 0.044715 x^3)."""
    add = maker(_times(value, math.sqrt(2 / math.pi)), "Add")
    if add is None:
        return None
    for x, cube in (add.inputs, reversed(add.inputs)):
        power = maker(_times(cube, 0.044715), "Pow")
        if power is not None and power.inputs[0] is x and scalar(power.inputs[1]) == 3.0:
            return x
    return None


def _halved(tanh: ir.Node, x: ir.Value) -> ir.Node | None:
    """The node that gives x/2 (1 + tanh)."""
    for use in tanh.outputs[0].uses():
        if use.node.op_type != "Add" or all(scalar(side) != 1.0 for side in use.node.inputs):
            continue
        for last in use.node.outputs[0].uses():
            if last.node.op_type == "Mul" and any(_times(side, 0.5) is x for side in last.node.inputs):
                return last.node
    return None
