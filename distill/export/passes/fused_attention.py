"""Attention in one node: ONNX's own Attention (opset 23), which needs no moving of heads and adds the mask on the way.

ONNX Runtime has it on CPUs since 1.23. Beside the written-out form it saves the Split behind a merged product, the
Transposes, a pass over the scores for the mask, and a dozen nodes a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import (
    array,
    attribute,
    constant,
    maker,
    node_before,
    permutation,
    same_dim,
    scalar,
    single,
    sole_user,
    take_over,
)

OPSET = 23
IN_FRONT = [0, 2, 1, 3]  # (B, L, A, d) to (B, A, L, d), and back
AT_THE_END = [0, 2, 3, 1]  # (B, L, A, d) to (B, A, d, L)


@dataclass(frozen=True)
class _Attention:
    """One written-out attention.

    Attributes:
        query: (B, Q, H) and so are `key` and `value`, with L in the place of Q.
        key: See `query`.
        value: See `query`.
        heads: A.
        scale: What scores are multiplied with.
        terms: What is added to the scores: masks, biases of positions.
        result: (B, Q, H).
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    scale: float
    terms: tuple[ir.Value, ...]
    result: ir.Value


def fused_attention(model: ir.Model) -> int:
    """Turns attention over (B, L, H), written out, into Attention nodes.

    Left alone where something happens to heads before they are multiplied (rotary embeddings, DeBERTa).
    """
    masks: dict[tuple[object, ...], ir.Value] = {}
    changed = 0
    for node in list(model.graph):
        found = _attention(node) if node.op_type == "Softmax" and node.domain == "" else None
        if found is None:
            continue
        anchor = found.result.producer()
        assert anchor is not None
        mask = _mask(model.graph, found, anchor, masks)
        inputs: list[ir.Value | None] = [found.query, found.key, found.value, *([mask] if mask is not None else [])]
        heads = found.heads
        fused = node_before(anchor, "Attention", inputs, q_num_heads=heads, kv_num_heads=heads, scale=found.scale)
        fused.outputs[0].shape, fused.outputs[0].type = found.result.shape, found.result.type
        take_over(found.result, fused.outputs[0])
        changed += 1
    if changed:
        model.graph.opset_imports[""] = max(OPSET, model.graph.opset_imports[""])
    return changed


def _attention(softmax: ir.Node) -> _Attention | None:
    """Reads attention around a Softmax over keys."""
    if attribute(softmax, "axis", -1) not in (-1, 3) or not single(softmax):
        return None
    scores, terms = _terms(softmax.inputs[0])
    scores, scale = _scale(scores)
    product = maker(scores, "MatMul")
    weighted = sole_user(softmax.outputs[0], "MatMul")
    if product is None or not single(product) or weighted is None or weighted.inputs[0] is not softmax.outputs[0]:
        return None
    sides = [
        _heads(product.inputs[0], IN_FRONT),
        _heads(product.inputs[1], AT_THE_END),
        _heads(weighted.inputs[1], IN_FRONT),
    ]
    result = _joined(weighted)
    shapes = {side[1:] for side in sides if side is not None}
    if result is None or None in sides or len(shapes) != 1:
        return None
    heads, width = next(iter(shapes))
    if result.shape is None or result.shape[2] != heads * width:
        return None
    query, key, value = (side[0] for side in sides if side is not None)
    return _Attention(query, key, value, heads, scale, terms, result)


def _terms(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Value, ...]]:
    """The scores, and what is added to them before the Softmax."""
    terms: list[ir.Value] = []
    while (add := maker(value, "Add")) is not None and single(add):
        sides = [side for side in add.inputs if side is not None]
        scores = [side for side in sides if _is_score(side)]
        others = [side for side in sides if side is not scores[0]] if scores else []
        if len(others) != 1 or others[0].shape is None or len(others[0].shape) != 4:
            break
        terms.append(others[0])
        value = scores[0]
    return value, tuple(reversed(terms))


