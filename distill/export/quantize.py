"""int8: weights and tables are stored in int8, activations are quantised as they come or to ranges seen beforehand.

    report = quantize_dynamic_int8("model.onnx", "model_quantized.onnx", target="arm64")
    report = quantize_int8("model.onnx", "model_quantized.onnx", ranges=observe("model.onnx", texts).ranges("min-max"))

Weights are signed, symmetric, one scale a column of the result; activations unsigned, one scale a tensor, found at each
call where no range is given. Embedding tables have one scale a row, or that of the tokens is in blocks of 4 bits. What
stays in fp32: normalisations, softmax, activation functions, biases, the last product of a classifier, and whatever
`keep` names.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.errors import ExportError
from distill.export.calibrate import Range
from distill.export.lookups import Table, Tables, quantize_tables, share_tied, store_half, widened
from distill.export.passes.match import (
    Product,
    constant,
    node_after,
    node_before,
    numbers_of,
    products,
    take_over,
)
from distill.export.passes.shapes import gemm_as_product
from distill.export.sizes import Component, components
from distill.export.token_table import refuse_tied

Target = Literal["portable", "arm64", "x86-vnni", "x86-avx2", "wasm"]

FEW_LABELS = 1024  # a last product this narrow or narrower stays exact: it costs next to nothing
CUTS = ("Split", "Squeeze", "Slice", "Transpose", "Identity")  # what a head may do to its logits without computing
FUSED = "com.microsoft"  # ONNX Runtime's own operators: quantise, multiply, rescale and add the bias in one

WHOLE = ("arm64", "wasm")
"""Targets where the node that multiplies also quantises: on Arm it has kernels of its own, on x86 two nodes are faster
(by 2% of a 6-layer model at 16 tokens, 0.6% at 64)."""

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
        tables: The embedding tables that are stored in few bits.
        components: Bytes by part of the model.
    """

    path: Path
    bytes: int
    target: str
    products: tuple[str, ...]
    kept: tuple[str, ...]
    tables: tuple[Table, ...]
    components: tuple[Component, ...]


@dataclass
class Quantized:
    """What `quantize_model` did, by name of the constant."""

    products: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def quantize_dynamic_int8(
    fp32_path: str | Path,
    int8_path: str | Path,
    *,
    target: Target = "arm64",
    metadata: Mapping[str, str] | None = None,
    keep: Collection[str] = (),
    tables: Tables = "int8",
) -> QuantizedGraph:
    """`quantize_int8` with every activation quantised as it comes."""
    return quantize_int8(fp32_path, int8_path, target=target, metadata=metadata, keep=keep, tables=tables)


def quantize_int8(
    fp32_path: str | Path,
    int8_path: str | Path,
    *,
    target: Target = "arm64",
    metadata: Mapping[str, str] | None = None,
    keep: Collection[str] = (),
    tables: Tables = "int8",
    ranges: Mapping[str, Range] | None = None,
    means: Mapping[str, np.ndarray] | None = None,
    half: bool = False,
) -> QuantizedGraph:
    """Writes the int8 form of an exported fp32 graph. The fp32 file stays as it is.

    Args:
        fp32_path: What `export_graph` wrote.
        int8_path: The file to write; replaced only once the new one is complete.
        target: Which processors it is for. `x86-avx2` and `portable` keep weights within 7 bits, so that processors
            without VNNI do not saturate; `portable` also keeps to standard ONNX operators.
        metadata: Strings that are added to, or replace, those of the fp32 file.
        keep: Names of weights (as `QuantizedGraph.products` lists them) whose products stay in fp32.
        tables: How embedding tables are stored; `int4` takes an operator of ONNX Runtime's own.
        ranges: By name of a value that products read, the range it is quantised to; values that are not named are
            quantised as they come.
        means: By name of a value that products read, the means (K,) of its channels; biases then take back what
            rounding the weights does on average (Nagel et al. 2019, section 4.2).
        half: Whether the weights named in `keep` are stored in fp16; ONNX Runtime widens them once, on loading, and
            multiplies in fp32. One too large for fp16 stays in fp32.

    Raises:
        ExportError: A name in `keep` is no product of this graph, nothing in the file can be quantised, or its table of
            tokens cannot be in int4.
    """
    source, path = Path(fp32_path), Path(int8_path)
    model = ir.load(source)
    done = quantize_model(model, target=target, keep=keep, tables=tables, ranges=ranges, means=means, half=half)
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
    if tables == "int4":
        model.metadata_props["distill.embeddings"] = tables
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    ir.save(model, beside)
    os.replace(beside, path)
    return QuantizedGraph(
        path, path.stat().st_size, target, tuple(done.products), tuple(done.kept), tuple(done.tables), components(model)
    )


