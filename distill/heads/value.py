"""One number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from distill.heads.base import Asked, Head


@dataclass(frozen=True, slots=True)
class Value:
    """What a regression says of one text.

    Attributes:
        value: In the units of the training data.
    """

    value: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"value": self.value}

    def summary(self) -> str:
        """The number."""
        return f"{self.value:.4f}"


class Regressor(Head):
    """Reads `value`, one number a text."""

    proof: ClassVar[str] = "value"
    counts: ClassVar[bool] = True

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Value:
        """The number as it is."""
        return Value(float(asked.outputs[0]["value"]))