def _is_score(value: ir.Value) -> bool:
    """Whether a value is a product by heads, scaled or with something added already."""
    node = maker(value, "MatMul", "Mul", "Div", "Add")
    if node is None or not single(node) or node.inputs[0] is None:
        return False
    if node.op_type == "MatMul":
        return all(array(side) is None for side in node.inputs)
    return any(_is_score(side) for side in node.inputs if side is not None)


def _scale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """The value behind a multiplication with a constant, and that constant."""
    node = maker(value, "Mul", "Div")
    factor = scalar(node.inputs[1]) if node is not None else None
    if node is None or not factor or not single(node):
        return value, 1.0
    return node.inputs[0], factor if node.op_type == "Mul" else 1 / factor


def _heads(value: ir.Value | None, axes: list[int]) -> tuple[ir.Value, int, int] | None:
    """(B, L, H), A and d where `value` is Transpose(Reshape((B, L, H), [0, 0, A, d]), axes)."""
    turn = maker(value, "Transpose")
    split = maker(turn.inputs[0], "Reshape") if turn is not None and permutation(turn) == axes else None
    target = array(split.inputs[1]) if split is not None else None
    if turn is None or split is None or target is None or attribute(split, "allowzero", 0):
        return None
    whole = split.inputs[0]
    if len(target) != 4 or target[:2].any() or (target[2:] <= 0).any() or whole is None or whole.shape is None:
        return None
    return (whole, int(target[2]), int(target[3])) if len(whole.shape) == 3 else None


def _joined(weighted: ir.Node) -> ir.Value | None:
    """(B, Q, H) behind Transpose and Reshape of what the weights gave."""
    turn = sole_user(weighted.outputs[0], "Transpose")
    join = sole_user(turn.outputs[0], "Reshape") if turn is not None and permutation(turn) == IN_FRONT else None
    target = array(join.inputs[1]) if join is not None else None
    if join is None or target is None or len(target) != 3 or target[:2].any() or attribute(join, "allowzero", 0):
        return None
    return join.outputs[0]


def _mask(
    graph: ir.Graph, found: _Attention, anchor: ir.Node, known: dict[tuple[object, ...], ir.Value]
) -> ir.Value | None:
    """The sum of what is added to the scores, with one row a query as the operator wants it; one for all layers."""
    if not found.terms:
        return None
    length = found.query.shape[1] if found.query.shape is not None else None
    key = (*found.terms, length if isinstance(length, int) else getattr(length, "value", None) or id(found.query))
    if key not in known:
        known[key] = _one_row_a_query(graph, _added(found.terms, anchor, known), found.query, anchor)
    return known[key]


def _added(terms: tuple[ir.Value, ...], anchor: ir.Node, known: dict[tuple[object, ...], ir.Value]) -> ir.Value:
    total = terms[0]
    for index, term in enumerate(terms[1:], 2):
        if terms[:index] not in known:
            node = node_before(anchor, "Add", [total, term])
            dims = zip(total.shape, term.shape, strict=True)
            node.outputs[0].shape = ir.Shape([one if other == 1 else other for one, other in dims])
            node.outputs[0].type = total.type
            known[terms[:index]] = node.outputs[0]
        total = known[terms[:index]]
    return total


def _one_row_a_query(graph: ir.Graph, mask: ir.Value, query: ir.Value, anchor: ir.Node) -> ir.Value:
    """(., ., 1, L) becomes (., ., Q, L)."""
    rows, wanted = mask.shape[2], query.shape[1] if query.shape is not None else None
    if wanted is not None and same_dim(rows, wanted):
        return mask
    length = node_before(anchor, "Shape", [query], start=1, end=2)
    ones, one = constant(graph, np.array([1, 1], np.int64), "ones"), constant(graph, np.array([1], np.int64), "one")
    shape = node_before(anchor, "Concat", [ones, length.outputs[0], one], axis=0)
    wide = node_before(anchor, "Expand", [mask, shape.outputs[0]])
    first, second, _, last = mask.shape
    wide.outputs[0].shape, wide.outputs[0].type = ir.Shape([first, second, wanted, last]), mask.type
    return wide.outputs[0]