def product_names(fp32_path: str | Path) -> list[str]:
    """Names of the weights of an exported graph whose products int8 would run, each once, in order."""
    return list(dict.fromkeys(quantize_model(ir.load(fp32_path), tables="fp32").products))


def exact_names(fp32_path: str | Path) -> list[str]:
    """Names of the weights of an exported graph whose products int8 leaves alone, each once, in order."""
    return list(dict.fromkeys(quantize_model(ir.load(fp32_path), tables="fp32").kept))


def quantize_model(
    model: ir.Model,
    *,
    target: Target = "arm64",
    keep: Collection[str] = (),
    tables: Tables = "int8",
    ranges: Mapping[str, Range] | None = None,
    means: Mapping[str, np.ndarray] | None = None,
    half: bool = False,
) -> Quantized:
    """Quantises products and tables in place; see `quantize_int8`."""
    done, graph = Quantized(), model.graph
    gemm_as_product(model)
    if tables == "int4":
        refuse_portable(target)
        refuse_tied(graph, [found for found in products(graph) if not stays_exact(found)])
    by_input: dict[ir.Value, list[Product]] = defaultdict(list)
    on_load: list[Product] = []
    for found in products(graph):
        name = str(found.weight.name)
        if name in keep or stays_exact(found):
            done.kept.append(name)
        elif _is_constant(found.x):  # a product of weights is multiplied once, when the file is loaded
            on_load.append(found)
        else:
            done.products.append(name)
            by_input[found.x].append(found)
    if half:
        for weight in dict.fromkeys(found.weight for found in products(graph) if str(found.weight.name) in keep):
            store_half(graph, weight)
    weights = Weights(graph, LARGEST[target])
    for found in on_load:
        found.matmul.replace_input_with(1, widened(found.matmul, *weights.of(found.weight), found.weight))
    for x, group in by_input.items():
        name = str(x.name)
        if means and name in means:
            group = [_corrected(found, weights, means[name]) for found in group]
        _quantize_products(group, weights, (ranges or {}).get(name), fused=target != "portable", whole=target in WHOLE)
    if tables != "fp32":
        done.tables += quantize_tables(model, tables)
        share_tied(model)
    RemoveUnusedNodesPass()(model)
    if target != "portable":
        model.graph.opset_imports[FUSED] = 1
    return done


def refuse_portable(target: str) -> None:
    """Refuses a table in int4 where a file keeps to the operators of standard ONNX.

    Raises:
        ExportError: It does.
    """
    if target == "portable":
        raise ExportError(
            "standard ONNX has no operator that looks 4-bit numbers up, and portable files keep to standard operators",
            where="export.embeddings",
            fix='Set export.embeddings = "int8", or another export.target.',
        )


def stays_exact(found: Product) -> bool:
    """Whether a product gives the logits of a few labels, whole or in parts, and so stays in fp32."""
    return int(numbers_of(found.weight).shape[1]) <= FEW_LABELS and _is_returned(found.result)


def _is_returned(value: ir.Value) -> bool:
    """Whether the graph returns a value, or all that is cut out of it: starts and ends of spans are one product."""
    if value.is_graph_output():
        return True
    nodes = [use.node for use in value.uses()]
    return bool(nodes) and all(
        node.op_type in CUTS and node.domain == "" and all(_is_returned(part) for part in node.outputs)
        for node in nodes
    )


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


def _corrected(found: Product, weights: Weights, mean: np.ndarray) -> Product:
    """The product with a bias that gives the exact mean: b - E[x] (Wq - W)."""
    if found.bias is None or found.add is None or mean.shape != (numbers_of(found.weight).shape[0],):
        return found
    numbers, scales = (numbers_of(value) for value in weights.of(found.weight))
    shift = mean @ (numbers.astype(np.float32) * scales - numbers_of(found.weight))
    assert found.matmul.graph is not None
    bias = constant(found.matmul.graph, numbers_of(found.bias) - shift, f"{found.bias.name}.corrected")
    found.add.replace_input_with(list(found.add.inputs).index(found.bias), bias)
    return replace(found, bias=bias)


