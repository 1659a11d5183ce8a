"""Weights that layers share are one constant."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import array


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
