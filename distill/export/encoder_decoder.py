"""Cuts the one graph of an encoder-decoder into the files that clients expect: optimum's names, transformers.js' feeds.

    cut(Path("student-int8.onnx"), Path("encoder_model_quantized.onnx"), Path("decoder_model_merged_quantized.onnx"))

The encoder gives `last_hidden_state`. The decoder takes it as `encoder_hidden_states` beside `encoder_attention_mask`,
`input_ids`, the past and `use_cache_branch`: where that is true, keys and values of the encoder's states are taken from
the past instead of being made again, the work of every token but the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from distill.errors import ExportError
from distill.export.graph import drop_unread_inputs
from distill.export.passes.match import attribute

STATES, BRANCH = "encoder_hidden_states", "use_cache_branch"
_TRACED = "encoder_last_hidden_state"
_CROSSED = ".encoder."


def cut(source: Path, encoder: Path, decoder: Path) -> None:
    """Writes both files; what is there is replaced once the new one is complete.

    Args:
        source: What `export_graph` or the quantiser wrote of a `distill.tasks.translation_graph`.
        encoder: From ids to states.
        decoder: From states, past and new tokens to logits and present; the weights are in it once.

    Raises:
        ExportError: The decoder reads more of the encoder than its states.
    """
    save(_encoder(ir.load(source)), encoder)
    save(_decoder(ir.load(source), source), decoder)


def _encoder(model: ir.Model) -> ir.Model:
    graph = model.graph
    (states,) = (value for value in graph.outputs if value.name == _TRACED)
    graph.outputs.clear()
    graph.outputs.append(states)
    states.name = "last_hidden_state"
    (ids,) = (value for value in graph.inputs if value.name == "input_ids")
    for value in graph.inputs:
        rows = [use for use in value.uses() if use.node.op_type == "Shape" and attribute(use.node, "end") == 1]
        for use in rows:
            use.node.replace_input_with(use.idx, ids)  # every input has as many rows
    RemoveUnusedNodesPass()(model)
    drop_unread_inputs(model)
    return model


def _decoder(model: ir.Model, source: Path) -> ir.Model:
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    (states,) = (value for value in graph.outputs if value.name == _TRACED)
    given = ir.Value(name=STATES, shape=states.shape, type=ir.TensorType(ir.DataType.FLOAT))
    graph.outputs.remove(states)
    ir.convenience.replace_all_uses_with(states, given)
    graph.inputs.append(given)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    for use in [use for use in ids.uses() if use.node.op_type == "Shape"]:
        use.node.replace_input_with(use.idx, mask)  # both are (B, L)
    RemoveUnusedNodesPass()(model)
    if ids.uses():
        raise ExportError(
            "the decoder reads the encoder's tokens themselves",
            where=str(source),
            fix="Take a teacher of another family: T5, BART and Marian are known.",
        )
    graph.inputs.remove(ids)
    mask.name, inputs["decoder_input_ids"].name = "encoder_attention_mask", "input_ids"
    _branch(graph, source)
    return model


def _branch(graph: ir.Graph, source: Path) -> None:
    """Moves what makes keys and values of the encoder's states into an If, whose other branch takes them as given."""
    crossed = [value for value in graph.outputs if _CROSSED in str(value.name)]
    moved = _ancestors(crossed)
    inside = {value for node in moved for value in node.outputs}
    leaks = [value for value in inside.difference(crossed) for use in value.uses() if use.node not in moved]
    if leaks:
        raise ExportError(
            f"the decoder reads {leaks[0].name!r} beside keys and values",
            where=str(source),
            fix="Take a teacher of another family: T5, BART and Marian are known.",
        )
    asked = ir.Value(name=BRANCH, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    pasts = [_past(value) for value in crossed]
    anchor = moved[0]
    branch = ir.Node("", "If", [asked], num_outputs=len(crossed))
    graph.insert_before(anchor, branch)
    for old, new in zip(crossed, branch.outputs, strict=True):
        new.shape, new.type, new.name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = f"{new.name}.made"
    graph.remove(moved)
    copies = [ir.Node("", "Identity", [past], num_outputs=1) for past in pasts]
    for copy, past in zip(copies, pasts, strict=True):
        copy.outputs[0].name, copy.outputs[0].type = f"{past.name}.kept", past.type
    weights = _taken(graph, moved)
    kept = ir.Graph([], [copy.outputs[0] for copy in copies], nodes=copies, name="kept")
    made = ir.Graph([], crossed, nodes=moved, initializers=weights, name="made")
    for name, body in (("then_branch", kept), ("else_branch", made)):
        branch.attributes[name] = ir.AttrGraph(name, body)
    graph.inputs.extend([*pasts, asked])


def _taken(graph: ir.Graph, moved: list[ir.Node]) -> list[ir.Value]:
    """Constants that `moved` alone reads, out of the graph: int8 weights become u8 in their own graph only."""
    found = dict.fromkeys(value for node in moved for value in node.inputs if value is not None)
    own = [value for value in found if value.is_initializer() and all(use.node in moved for use in value.uses())]
    for value in own:
        del graph.initializers[str(value.name)]
    return own


def _past(present: ir.Value) -> ir.Value:
    """The input that holds what was made at the first token."""
    name = str(present.name).replace("present", "past_key_values", 1)
    return ir.Value(name=name, shape=present.shape, type=ir.TensorType(ir.DataType.FLOAT))


def _ancestors(values: Iterable[ir.Value]) -> list[ir.Node]:
    """Every node that takes part in making `values`, in the order of the graph."""
    found: set[ir.Node] = set()
    pending = [value.producer() for value in values]
    graph = next((node.graph for node in pending if node is not None), None)
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found.add(node)
            pending += [value.producer() for value in node.inputs if value is not None]
    return [node for node in graph or () if node in found]


def save(model: ir.Model, path: Path) -> None:
    """Writes one file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".writing")
    ir.save(model, beside)
    os.replace(beside, path)
