"""A decoder's graph with what it remembers: keys and values of the tokens before go in, those of all tokens come out.

Names and shapes are those of optimum's exports, which transformers.js and ONNX Runtime's clients feed:
`past_key_values.0.key` (B, heads, P, width of a head) in, `present.0.key` (B, heads, P + L, ...) out. At the first call
P is 0. `attention_mask` covers past and new tokens, (B, P + L); `position_ids` (B, L) number the new ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from distill.tasks.base import GraphSpec

PAST, PRESENT = "past_key_values", "present"
KINDS = ("key", "value")
ROWS = "batch_size"
"""Name of the first axis: transformers.js makes the first, empty past by it."""
TRACED_PAST = 5
"""Tokens before, while the graph is traced: no length that anything else has."""


def with_past(spec: GraphSpec, model: Any) -> GraphSpec:
    """The graph of a decoder that reads and returns keys and values; `spec` without them names its other outputs.

    Args:
        spec: Inputs `input_ids` and `attention_mask`, and what the graph returns first.
        model: A transformers model that writes from left to right.
    """
    layers = _layers(model.config)
    remembered = [f"{number}.{kind}" for number in range(layers) for kind in KINDS]
    positions = ["position_ids"] if "position_ids" in inspect.signature(model.forward).parameters else []
    names = (*spec.inputs, *positions, *(f"{PAST}.{name}" for name in remembered))
    outputs = (*spec.outputs, *(f"{PRESENT}.{name}" for name in remembered))
    axes = {name: {0: ROWS, 1: "length"} for name in (*spec.inputs, *positions, *spec.outputs)}
    axes["attention_mask"] = {0: ROWS, 1: "total_length"}
    axes |= {f"{PAST}.{name}": {0: ROWS, 2: "past_length"} for name in remembered}
    axes |= {f"{PRESENT}.{name}": {0: ROWS, 2: "total_length"} for name in remembered}

    def run(model: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
        taken = {name: value for name, value in values.items() if not name.startswith(PAST)}
        pasts = [tuple(values[f"{PAST}.{number}.{kind}"] for kind in KINDS) for number in range(layers)]
        output = model(**taken, past_key_values=_cache(pasts), use_cache=True, return_dict=True)
        kept = [value for layer in output.past_key_values.layers for value in (layer.keys, layer.values)]
        return (*spec.head(output), *kept)

    return GraphSpec(names, outputs, spec.head, axes, run, lambda ids, mask: _samples(model.config, names, ids, mask))


def _layers(config: Any) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _cache(pasts: list[tuple[Any, ...]]) -> Any:
    """What a transformers model takes for its past."""
    from transformers.cache_utils import Cache, DynamicLayer

    layers = []
    for keys, values in pasts:
        layer = DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
        layer.is_initialized = True
        layers.append(layer)
    return Cache(layers=layers)


def _samples(config: Any, names: tuple[str, ...], ids: Any, mask: Any) -> tuple[Any, ...]:
    """One tensor an input, all different objects: `TRACED_PAST` tokens before `ids` (B, L)."""
    import torch

    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows, length = ids.shape
    generator = torch.Generator().manual_seed(0)
    known = {
        "input_ids": ids,
        "attention_mask": torch.cat([torch.ones(rows, TRACED_PAST, dtype=torch.int64), mask], dim=1),
        "position_ids": torch.arange(TRACED_PAST, TRACED_PAST + length).expand(rows, -1).contiguous(),
    }
    shape = (rows, heads, TRACED_PAST, width)
    return tuple(known[name] if name in known else torch.randn(shape, generator=generator) for name in names)
