"""Weights stand ready: transposed beforehand, and once where layers share them."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import array, constant, permutation, take_over


def weights_transposed(model: ir.Model) -> int:
    """Transposes constant matrices beforehand.

    The exporter does so itself, except for large weights that several layers share; as products of a computed value
    those would be neither quantised nor merged.
    """
    done: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    changed = 0
    for node in list(model.graph):
        numbers = array(node.inputs[0]) if node.op_type == "Transpose" and node.domain == "" else None
        if numbers is None or numbers.ndim != 2 or node.outputs[0].is_graph_output():
            continue
        source, axes = node.inputs[0], tuple(permutation(node) or (1, 0))
        if (source, axes) not in done:
            name = str(source.name).removesuffix(".transposed")
            done[source, axes] = constant(model.graph, numbers.transpose(axes), f"{name}.transposed")
        take_over(node.outputs[0], done[source, axes])
        changed += 1
    return changed


def share_equal_weights(model: ir.Model) -> int:
    """Keeps one of several equal matrices: layers that share weights leave the exporter with transposed copies."""
    known: dict[tuple[tuple[int, ...], bytes], ir.Value] = {}
    changed = 0
    for value in list(model.graph.initializers.values()):
        numbers = array(value)
        if numbers is None or numbers.ndim < 2 or numbers.dtype != np.float32:
            continue
        key = numbers.shape, hashlib.sha256(numbers.tobytes()).digest()
        first = known.setdefault(key, value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            changed += 1
    return changed
