"""Residual sums, written so that ONNX Runtime leaves them be."""

from __future__ import annotations

import onnx_ir as ir

from distill.export.passes.match import array, maker, node_after, single, take_over


def residual_as_sum(model: ir.Model) -> int:
    """Writes `a + b` in front of a LayerNormalization as Sum(a, b), sums of sums as one.

    ONNX Runtime joins Add and LayerNormalization into SkipLayerNormalization, which on CPUs is several times slower
    than the two apart; Sum it lets alone.
    """
    changed = 0
    for norm in list(model.graph):
        add = maker(norm.inputs[0], "Add") if norm.op_type == "LayerNormalization" and norm.domain == "" else None
        if add is None or any(array(term) is not None for term in add.inputs):
            continue
        total = node_after(add, "Sum", _terms(add), add.outputs[0])
        take_over(add.outputs[0], total.outputs[0])
        changed += 1
    return changed


def _terms(add: ir.Node) -> list[ir.Value | None]:
    """What is added up, from left to right; sums that something else reads too, or that hold a constant, stay whole."""
    terms: list[ir.Value | None] = []
    for term in add.inputs:
        inner = maker(term, "Add")
        if inner is None or not single(inner) or any(array(value) is not None for value in inner.inputs):
            terms.append(term)
        else:
            terms += _terms(inner)
    return terms
