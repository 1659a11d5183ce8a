"""From a PyTorch model to the ONNX file: traced once, shaped by passes, whole or not there at all.

export_graph(model, task.graph(["input_ids", "attention_mask"]), Path("model.onnx"))
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from distill.attending import attending
from distill.encoders import own_config
from distill.errors import ExportError
from distill.export.passes import DEFAULT, Pass, apply_passes
from distill.features import evaluating
from distill.tasks.base import GraphSpec
from distill.teacher import position_limit

OPSET = 20
TRACED_BATCH, TRACED_LENGTH = 2, 17  # neither is 1, so that no axis is specialised; 17 is no multiple of anything
SCOPES, PREFIX = "pkg.torch.onnx.name_scopes", "model."  # where the exporter keeps module names; `_Positional.model`
SINGLE_FILE_BYTES = 2**31 - 2**20  # protobuf's limit, less room for the graph itself


@dataclass(frozen=True)
class ExportedGraph:
    """A written ONNX file.

    Attributes:
        path: Where it is.
        bytes: Its size.
        inputs: Names it has to be fed, in order.
        outputs: Names it returns, in order.
        passes: How many places each pass changed.
    """

    path: Path
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    passes: Mapping[str, int]


def export_graph(
    model: Any,
    spec: GraphSpec,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    passes: tuple[Pass, ...] = DEFAULT,
    opset: int = OPSET,
) -> ExportedGraph:
    """Writes `model` as one fp32 ONNX file with dynamic batch and length.

    Inputs that the model never reads are left out of the file: feed what its session lists.

    Args:
        model: A transformers model in fp32 on the CPU.
        spec: Inputs, outputs and what the graph adds behind the model.
        path: The file to write; replaced only once the new one is complete.
        metadata: Strings kept in the file as `metadata_props`.
        passes: What is rewritten after tracing; none gives the graph as traced.
        opset: ONNX opset of the file.

    Raises:
        ExportError: The model cannot be traced, is not in fp32, or does not fit into one file.
    """
    return export_forms(model, spec, {Path(path): passes}, metadata=metadata, opset=opset)[0]


def export_forms(
    model: Any,
    spec: GraphSpec,
    forms: Mapping[Path, tuple[Pass, ...]],
    *,
    metadata: Mapping[str, str] | None = None,
    opset: int = OPSET,
) -> list[ExportedGraph]:
    """`export_graph` of one model in several forms, traced once: tracing is what takes the time.

    Args:
        model: As there.
        spec: As there.
        forms: By the file to write, its passes.
        metadata: Of every file.
        opset: Of every file.
    """
    traced, made = trace(model, spec, opset=opset), []
    for path, passes in forms.items():
        graph = traced.clone()
        changes = apply_passes(graph, passes)
        drop_unread_inputs(graph)
        made.append(write(graph, path, metadata or {}, changes))
    return made


def trace(model: Any, spec: GraphSpec, *, opset: int = OPSET) -> ir.Model:
    """The graph as `torch.onnx` sees it, axes named, nothing rewritten."""
    _check(model)
    inputs = _sample(model, spec)
    shapes = tuple(dict.fromkeys(spec.axes[name], torch.export.Dim.DYNAMIC) for name in spec.inputs)
    try:
        with evaluating(model), _plain_attention(model), _quiet():
            program = torch.onnx.export(
                _Positional(model, spec).eval(),
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_shapes=(shapes,),  # the parameter that gathers *inputs counts as one
                external_data=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"{type(model).__name__} cannot be traced: {_first_cause(error)}",
            where="export",
            fix="Take a teacher of a family that docs/students.md names.",
        ) from error
    if program is None:
        raise ExportError(f"torch.onnx gave nothing for {type(model).__name__}", where="export", fix="Upgrade torch.")
    graph = program.model
    name_axes(graph, spec)
    name_weights(graph)
    return graph


def write(graph: ir.Model, path: Path, metadata: Mapping[str, str], changes: Mapping[str, int]) -> ExportedGraph:
    """Writes one file beside `path`, then puts it in its place."""
    graph.metadata_props.clear()
    graph.metadata_props.update(metadata)
    graph.producer_name, graph.producer_version = "distill", ""
    for node in graph.graph:  # shapes inside are inferred anew by whoever loads the file
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape, value.type = None, None
    beside = path.with_name(path.name + ".writing")
    beside.parent.mkdir(parents=True, exist_ok=True)
    ir.save(graph, beside)
    os.replace(beside, path)
    names = [[str(value.name) for value in values] for values in (graph.graph.inputs, graph.graph.outputs)]
    return ExportedGraph(path, path.stat().st_size, tuple(names[0]), tuple(names[1]), dict(changes))


def name_axes(model: ir.Model, spec: GraphSpec) -> None:
    """Calls the traced axes by the names of `spec` (torch calls them s72 and the like), everywhere, in place."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in spec.axes.get(str(value.name), {}).items():
            if value.shape is not None and isinstance(dim := value.shape[axis], ir.SymbolicDim) and dim.value:
                names[dim.value] = name
    if not names:
        return
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    for value in _values(model.graph):
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [
                pattern.sub(lambda found: names[found[0]], dim.value)
                if isinstance(dim, ir.SymbolicDim) and dim.value
                else dim
                for dim in value.shape
            ]
        )


