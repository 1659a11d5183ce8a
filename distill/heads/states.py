"""One vector for each token: what a task-agnostic encoder gives to whatever is built on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distill.heads.base import Array, Asked, Head


@dataclass(frozen=True, slots=True)
class States:
    """What an encoder says of one text.

    Attributes:
        vectors: (L, H) fp32, special tokens included.
    """

    vectors: Array

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"vectors": self.vectors.tolist()}

    def summary(self) -> str:
        """Tokens and width: the vectors themselves are for programs."""
        return f"{self.vectors.shape[0]} tokens, {self.vectors.shape[1]} wide"


class Encoder(Head):
    """Reads `last_hidden_state` (L, H)."""

    proof: ClassVar[str] = "mean_state"

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> States:
        """The states as they are."""
        return States(asked.outputs[0]["last_hidden_state"])

    def prove(self, outputs: Mapping[str, Array]) -> Array:
        """The mean over the tokens, brought to a root mean square of 1."""
        mean = outputs["last_hidden_state"].astype(np.float64).mean(axis=0)
        return np.asarray(mean / np.sqrt(np.mean(mean**2) + 1e-12))
