"""Dynamic int8: weights and tables are stored in int8, activations are quantised as they come.

    report = quantize_dynamic_int8("model.onnx", "model_quantized.onnx", target="arm64")

Weights are signed, symmetric, one scale a column of the result; activations unsigned, one scale a tensor, found at each
call. Embedding tables have one scale a row. What stays in fp32: normalisations, softmax, activation functions, biases,
the last product of a classifier, and whatever `keep` names.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.errors import ExportError
from distill.export.passes.match import (
    Product,
    array,
    attribute,
    constant,
    node_after,
    node_before,
    numbers_of,
    products,
    take_over,
)
from distill.export.passes.shapes import gemm_as_product
from distill.export.sizes import Component, components

Target = Literal["portable", "arm64", "x86-vnni", "x86-avx2", "wasm"]

FEW_LABELS = 1024  # a last product this narrow or narrower stays exact: it costs next to nothing
FEW_ROWS = 64  # so do tables this short, such as token types
FEW_COLUMNS = 8  # and tables so narrow that the scale of a row is as large as the row
FUSED = "com.microsoft"  # ONNX Runtime's own operators: quantise, multiply, rescale and add the bias in one

LARGEST = {"portable": 63, "x86-avx2": 63, "arm64": 127, "x86-vnni": 127, "wasm": 127}
"""Largest weight. Without VNNI, pairs of u8 x s8 are added in 16 bits: 2 * 255 * 127 overflows, with 63 it fits."""


@dataclass(frozen=True)
class QuantizedGraph:
    """A written int8 file.

    Attributes:
        path: Where it is.
        bytes: Its size.
        target: What it is shaped for.
        products: Names of the weights that are multiplied in int8.
        kept: Names of the weights whose products are left in fp32.
        tables: Names of the tables stored in int8.
        components: Bytes by part of the model.
    """

    path: Path
    bytes: int
    target: str
    products: tuple[str, ...]
    kept: tuple[str, ...]
    tables: tuple[str, ...]
    components: tuple[Component, ...]


@dataclass
class Quantized:
    """What `quantize_model` did, by name of the constant."""

    products: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


def quantize_dynamic_int8(
    fp32_path: str | Path,
    int8_path: str | Path,
    *,
    target: Target = "arm64",
    metadata: Mapping[str, str] | None = None,
    keep: Collection[str] = (),
    tables: bool = True,
) -> QuantizedGraph:
    """Writes the int8 form of an exported fp32 graph. The fp32 file stays as it is.

    Args:
        fp32_path: What `export_graph` wrote.
        int8_path: The file to write; replaced only once the new one is complete.
        target: Which processors it is for. `x86-avx2` and `portable` keep weights within 7 bits, so that processors
            without VNNI do not saturate; `portable` also keeps to standard ONNX operators.
        metadata: Strings that are added to, or replace, those of the fp32 file.
        keep: Names of weights (as `QuantizedGraph.products` lists them) whose products stay in fp32.
        tables: Whether embedding tables are stored in int8 too.

    Raises:
        ExportError: A name in `keep` is no product of this graph, or nothing in the file can be quantised.
    """
    source, path = Path(fp32_path), Path(int8_path)
    model = ir.load(source)
    done = quantize_model(model, target=target, keep=keep, tables=tables)
    if not done.products and not done.tables:
        raise ExportError("nothing in it can be quantised", where=str(source), fix="Give the exported fp32 graph.")
    if unknown := sorted(set(keep) - set(done.kept)):
        raise ExportError(
            f"{unknown[0]!r} is no product of {source.name}",
            where="keep",
            fix=f"Its products: {', '.join(done.products + done.kept)}.",
        )
    model.metadata_props.update(metadata or {})
    model.metadata_props["distill.target"] = target
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    ir.save(model, beside)
    os.replace(beside, path)
    return QuantizedGraph(
        path, path.stat().st_size, target, tuple(done.products), tuple(done.kept), tuple(done.tables), components(model)
    )


def product_names(fp32_path: str | Path) -> list[str]:
    """Names of the weights of an exported graph whose products int8 would run, in order."""
    return quantize_model(ir.load(fp32_path), tables=False).products


def quantize_model(
    model: ir.Model, *, target: Target = "arm64", keep: Collection[str] = (), tables: bool = True
) -> Quantized:
    """Quantises products and tables in place."""
    done, graph = Quantized(), model.graph
    gemm_as_product(model)
    by_input: dict[ir.Value, list[Product]] = defaultdict(list)
    on_load: list[Product] = []
    for found in products(graph):
        name = str(found.weight.name)
        if name in keep or _is_last(found):
            done.kept.append(name)
        elif _is_constant(found.x):  # a product of weights is multiplied once, when the file is loaded
            on_load.append(found)
        else:
            done.products.append(name)
            by_input[found.x].append(found)
    weights = Weights(graph, LARGEST[target])
    for found in on_load:
        found.matmul.replace_input_with(1, _widened(found.matmul, *weights.of(found.weight), found.weight))
    for group in by_input.values():
        _quantize_products(group, weights, fused=target != "portable")
    if tables:
        done.tables += _quantize_tables(model)
    RemoveUnusedNodesPass()(model)
    if target != "portable":
        model.graph.opset_imports[FUSED] = 1
    return done


def _is_last(found: Product) -> bool:
    """Whether a product gives the logits of a few labels."""
    width = int(numbers_of(found.weight).shape[1])
    return found.result.is_graph_output() and width <= FEW_LABELS


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value follows from constants alone."""
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(_is_constant(given) for given in node.inputs)


