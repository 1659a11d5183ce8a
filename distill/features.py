"""Named taps on an encoder (first form)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    family: str
    layers: int
    width: int
    heads: int
    labels: int
    vocab: int


def describe(model: Any) -> Architecture:
    config = model.config
    return Architecture(
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_labels,
        config.vocab_size,
    )


class TappedModel:
    def __init__(self, model: Any, taps: Sequence[str]) -> None:
        self.model, self.taps = model, list(taps)
        self._accepts = set(inspect.signature(model.forward).parameters)
        self._hidden = any(tap.startswith("hidden.") for tap in taps)

    def __call__(self, batch: Mapping[str, Tensor]) -> Features:
        inputs = {k: v for k, v in batch.items() if k in self._accepts and k != "labels"}
        output = self.model(**inputs, output_hidden_states=self._hidden)
        return {
            tap: output.logits if tap == "logits" else output.hidden_states[int(tap.split(".")[1])] for tap in self.taps
        }
