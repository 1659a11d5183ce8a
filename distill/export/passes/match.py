"""The few questions that every pass asks of a graph, and the few changes that every pass makes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


def array(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant; None for whatever is computed or fed."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return np.asarray(value.const_value.numpy())


def numbers_of(value: ir.Value | None) -> np.ndarray:
    """The numbers of what is known to be a constant."""
    numbers = array(value)
    assert numbers is not None
    return numbers


def scalar(value: ir.Value | None) -> float | None:
    """The number of a constant with one element."""
    numbers = array(value)
    return float(numbers.reshape(())) if numbers is not None and numbers.size == 1 else None


def maker(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The standard-ONNX node that makes `value`, where it is one of `kinds`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in kinds else None


def sole_user(value: ir.Value, *kinds: str) -> ir.Node | None:
    """The one node that reads `value`, where nothing else does and it is one of `kinds` (any, when none is named)."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.domain == "" and (not kinds or node.op_type in kinds) else None


def single(node: ir.Node) -> bool:
    """Whether exactly one node reads the first output of `node`, and the graph does not return it."""
    return len(node.outputs[0].uses()) == 1 and not node.outputs[0].is_graph_output()


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """An attribute's Python value, `default` where it is not given."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def permutation(node: ir.Node) -> list[int]:
    """The `perm` of a Transpose; empty where it is not written down."""
    return [int(axis) for axis in node.attributes["perm"].as_ints()] if "perm" in node.attributes else []


def constant(graph: ir.Graph, numbers: np.ndarray, name: str) -> ir.Value:
    """Adds a constant under `name`, or `name` with a number behind it where that is taken."""
    free, count = name, 1
    while free in graph.initializers:
        free, count = f"{name}_{count}", count + 1
    tensor = ir.tensor(np.ascontiguousarray(numbers) if numbers.ndim else numbers, name=free)
    value = ir.Value(name=free, shape=ir.Shape(numbers.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def node_after(
    anchor: ir.Node, kind: str, inputs: list[ir.Value | None], like: ir.Value | None = None, *, domain: str = "",
    count: int = 1, **attributes: object,
) -> ir.Node:  # fmt: skip
    """Adds a node right after `anchor`. `like` lends the first output its shape and type."""
    node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=count)
    if like is not None:
        node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
    assert anchor.graph is not None
    anchor.graph.insert_after(anchor, node)
    return node


def node_before(
    anchor: ir.Node, kind: str, inputs: list[ir.Value | None], *, domain: str = "", count: int = 1, **attributes: object
) -> ir.Node:
    """Adds a node right before `anchor`."""
    node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=count)
    assert anchor.graph is not None
    anchor.graph.insert_before(anchor, node)
    return node


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Lets `new` stand wherever `old` was read. An output of the graph keeps its name."""
    if old.is_graph_output():
        name = old.name
        old.name, new.name = f"{name}.before", name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


@dataclass(frozen=True)
class Product:
    """`x @ weight + bias` with constant `weight` (in, out) and `bias` (out,) or none.

    Attributes:
        x: What is multiplied.
        weight: The constant matrix.
        bias: The constant vector, where the sum follows at once and nothing else reads the product.
        matmul: The node that multiplies.
        add: The node that adds the bias.
    """

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    matmul: ir.Node
    add: ir.Node | None

    @property
    def result(self) -> ir.Value:
        """What the product is called downstream."""
        return (self.add or self.matmul).outputs[0]


def product(matmul: ir.Node) -> Product | None:
    """Reads a MatMul with a constant two-dimensional right side, and the bias that follows it."""
    if matmul.domain != "" or matmul.op_type != "MatMul" or matmul.inputs[0] is None:
        return None
    weight = matmul.inputs[1]
    numbers = array(weight)
    if weight is None or numbers is None or numbers.ndim != 2:
        return None
    add = sole_user(matmul.outputs[0], "Add")
    if add is not None:
        bias = add.inputs[1] if add.inputs[0] is matmul.outputs[0] else add.inputs[0]
        vector = array(bias)
        if vector is not None and vector.shape == (numbers.shape[1],):
            return Product(matmul.inputs[0], weight, bias, matmul, add)
    return Product(matmul.inputs[0], weight, None, matmul, None)


def products(graph: ir.Graph) -> list[Product]:
    """Every product of the graph, in order."""
    return [found for found in (product(node) for node in graph) if found is not None]


def same_dim(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    """Whether two lengths of an axis are known to be one."""
    if isinstance(one, int) or isinstance(other, int):
        return bool(one == other)
    return one.value is not None and bool(one.value == other.value)