class Weights:
    """The int8 constants of a graph: each weight is quantised once, however many layers share it."""

    def __init__(self, graph: ir.Graph, largest: int) -> None:
        self._graph, self._largest = graph, largest
        self._done: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def of(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """int8 (in, out) and fp32 scales (out,) of a weight (in, out)."""
        if weight not in self._done:
            numbers, scales = quantize_columns(numbers_of(weight), self._largest)
            self._done[weight] = (
                constant(self._graph, numbers, f"{weight.name}.int8"),
                constant(self._graph, scales, f"{weight.name}.scale"),
            )
        return self._done[weight]


def quantize_columns(weight: np.ndarray, largest: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """int8 (in, out) and fp32 (out,): symmetric, one scale a column. A column of zeros stays zero."""
    scales = np.abs(weight).max(axis=0) / largest
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.clip(np.rint(weight / scales), -largest, largest).astype(np.int8), scales


def quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 (..., rows, width) and fp32 (..., rows, 1): symmetric, one scale a row."""
    scales = np.abs(table).max(axis=-1, keepdims=True) / 127
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.clip(np.rint(table / scales), -127, 127).astype(np.int8), scales


def _quantize_products(group: list[Product], weights: Weights, *, fused: bool) -> None:
    """Puts int8 products in the place of fp32 ones that read the same value, which is quantised once."""
    graph, x = group[0].matmul.graph, group[0].matmul.inputs[0]  # by now perhaps the result of another int8 product
    assert graph is not None
    first = min((found.matmul for found in group), key=list(graph).index) if len(group) > 1 else group[0].matmul
    if fused and len(group) == 1:
        found = group[0]
        numbers, scales = weights.of(found.weight)
        inputs = [x, numbers, scales, None, found.bias]
        node = node_after(found.add or found.matmul, "DynamicQuantizeMatMul", inputs, found.result, domain=FUSED)
        take_over(found.result, node.outputs[0])
        return
    quantise = node_before(first, "DynamicQuantizeLinear", [x], count=3)
    for found in group:
        numbers, scales = weights.of(found.weight)
        build = _fused_product if fused else _standard_product
        take_over(found.result, build(found, quantise, numbers, scales))


def _fused_product(found: Product, quantise: ir.Node, numbers: ir.Value, scales: ir.Value) -> ir.Value:
    x, x_scale, x_zero = quantise.outputs
    inputs = [x, numbers, x_scale, scales, x_zero, None, found.bias]
    anchor = found.add or found.matmul
    return node_after(anchor, "MatMulIntegerToFloat", inputs, found.result, domain=FUSED).outputs[0]


def _standard_product(found: Product, quantise: ir.Node, numbers: ir.Value, scales: ir.Value) -> ir.Value:
    x, x_scale, x_zero = quantise.outputs
    whole = node_after(found.matmul, "MatMulInteger", [x, numbers, x_zero])
    rough = node_after(whole, "Cast", whole.outputs[:1], to=int(ir.DataType.FLOAT))
    scale = node_after(rough, "Mul", [x_scale, scales])
    exact = node_after(scale, "Mul", [rough.outputs[0], scale.outputs[0]], found.result)
    if found.bias is None or found.add is None:
        return exact.outputs[0]
    return node_after(exact, "Add", [exact.outputs[0], found.bias], found.result).outputs[0]


def _quantize_tables(model: ir.Model) -> list[str]:
    """Stores embedding tables in int8 with one scale a row; lookups fetch int8 rows and widen those alone."""
    done = []
    for table in list(model.graph.initializers.values()):
        numbers = array(table)
        uses = table.uses()
        if numbers is None or numbers.dtype != np.float32 or numbers.ndim < 2:
            continue
        width = numbers.shape[-1]
        if width <= FEW_COLUMNS or numbers.size // width <= FEW_ROWS:
            continue
        if not uses or any(use.idx != 0 or use.node.domain != "" for use in uses):
            continue
        kinds = {use.node.op_type for use in uses}
        if kinds == {"Gather"} and all(attribute(use.node, "axis", 0) == 0 for use in uses):
            _widen_after(model.graph, table, [use.node for use in uses])
        elif kinds <= {"Slice", "LayerNormalization", "Unsqueeze"}:
            _widen_before(model.graph, table)
        else:
            continue
        done.append(str(table.name))
    return done


def _widen_after(graph: ir.Graph, table: ir.Value, lookups: list[ir.Node]) -> None:
    """rows[ids] becomes float(rows8[ids]) * scales[ids]."""
    numbers, scales = quantize_rows(numbers_of(table))
    rows, factors = constant(graph, numbers, f"{table.name}.int8"), constant(graph, scales, f"{table.name}.scale")
    for lookup in lookups:
        ids = lookup.inputs[1]
        small = node_after(lookup, "Gather", [rows, ids])
        factor = node_after(small, "Gather", [factors, ids])
        wide = node_after(factor, "Cast", small.outputs[:1], to=int(ir.DataType.FLOAT))
        exact = node_after(wide, "Mul", [wide.outputs[0], factor.outputs[0]], lookup.outputs[0])
        take_over(lookup.outputs[0], exact.outputs[0])


def _widen_before(graph: ir.Graph, table: ir.Value) -> None:
    """A table read in order is small: it is int8 in the file and widened once, when the file is loaded."""
    numbers, scales = quantize_rows(numbers_of(table))
    rows, factors = constant(graph, numbers, f"{table.name}.int8"), constant(graph, scales, f"{table.name}.scale")
    uses = table.uses()
    exact = _widened(graph.node(0), rows, factors, table)
    for use in uses:
        use.node.replace_input_with(use.idx, exact)


def _widened(anchor: ir.Node, numbers: ir.Value, scales: ir.Value, like: ir.Value) -> ir.Value:
    """Float(numbers) * scales, before `anchor`: ONNX Runtime computes what follows from constants on loading."""
    wide = node_before(anchor, "Cast", [numbers], to=int(ir.DataType.FLOAT))
    return node_after(wide, "Mul", [wide.outputs[0], scales], like).outputs[0]
