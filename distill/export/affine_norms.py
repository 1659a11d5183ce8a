"""MobileBERT's norms, which are a scale and a shift, folded into the products around them before export.

A scale behind a sum, (W x + b + r) * s + t, cannot go into W alone: the residual r carries it too. So every state is
kept times the product of all scales that are still ahead of it: sums then need no scale, products that give a state
multiply it into their rows, and products that read one divide it out of their columns. The last state's product of
scales is 1, so that heads read what they always read. Exact but for rounding.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 1e-3
"""Scales nearer to 0 are left alone: dividing them out of a product would blow up what int8 has to hold."""


def fold_affine_norms(model: Any) -> Any:
    """The same model without its norms, as a copy; the model itself where its norms are others.

    Args:
        model: A transformers model of any head.
    """
    config = model.config
    ours = config.model_type == "mobilebert" and config.normalization_type == "no_norm"
    if not ours or not config.use_bottleneck or config.use_bottleneck_attention:
        return model
    if not config.key_query_shared_bottleneck or not (config.trigram_input or _narrow(config)):
        return model
    folded = copy.deepcopy(model)
    with torch.no_grad():
        encoder = folded.base_model
        ahead_H = torch.ones(config.hidden_size)
        for layer in reversed(encoder.encoder.layer):
            ahead_H = _fold_layer(layer, ahead_H)
        tables = encoder.embeddings
        scale_H = tables.LayerNorm.weight * ahead_H
        for table in (tables.position_embeddings, tables.token_type_embeddings):
            table.weight.mul_(scale_H)
        _give(tables.embedding_transformation, scale_H, tables.LayerNorm.bias * ahead_H)
        tables.LayerNorm = nn.Identity()
    return folded if all(bool(value.isfinite().all()) for value in folded.parameters()) else model


def _narrow(config: Any) -> bool:
    return bool(config.embedding_size != config.hidden_size)


def _fold_layer(layer: Any, ahead_H: Tensor) -> Tensor:
    """Folds one layer whose output is to be kept times `ahead_H` (H,); returns what its input is to be kept times."""
    before_H = _scale(layer.output.bottleneck.LayerNorm) * ahead_H
    stack = [*getattr(layer, "ffn", []), layer]  # a layer's own feed-forward is the last of the stack
    ahead_b = torch.ones(layer.output.dense.out_features)
    _behind_sum(layer.output.bottleneck, before_H, ahead_H)
    for part in reversed(stack):
        before_b = _scale(part.output.LayerNorm) * ahead_b
        _behind_sum(part.output, before_b, ahead_b)
        _take(part.intermediate.dense, before_b)
        ahead_b = before_b
    before_b = _scale(layer.attention.output.LayerNorm) * ahead_b
    _behind_sum(layer.attention.output, before_b, ahead_b)
    for part, scale_b in ((layer.bottleneck.input, before_b), (layer.bottleneck.attention, None)):
        weight, bias = part.LayerNorm.weight, part.LayerNorm.bias
        keep_b = torch.ones_like(weight) if scale_b is None else scale_b
        _give(part.dense, weight * keep_b, bias * keep_b)
        part.LayerNorm = nn.Identity()
        _take(part.dense, before_H)
    _take(layer.attention.self.value, before_H)
    return before_H


def _scale(norm: Any) -> Tensor:
    """Its scale, kept away from 0: what is moved is given back by `_behind_sum`."""
    weight: Tensor = norm.weight
    return torch.where(weight.abs() < LEAST, torch.full_like(weight, torch.nan), weight)


def _behind_sum(part: Any, before: Tensor, ahead: Tensor) -> None:
    """A product whose result is added to a state that is kept times `before`; the sum is kept times `ahead`."""
    _give(part.dense, before, part.LayerNorm.bias * ahead)
    part.LayerNorm = nn.Identity()


def _give(product: nn.Linear, scale: Tensor, shift: Tensor) -> None:
    """(W x + b) * scale + shift."""
    product.weight.mul_(scale[:, None])
    product.bias.mul_(scale).add_(shift)


def _take(product: nn.Linear, scale: Tensor) -> None:
    """Reads its input divided by `scale`."""
    product.weight.div_(scale)
