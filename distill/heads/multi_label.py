"""Any number of labels for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill.heads.base import Asked, Head

THRESHOLD = 0.5
"""Where none was chosen on validation data."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What a multi-label classifier says of one text.

    Attributes:
        labels: Those whose probability reaches their threshold, in the bundle's order; there may be none.
        probabilities: Of every label, each on its own in [0, 1].
    """

    labels: list[str]
    probabilities: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"labels": self.labels, "probabilities": self.probabilities}

    def summary(self) -> str:
        """Each label with its probability."""
        return "; ".join(f"{name} {self.probabilities[name]:.4f}" for name in self.labels) or "-"


class MultiLabel(Head):
    """Reads `probabilities` (C,); `settings["thresholds"]` has one for each label."""

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Labels:
        """The labels that reach their thresholds, and the probability of each."""
        row = [float(value) for value in asked.outputs[0]["probabilities"]]
        thresholds = settings.get("thresholds") or [THRESHOLD] * len(labels)
        chosen = [name for name, value, least in zip(labels, row, thresholds, strict=True) if value >= least]
        return Labels(chosen, dict(zip(labels, row, strict=True)))
