"""The graph of an image encoder with a decoder behind it, and of what the decoder remembers.

One graph is traced, proved and quantised; `distill.export.captioner` then cuts it in two. The past has the names that
transformers.js makes of `config.decoder`: `past_key_values.0.key` (B, heads, P, width of a head) where a decoder also
stands alone, such as GPT-2, `past_key_values.0.decoder.key` where it does not, such as TrOCR's. Keys and values of
the image come out as `present.0.encoder.key` (B, heads, L, width of a head), for the cut to find.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.tasks.base import GraphSpec
from distill.tasks.image_classification import blank, image_shape
from distill.tasks.past import KINDS, PAST, PRESENT, ROWS, TRACED_PAST

TRACED_NEW = 3
"""Tokens now, while the graph is traced: no length that anything else has."""


def with_memory(spec: GraphSpec, model: Any) -> GraphSpec:
    """The graph of `model` that reads and returns keys and values.

    Args:
        spec: Inputs, `decoder_input_ids` last, and `logits`.
        model: A VisionEncoderDecoderModel.
    """
    decoder = model.config.decoder
    layers, infix = int(decoder.num_hidden_layers), ".decoder" if hasattr(decoder, "decoder_layers") else ""
    own = [f"{number}{infix}.{kind}" for number in range(layers) for kind in KINDS]
    crossed = [f"{number}.encoder.{kind}" for number in range(layers) for kind in KINDS]
    names = (*spec.inputs, *(f"{PAST}.{name}" for name in own))
    outputs = (*spec.outputs, *(f"{PRESENT}.{name}" for name in (*own, *crossed)))
    axes: dict[str, Mapping[int, str]] = dict(spec.axes)
    axes |= {f"{PAST}.{name}": {0: ROWS, 2: "past_length"} for name in own}
    axes |= {f"{PRESENT}.{name}": {0: ROWS, 2: "total_length"} for name in own}
    axes |= {f"{PRESENT}.{name}": {0: ROWS} for name in crossed}

    def run(model: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        taken = {name: value for name, value in values.items() if not name.startswith(PAST)}
        past = [values[f"{PAST}.{name}"] for name in own]
        if infix:  # TrOCR's attention wants a mask for each row
            rows, length = taken["decoder_input_ids"].shape
            taken["decoder_attention_mask"] = past[0].new_ones(rows, past[0].shape[2] + length)
        memory = EncoderDecoderCache(DynamicCache(list(zip(past[::2], past[1::2], strict=True))), DynamicCache())
        output = model(**taken, past_key_values=memory, use_cache=True, return_dict=True)
        halves = (output.past_key_values.self_attention_cache, output.past_key_values.cross_attention_cache)
        kept = [value for half in halves for layer in half.layers for value in (layer.keys, layer.values)]
        return (*spec.head(output), *kept)

    return GraphSpec(names, outputs, spec.head, axes, run, lambda ids, mask: _samples(model.config, names, ids))


def _samples(config: Any, names: tuple[str, ...], ids: Any) -> tuple[Any, ...]:
    """One tensor an input, all different objects."""
    import torch

    heads, width = int(config.decoder.num_attention_heads), int(config.decoder.hidden_size)
    generator = torch.Generator().manual_seed(0)
    shown = torch.randint(0, int(config.decoder.vocab_size), (len(ids), TRACED_NEW), generator=generator)
    known = {"pixel_values": blank(ids, image_shape(config.encoder)), "decoder_input_ids": shown}
    shape = (len(ids), heads, TRACED_PAST, width // heads)
    return tuple(known[name] if name in known else torch.randn(shape, generator=generator) for name in names)
