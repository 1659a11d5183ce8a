"""Where the bytes of a file are: embeddings, each layer, the head."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

_LAYER = re.compile(r"\b(?:layers?|layer_groups|albert_layer_groups|block|blocks|h)\.(\d+)\.")


@dataclass(frozen=True)
class Component:
    """A part of the model and what it weighs in the file.

    Attributes:
        name: `embeddings`, `layer 1` and so on from 1, `head`, or `graph` for what holds no weights.
        bytes: Of its constants.
    """

    name: str
    bytes: int


def components(model: ir.Model | Path) -> tuple[Component, ...]:
    """Bytes of the constants of a graph by component, in the order embeddings, layers, head, graph."""
    if isinstance(model, Path):
        model = ir.load(model)
    found: dict[str, int] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            name = component_of(str(value.name))
            found[name] = found.get(name, 0) + value.const_value.nbytes
    return tuple(Component(name, found[name]) for name in sorted(found, key=_place))


def component_of(name: str) -> str:
    """The component that a constant belongs to, by the name of its module."""
    if layer := _LAYER.search(name):
        return f"layer {int(layer[1]) + 1}"
    if "embedding" in name or "relative_attention_bias" in name:
        return "embeddings"
    return "head" if "." in name else "graph"


def _place(name: str) -> tuple[int, int]:
    if name.startswith("layer "):
        return 1, int(name.removeprefix("layer "))
    return {"embeddings": 0, "head": 2}.get(name, 3), 0
