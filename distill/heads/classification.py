"""One label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.heads.base import Asked, Head


@dataclass(frozen=True, slots=True)
class Label:
    """What a classifier says of one text.

    Attributes:
        label: The most probable label.
        probability: Of that label, in [0, 1].
        probabilities: Of every label.
    """

    label: str
    probability: float
    probabilities: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"label": self.label, "probability": self.probability, "probabilities": self.probabilities}

    def summary(self) -> str:
        """Label and probability."""
        return f"{self.label}\t{self.probability:.4f}"


class Classifier(Head):
    """Reads `probabilities` (C,)."""

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Label:
        """The most probable label, and the probability of each."""
        row = asked.outputs[0]["probabilities"]
        return Label(labels[int(row.argmax())], float(row.max()), dict(zip(labels, map(float, row), strict=True)))
