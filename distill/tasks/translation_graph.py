"""The graph of an encoder with a decoder behind it, and of what the decoder remembers.

One graph is traced, proved and quantised; `distill.export.encoder_decoder` then cuts it into the two files that clients
expect. `past_key_values.0.decoder.key` (B, heads, P, width of a head) goes in, `present.0.decoder.key` with the new
tokens comes out, and so do the keys and values that the decoder makes of the encoder's states,
`present.0.encoder.key` (B, heads, L, width of a head). At the first call P is 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.tasks.base import GraphSpec
from distill.tasks.past import KINDS, PAST, PRESENT, ROWS

STATES = "encoder_last_hidden_state"
TRACED_PAST, TRACED_NEW = 5, 3
"""Tokens written before, and now, while the graph is traced: lengths that nothing else has."""


def with_memory(spec: GraphSpec, model: Any) -> GraphSpec:
    """The graph of `model` that reads and returns keys and values.

    Args:
        spec: Inputs, `decoder_input_ids` last, and `logits`.
        model: An encoder-decoder of transformers.
    """
    config = model.config
    layers = int(getattr(config, "num_decoder_layers", 0) or config.decoder_layers)
    own = [f"{number}.decoder.{kind}" for number in range(layers) for kind in KINDS]
    crossed = [f"{number}.encoder.{kind}" for number in range(layers) for kind in KINDS]
    names = (*spec.inputs, *(f"{PAST}.{name}" for name in own))
    outputs = (*spec.outputs, STATES, *(f"{PRESENT}.{name}" for name in (*own, *crossed)))
    axes: dict[str, Mapping[int, str]] = dict(spec.axes) | {STATES: {0: ROWS, 1: "length"}}
    axes |= {f"{PAST}.{name}": {0: ROWS, 2: "past_length"} for name in own}
    axes |= {f"{PRESENT}.{name}": {0: ROWS, 2: "total_length"} for name in own}
    axes |= {f"{PRESENT}.{name}": {0: ROWS, 2: "length"} for name in crossed}

    def run(model: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        taken = {name: value for name, value in values.items() if not name.startswith(PAST)}
        pasts = [tuple(values[f"{PAST}.{number}.decoder.{kind}"] for kind in KINDS) for number in range(layers)]
        memory = EncoderDecoderCache(DynamicCache(pasts), DynamicCache())
        output = model(**taken, past_key_values=memory, use_cache=True, return_dict=True)
        halves = (output.past_key_values.self_attention_cache, output.past_key_values.cross_attention_cache)
        kept = [value for half in halves for layer in half.layers for value in (layer.keys, layer.values)]
        return (*spec.head(output), output.encoder_last_hidden_state, *kept)

    return GraphSpec(names, outputs, spec.head, axes, run, lambda ids, mask: _samples(config, names, ids, mask))


def _samples(config: Any, names: tuple[str, ...], ids: Any, mask: Any) -> tuple[Any, ...]:
    """One tensor an input, all different objects."""
    import torch

    heads = int(getattr(config, "decoder_attention_heads", 0) or config.num_attention_heads)
    width = int(getattr(config, "d_kv", 0) or config.hidden_size // heads)
    generator = torch.Generator().manual_seed(0)
    known = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :TRACED_NEW].clone()}
    shape = (len(ids), heads, TRACED_PAST, width)
    return tuple(known[name] if name in known else torch.randn(shape, generator=generator) for name in names)