def _quantize_products(
    group: list[Product], weights: Weights, within: Range | None, *, fused: bool, whole: bool
) -> None:
    """Puts int8 products in the place of fp32 ones that read the same value, which is quantised once."""
    graph, x = group[0].matmul.graph, group[0].matmul.inputs[0]  # by now perhaps the result of another int8 product
    assert graph is not None
    assert x is not None
    first = min((found.matmul for found in group), key=list(graph).index) if len(group) > 1 else group[0].matmul
    if whole and len(group) == 1 and within is None:
        found = group[0]
        numbers, scales = weights.of(found.weight)
        inputs = [x, numbers, scales, None, found.bias]
        node = node_after(found.add or found.matmul, "DynamicQuantizeMatMul", inputs, found.result, domain=FUSED)
        take_over(found.result, node.outputs[0])
        return
    if not fused and within is not None and within.axes != 3:
        within = None  # of static products in standard operators, ONNX Runtime joins those of (B, L, K) alone
    quantised = _quantised(first, x, within, domain=FUSED if fused else "")
    for found in group:
        numbers, scales = weights.of(found.weight)
        if fused:
            result = _fused_product(found, quantised, numbers, scales)
        elif within is None:
            result = _standard_product(found, quantised, numbers, scales)
        else:
            result = _standard_static_product(found, quantised, numbers, scales)
        take_over(found.result, result)


def _quantised(anchor: ir.Node, x: ir.Value, within: Range | None, *, domain: str) -> Sequence[ir.Value]:
    """uint8, its scale and its zero point, before `anchor`.

    QuantizeLinear is of `domain`: of opset 23's, which files with fused attention have, ONNX Runtime 1.23 has none.
    """
    if within is None:
        return node_before(anchor, "DynamicQuantizeLinear", [x], count=3).outputs
    assert anchor.graph is not None
    scale = constant(anchor.graph, np.array(within.scale, np.float32), f"{x.name}.scale")
    zero = constant(anchor.graph, np.array(within.zero, np.uint8), f"{x.name}.zero")
    return [node_before(anchor, "QuantizeLinear", [x, scale, zero], domain=domain).outputs[0], scale, zero]


def _fused_product(found: Product, quantised: Sequence[ir.Value], numbers: ir.Value, scales: ir.Value) -> ir.Value:
    x, x_scale, x_zero = quantised
    inputs = [x, numbers, x_scale, scales, x_zero, None, found.bias]
    anchor = found.add or found.matmul
    return node_after(anchor, "MatMulIntegerToFloat", inputs, found.result, domain=FUSED).outputs[0]


def _standard_product(found: Product, quantised: Sequence[ir.Value], numbers: ir.Value, scales: ir.Value) -> ir.Value:
    x, x_scale, x_zero = quantised
    whole = node_after(found.matmul, "MatMulInteger", [x, numbers, x_zero])
    rough = node_after(whole, "Cast", whole.outputs[:1], to=int(ir.DataType.FLOAT))
    scale = node_after(rough, "Mul", [x_scale, scales])
    exact = node_after(scale, "Mul", [rough.outputs[0], scale.outputs[0]], found.result)
    if found.bias is None or found.add is None:
        return exact.outputs[0]
    return node_after(exact, "Add", [exact.outputs[0], found.bias], found.result).outputs[0]


def _standard_static_product(
    found: Product, quantised: Sequence[ir.Value], numbers: ir.Value, scales: ir.Value
) -> ir.Value:
    """The product of two dequantised values, which ONNX Runtime joins into one int8 product on loading."""
    wide = node_before(found.matmul, "DequantizeLinear", list(quantised))
    weight = node_before(found.matmul, "DequantizeLinear", [numbers, scales], axis=1)
    exact = node_after(found.matmul, "MatMul", [wide.outputs[0], weight.outputs[0]], found.result)
    if found.bias is None or found.add is None:
        return exact.outputs[0]
    return node_after(found.add, "Add", [exact.outputs[0], found.bias], found.result).outputs[0]
