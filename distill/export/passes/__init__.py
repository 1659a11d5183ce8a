"""Small rewrites of a traced graph. Each keeps what the graph computes, each can run alone, in any order.

A pass takes the model, changes it in place and says in how many places. None of them knows a family by name: they look
for the arithmetic. What they find, and what it is worth, is in docs/graph.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.export.passes.attention import merge_products, scale_into_query
from distill.export.passes.embeddings import fold_constant_rows, slice_positions
from distill.export.passes.first_token import first_token_early
from distill.export.passes.fused_attention import fused_attention
from distill.export.passes.gelu import one_gelu
from distill.export.passes.layout import sequence_first
from distill.export.passes.residual import residual_as_sum
from distill.export.passes.shapes import constant_shapes
from distill.export.passes.weights import share_equal_weights, weights_transposed


@dataclass(frozen=True)
class Pass:
    """A rewrite.

    Attributes:
        name: What reports call it.
        run: Changes the model in place; returns the number of places.
    """

    name: str
    run: Callable[[ir.Model], int]


DEFAULT: tuple[Pass, ...] = (
    Pass("weights transposed", weights_transposed),
    Pass("shared weights", share_equal_weights),
    Pass("constant shapes", constant_shapes),
    Pass("one Gelu", one_gelu),
    Pass("first token early", first_token_early),
    Pass("scale into query", scale_into_query),
    Pass("merged products", merge_products),
    Pass("constant rows folded", fold_constant_rows),
    Pass("positions sliced", slice_positions),
    Pass("residual as Sum", residual_as_sum),
    Pass("sequence first", sequence_first),
)
"""The order in which they find most: shapes before what reads shapes, narrowing before merging."""

FUSED: tuple[Pass, ...] = (
    *(each for each in DEFAULT if each.name not in ("merged products", "sequence first")),
    Pass("fused attention", fused_attention),
)
"""With ONNX's Attention operator (opset 23, ONNX Runtime 1.23), which takes query, key and value as they come."""

FUSED_TARGETS = ("x86-vnni", "x86-avx2")


def passes_for(target: str) -> tuple[Pass, ...]:
    """The passes for a target: files for phones and browsers keep to opset 20, which older runtimes there know."""
    return FUSED if target in FUSED_TARGETS else DEFAULT


def apply_passes(model: ir.Model, passes: Sequence[Pass] = DEFAULT) -> dict[str, int]:
    """Runs `passes` in order, in place, and removes what they leave behind.

    Returns:
        Places changed, by name of the pass.
    """
    changes = {}
    for each in passes:
        changes[each.name] = each.run(model)
        RemoveUnusedNodesPass()(model)
    return changes


__all__ = ["DEFAULT", "FUSED", "Pass", "apply_passes", "passes_for"]
