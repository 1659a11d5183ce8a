"""The matrix products of a model, as operations: what a share of the device's speed (MFU) is a share of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from distill.encoders import describe, find_encoder
from distill.errors import ObjectiveError

_BY_ROW = ("SequenceClassification", "ImageClassification")
"""Models whose head reads one vector a row."""


@dataclass(frozen=True, slots=True)
class Products:
    """What a forward pass multiplies; a way back takes twice as much again.

    Attributes:
        token: Weights that each token is multiplied with, a shared layer's once for each time it runs.
        row: Weights that one vector a row is multiplied with: a pooler's, a classifier's.
        pair: Numbers that attention multiplies for each pair of a query and a key, in all layers: 2 A d a layer.
    """

    token: int
    row: int
    pair: int

    def forward(self, rows: int, tokens: int, pairs: int) -> int:
        """Operations (a multiplication and an addition are two) of one pass over so many rows, tokens and pairs.

        Args:
            rows: Texts.
            tokens: Of all rows, padding left out.
            pairs: Sum over rows of tokens squared.
        """
        return 2 * (self.token * tokens + self.row * rows + self.pair * pairs)


def count_products(model: Any, *, learning: bool = False) -> Products:
    """The products of a transformers model; of a family that is not listed without its attention's.

    Of an encoder with a decoder both are counted for the tokens that are read, and the encoder's attention alone.

    Args:
        model: With its head.
        learning: Leave out what is frozen.
    """

    def counts(part: nn.Module) -> bool:
        return not learning or any(value.requires_grad for value in part.parameters())

    head = model.base_model_prefix + "."
    token = row = 0
    for name, part in model.named_modules():
        if not isinstance(part, nn.Linear | Conv1D) or not counts(part):
            continue
        once = "pooler" in name or (type(model).__name__.endswith(_BY_ROW) and not name.startswith(head))
        row, token = (row + part.weight.numel(), token) if once else (row, token + part.weight.numel())
    try:
        shape, layers = describe(model), [layer for layer in find_encoder(model).layers if counts(layer)]
    except ObjectiveError:
        return Products(token, row, 0)
    for layer, turns in Counter(layers).items():
        products = (part for part in layer.modules() if isinstance(part, nn.Linear | Conv1D))
        token += (turns - 1) * sum(part.weight.numel() for part in products)
    return Products(token, row, 2 * shape.attention_width * len(layers))
