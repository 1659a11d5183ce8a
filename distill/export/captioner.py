"""Cuts the one graph of an image encoder with a decoder into the files that clients expect, and feed.

    cut_captioner(Path("student-int8.onnx"), Path("encoder_model_quantized.onnx"), Path("decoder_model_merged...onnx"))

The encoder takes `pixel_values`. Its `last_hidden_state` (B, L, X) holds, side by side, the keys and values that all
layers of the decoder make of the image: transformers.js hands it on as it is, as `encoder_hidden_states`, and has no
place for them among the past of a GPT-2. So they are made once an image, by every client, and not once a token.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.errors import ExportError
from distill.export.encoder_decoder import save
from distill.export.graph import drop_unread_inputs
from distill.export.passes.match import attribute

STATES, GIVEN, PIXELS = "last_hidden_state", "encoder_hidden_states", "pixel_values"
_CROSSED = re.compile(r"present\.\d+\.encoder\.(key|value)")


def cut_captioner(source: Path, encoder: Path, decoder: Path) -> None:
    """Writes both files; what is there is replaced once the new one is complete.

    Args:
        source: What `export_graph` or the quantiser wrote of a `distill.tasks.captioning_graph`.
        encoder: From pixels to keys and values of the image.
        decoder: From these, past and new tokens to logits and present.

    Raises:
        ExportError: One half reads more of the other than that.
    """
    save(_encoder(ir.load(source), source), encoder)
    save(_decoder(ir.load(source), source), decoder)


def _crossed(graph: ir.Graph) -> list[ir.Value]:
    """(B, heads, L, width of a head) each, in the order of the graph."""
    return [value for value in graph.outputs if _CROSSED.fullmatch(str(value.name))]


def _encoder(model: ir.Model, source: Path) -> ir.Model:
    graph = model.graph
    crossed = _crossed(graph)
    graph.outputs.clear()
    flat = [_node(graph, "Reshape", [_turned(graph, value), _shape(graph, 0, 0, -1)]) for value in crossed]
    states = _node(graph, "Concat", flat, axis=2)
    states.name, states.type = STATES, ir.TensorType(ir.DataType.FLOAT)
    states.shape = ir.Shape([*list(crossed[0].shape or [])[:1], *_sizes(crossed)])
    graph.outputs.append(states)
    _count_rows_by(graph, PIXELS)
    RemoveUnusedNodesPass()(model)
    drop_unread_inputs(model)
    _only(graph, {PIXELS}, "the encoder", source)
    return model


def _decoder(model: ir.Model, source: Path) -> ir.Model:
    graph = model.graph
    crossed = _crossed(graph)
    length, width = _sizes(crossed)
    rows = list(crossed[0].shape or [])[:1]
    given = ir.Value(name=GIVEN, shape=ir.Shape([*rows, length, width]), type=ir.TensorType(ir.DataType.FLOAT))
    first = graph[0]
    begin = 0
    for value in crossed:
        heads, each = int(value.shape[1]), int(value.shape[3])
        graph.outputs.remove(value)
        part = _sliced(graph, given, begin, begin + heads * each, before=first)
        own = _node(graph, "Reshape", [part, _shape(graph, 0, 0, heads, each)], before=first)
        ir.convenience.replace_all_uses_with(value, _turned(graph, own, before=first))
        begin += heads * each
    graph.inputs.append(given)
    _count_rows_by(graph, "decoder_input_ids")
    RemoveUnusedNodesPass()(model)
    drop_unread_inputs(model)
    next(value for value in graph.inputs if value.name == "decoder_input_ids").name = "input_ids"
    known = {str(value.name) for value in graph.inputs if str(value.name).startswith("past_key_values.")}
    _only(graph, {"input_ids", GIVEN, *known}, "the decoder", source)
    return model


def _sizes(crossed: list[ir.Value]) -> tuple[int | str, int]:
    """L, where the graph knows it (TrOCR's divides rows by rows), and how wide keys and values are side by side."""
    shapes = [value.shape or ir.Shape([]) for value in crossed]
    length = shapes[0][2]
    return length if isinstance(length, int) else "length", sum(int(shape[1]) * int(shape[3]) for shape in shapes)


def _count_rows_by(graph: ir.Graph, name: str) -> None:
    """Lets one input say how many rows there are, which every input has as many of."""
    (counted,) = (value for value in graph.inputs if value.name == name)
    for value in graph.inputs:
        for use in list(value.uses()):
            if use.node.op_type == "Shape" and attribute(use.node, "end") == 1 and value is not counted:
                use.node.replace_input_with(use.idx, counted)


def _only(graph: ir.Graph, inputs: set[str], half: str, source: Path) -> None:
    """Refuses a half that reads anything else."""
    others = [str(value.name) for value in graph.inputs if str(value.name) not in inputs]
    if others:
        raise ExportError(
            f"{half} reads {', '.join(others)}",
            where=str(source),
            fix="Take a teacher of another family: ViT with GPT-2, and TrOCR, are known.",
        )


def _node(
    graph: ir.Graph, kind: str, inputs: list[ir.Value], *, before: ir.Node | None = None, **attributes: int | list[int]
) -> ir.Value:
    """The output of a new node, at the graph's end where no place is named."""
    made = [
        ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrInt64s(name, value)
        for name, value in attributes.items()
    ]
    node = ir.Node("", kind, inputs, made, num_outputs=1)
    if before is None:
        graph.append(node)
    else:
        graph.insert_before(before, node)
    return node.outputs[0]


def _turned(graph: ir.Graph, value: ir.Value, *, before: ir.Node | None = None) -> ir.Value:
    """Heads behind places, or back."""
    return _node(graph, "Transpose", [value], before=before, perm=[0, 2, 1, 3])


def _sliced(graph: ir.Graph, value: ir.Value, begin: int, end: int, *, before: ir.Node) -> ir.Value:
    """Numbers `begin` to `end` of the last axis."""
    bounds = [_shape(graph, bound) for bound in (begin, end, 2)]
    return _node(graph, "Slice", [value, *bounds], before=before)


def _shape(graph: ir.Graph, *sizes: int) -> ir.Value:
    """A constant of int64, one for all that ask for the same."""
    name = f"captioner.{'x'.join(map(str, sizes))}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(sizes, np.int64), name=name)
        value = ir.Value(name=name, shape=ir.Shape([len(sizes)]), type=ir.TensorType(ir.DataType.INT64))
        value.const_value = tensor
        graph.register_initializer(value)
    return graph.initializers[name]