def name_weights(model: ir.Model) -> None:
    """Calls each weight as the PyTorch model does, in place, and drops the exporter's notes.

    Transposed weights come out of the exporter as val_35, but reports need to name layers; its notes outweigh nodes.
    """
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is not None and weight.is_initializer() and len(scopes) > 1 and str(weight.name).startswith("val_"):
            _rename(model.graph, weight, f"{scopes[-2]}.weight")
        node.metadata_props.clear()
        node.doc_string = None
    for value in list(model.graph.initializers.values()):
        if str(value.name).startswith(PREFIX):
            _rename(model.graph, value, str(value.name).removeprefix(PREFIX))
    for value in _values(model.graph):
        value.metadata_props.clear()


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    if name not in graph.initializers:
        value.name = name


def drop_unread_inputs(model: ir.Model) -> None:
    """Removes inputs that no node reads, in place: a client then need not feed them."""
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)


class _Positional(nn.Module):
    """The model as the exporter wants it: tensors in, a tuple of tensors out."""

    def __init__(self, model: nn.Module, spec: GraphSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.spec.inputs, inputs, strict=True))
        if self.spec.run is not None:
            return self.spec.run(self.model, named)
        return self.spec.head(self.model(**named, return_dict=True))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _check(model: Any) -> None:
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if kinds - {torch.float32}:
        raise ExportError(
            f"weights of {type(model).__name__} are {', '.join(sorted(map(str, kinds)))}",
            where="export",
            fix="Call model.float() first: the graph is traced in fp32.",
        )
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > SINGLE_FILE_BYTES:
        raise ExportError(
            f"{size / 2**30:.1f} GB of weights do not fit into one ONNX file (at most 2 GB)",
            where="export",
            fix="Choose a smaller student.",
        )
    places = {parameter.device.type for parameter in model.parameters()}
    if places - {"cpu"}:
        raise ExportError(f"the model is on {', '.join(sorted(places))}", where="export", fix="Call model.cpu() first.")


def _sample(model: Any, spec: GraphSpec) -> tuple[Tensor, ...]:
    """One int64 tensor (2, 17) an input, all different objects, or what `spec` says; the second row ends in padding.

    A model of fewer positions is traced one short of them.
    """
    config = own_config(model.config)
    positions = position_limit(config)
    length = TRACED_LENGTH if positions is None else min(TRACED_LENGTH, positions - 1)
    if length < 2:
        raise ExportError(
            f"{type(model).__name__} has {positions} positions, and a graph of any length is traced with at least 3",
            where="export",
            fix="Take a model of more positions.",
        )
    shape = (TRACED_BATCH, length)
    vocabulary = int(getattr(config, "vocab_size", 2))
    padding = getattr(config, "pad_token_id", None) or 0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.int64)
    end = min(3, length - 1)
    mask[1, -end:], ids[1, -end:] = 0, padding
    if spec.sample is not None:
        return spec.sample(ids, mask)
    samples = {"input_ids": ids, "attention_mask": mask}
    return tuple(samples.get(name, torch.zeros(shape, dtype=torch.int64)) for name in spec.inputs)


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """Attention written out, with one additive mask (B, 1, 1, L) made before the first layer.

    Everything that transformers builds masks with goes through its table of mask functions; the entry for written-out
    attention is ours while the model is traced, so that no Where, IsNaN or GatherND chain arises in the first place.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS["eager"] = _additive_mask
    try:
        with attending(model, "eager", lambda own: own != "eager"):
            yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["eager"]


def _additive_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    attention_mask: Tensor | None = None,
    mask_function: Any = None,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    **_: Any,
) -> Tensor | None:
    """0 where a key may be seen, the lowest number where not: finite, so that a row of padding alone stays finite."""
    from transformers.masking_utils import bidirectional_mask_function

    seen = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :kv_length]
    if mask_function is not None and mask_function is not bidirectional_mask_function:
        query = torch.arange(q_length, device=device)[:, None] + q_offset
        key = torch.arange(kv_length, device=device)[None, :] + kv_offset
        near = mask_function(0, 0, query, key)[None, None]  # (1, 1, L, L): a window, causality
        seen = near if seen is None else seen & near
    if seen is None:
        return None
    return torch.where(seen, 0.0, torch.finfo(dtype).min)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what the exporter says about its own insides; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for kind in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=kind)
            for module in (r"torch\..*", r"onnxscript\..*", r"copyreg", r"transformers\..*"):
                warnings.filterwarnings("ignore", category=UserWarning, module=module)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_cause(error: BaseException) -> str:
    """Of what was first in a chain of errors: the outer ones tell of exporting. Colours are left out."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
