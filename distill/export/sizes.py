"""Where the bytes of a file are: embeddings, each layer, the head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

_LAYER = re.compile(r"\b(?:layers?|layer_groups|albert_layer_groups|block|blocks|h)\.(\d+(?:\+\d+)*)\.")
_HALF = re.compile(r"\b(encoder|decoder|text_model|vision_model)\.")
_TABLE = re.compile(r"embedding|\b(?:embed_tokens|embed_positions|wte|wpe|shared|relative_attention_bias)\b")
_NAMED = re.compile(r"(?:(\w+) )?layer (\d+)")
_HALVES = {"": "", "encoder": "encoder", "text_model": "text", "decoder": "decoder", "vision_model": "image"}
_CROSS = "cross-attention"


@dataclass(frozen=True)
class Component:
    """A part of the model and what it weighs in the file.

    Attributes:
        name: `embeddings`, `layer 1` and so on from 1, `head`, or `graph` for what holds no weights. Where there are
            two halves, `encoder layer 1` and `decoder layer 1`, or `text layer 1` and `image layer 1`;
            `cross-attention` is what makes keys and values of the encoder's states for all layers of the decoder.
        bytes: Of its constants.
    """

    name: str
    bytes: int


def components(model: ir.Model | Path) -> tuple[Component, ...]:
    """Bytes of the constants of a graph by component, in the order embeddings, layers, head, graph."""
    if isinstance(model, Path):
        model = ir.load(model)
    constants = {
        str(value.name): value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }
    halved = len({_half(name) for name in constants if _LAYER.search(name)}) > 1
    found: dict[str, int] = {}
    for constant, size in constants.items():
        name = component_of(constant, halved=halved)
        found[name] = found.get(name, 0) + size
    return tuple(Component(name, found[name]) for name in sorted(found, key=_place))


def component_of(name: str, *, halved: bool = False) -> str:
    """The component that a constant belongs to, by the name of its module; a layer's half is told where `halved`."""
    if layer := _LAYER.search(name):
        if "+" in layer[1]:
            return _CROSS
        return f"{_half(name) if halved else ''} layer {int(layer[1]) + 1}".strip()
    if _TABLE.search(name):
        return "embeddings"
    return "head" if "." in name else "graph"


def _half(name: str) -> str:
    half = _HALF.search(name)
    return _HALVES[half[1] if half else ""]


def _place(name: str) -> tuple[int, int, int]:
    if layer := _NAMED.fullmatch(name):
        return 1, list(_HALVES.values()).index(layer[1] or ""), int(layer[2])
    return {"embeddings": 0, _CROSS: 2, "head": 3}.get(name, 4), 0, 0
