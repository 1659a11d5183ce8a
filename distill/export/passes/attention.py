"""Attention: its scale goes into the query's weights, and products of one input become one product."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from distill.export.passes.match import (
    Product,
    array,
    attribute,
    constant,
    maker,
    numbers_of,
    product,
    products,
    scalar,
    single,
    take_over,
)

LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")  # they move numbers and change none


def scale_into_query(model: ir.Model) -> int:
    """Moves a factor such as 1/sqrt(d) from the scores into the weights and bias of the query: one node less a layer.

    (x Wq + bq) k^T c = (x (c Wq) + c bq) k^T. Rotary embeddings stand between weights and scores: there it stays.
    """
    changed = 0
    for node in list(model.graph):
        factor = _factor(node)
        if factor is None or node.inputs[0] is None:
            continue
        columns = _columns_behind(node.inputs[0])
        if columns is None:
            continue
        _scale(model.graph, columns, factor)
        take_over(node.outputs[0], node.inputs[0])
        changed += 1
    return changed


def _factor(node: ir.Node) -> float | None:
    """The constant c where the node computes x * c or x / c, the constant on the right, as torch.export writes it."""
    if node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    number = scalar(node.inputs[1])
    if number is None or number == 0:
        return None
    return number if node.op_type == "Mul" else 1 / number


@dataclass(frozen=True)
class _Columns:
    """Part of a product's result: columns `begin` to `end`."""

    product: Product
    begin: int
    end: int


def _columns_behind(value: ir.Value) -> _Columns | None:
    """The product whose result reaches `value` through scores and layout alone, read by nothing on the way."""
    scores = False
    while True:
        if len(value.uses()) != 1 or value.is_graph_output():
            return None
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if (whole := _product_of(node)) is not None:
            width = int(np.prod(whole.weight.shape.numpy()[1:])) if whole.weight.shape is not None else 0
            return _Columns(whole, 0, width) if scores or width else None
        if node.op_type == "Split" and (part := _split_part(node, value)) is not None:
            return part
        if node.op_type == "MatMul" and not scores:
            scores = True
        elif node.op_type not in LAYOUT:
            return None
        assert node.inputs[0] is not None
        value = node.inputs[0]


def _product_of(node: ir.Node) -> Product | None:
    """The product that ends at `node`: its bias sum, or the multiplication where there is no bias."""
    if node.op_type == "MatMul":
        found = product(node)
        return found if found is not None and found.add is None else None
    if node.op_type == "Add":
        for side in node.inputs:
            matmul = maker(side, "MatMul")
            found = product(matmul) if matmul is not None else None
            if found is not None and found.add is node:
                return found
    return None


def _split_part(node: ir.Node, value: ir.Value) -> _Columns | None:
    """The columns of a merged product that a Split hands out as `value`."""
    source = node.inputs[0]
    if source is None or source.producer() is None or not single(source.producer()):
        return None
    whole = _product_of(source.producer())
    lengths = array(node.inputs[1]) if len(node.inputs) > 1 else None
    last = attribute(node, "axis", 0) in (-1, len(source.shape) - 1 if source.shape is not None else -1)
    if whole is None or lengths is None or not last:
        return None
    index = next(index for index, output in enumerate(node.outputs) if output is value)
    begin = int(lengths[:index].sum())
    return _Columns(whole, begin, begin + int(lengths[index]))


def _scale(graph: ir.Graph, columns: _Columns, factor: float) -> None:
    """Multiplies the columns of weight and bias. Shared weights are left alone: the product gets its own."""
    part = columns.product
    for value, node in ((part.weight, part.matmul), (part.bias, part.add)):
        if value is None or node is None:
            continue
        numbers = numbers_of(value).copy()
        numbers[..., columns.begin : columns.end] *= np.float32(factor)
        index = next(index for index, given in enumerate(node.inputs) if given is value)
        node.replace_input_with(index, _shared(graph, numbers, f"{value.name}.scaled"))


def _shared(graph: ir.Graph, numbers: np.ndarray, name: str) -> ir.Value:
    """A constant under `name`; the one that is there already where it holds the same (layers that share weights)."""
    there = graph.initializers.get(name)
    known = array(there)
    if there is not None and known is not None and np.array_equal(known, numbers):
        return there
    return constant(graph, numbers, name)


def merge_products(model: ir.Model) -> int:
    """Turns products of one input, such as query, key and value, into one product and a Split.

    In int8 their input is then quantised once, and one wide product runs faster than three narrow ones.
    """
    groups: dict[tuple[int, bool], list[Product]] = defaultdict(list)
    for found in products(model.graph):
        groups[id(found.x), found.bias is None].append(found)
    changed = 0
    sets: dict[ir.Value, set[tuple[ir.Value, ...]]] = defaultdict(set)
    for group in groups.values():
        for part in group:
            sets[part.weight].add(tuple(each.weight for each in group))
    for group in groups.values():
        # A weight that other layers use in another company would be stored twice: it is left where it is.
        if len(group) > 1 and all(len(sets[part.weight]) == 1 for part in group):
            _merge(model.graph, group)
            changed += 1
    return changed


def _merge(graph: ir.Graph, group: list[Product]) -> None:
    weights = [numbers_of(part.weight) for part in group]
    widths = [int(weight.shape[1]) for weight in weights]
    first = group[0]
    weight = _shared(graph, np.concatenate(weights, axis=1), _merged_name([part.weight for part in group]))
    nodes = [ir.node("MatMul", [first.matmul.inputs[0], weight])]
    if first.bias is not None:
        biases = [numbers_of(part.bias) for part in group]
        bias = _shared(graph, np.concatenate(biases), _merged_name([part.bias for part in group]))
        nodes.append(ir.node("Add", [nodes[0].outputs[0], bias]))
    lengths = _shared(graph, np.array(widths, np.int64), "split")
    nodes.append(ir.node("Split", [nodes[-1].outputs[0], lengths], {"axis": -1}, num_outputs=len(group)))
    for node in nodes[:-1]:
        shape = first.result.shape
        node.outputs[0].shape = None if shape is None else ir.Shape([*shape[:-1], sum(widths)])
        node.outputs[0].type = first.result.type
    graph.insert_before(first.matmul, nodes)
    for part, output in zip(group, nodes[-1].outputs, strict=True):
        output.shape, output.type = part.result.shape, part.result.type
        take_over(part.result, output)


def _merged_name(values: list[ir.Value | None]) -> str:
    """`attention.query+key+value.weight` from the names of the three."""
    parts = [str(value.name).split(".") for value in values if value is not None]
    shortest = min(len(part) for part in parts)
    head = next((index for index in range(shortest) if len({part[index] for part in parts}) > 1), 0)
    middle = "+".join(part[head] for part in parts)
    return ".".join([*parts[0][:head], middle, *parts[0][head + 1 :]])
