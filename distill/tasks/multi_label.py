"""Any number of labels for a sentence or a pair of sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distill.heads.multi_label import THRESHOLD
from distill.tasks.base import GraphSpec
from distill.tasks.encoded import Array, Encoded
from distill.tasks.text_classification import TextClassification

ENOUGH = 20
"""Rows with a label that a threshold of its own takes: fewer choose by chance."""


class MultiLabelClassification(TextClassification):
    """Each label is decided on its own, by a threshold chosen on validation data that ships with the model."""

    name: ClassVar[str] = "multi-label"
    metric: ClassVar[str] = "micro_f1"
    losses: ClassVar[Mapping[str, str]] = {"soft_labels": "soft_labels_multilabel", "hard_labels": "multilabel_labels"}
    problems: ClassVar[tuple[str | None, ...]] = ("multi_label_classification",)
    problem: ClassVar[str | None] = "multi_label_classification"
    target: ClassVar[str] = "classes"

    def number(self, label: Any, numbers: Mapping[str, int]) -> Any:
        """1.0 for each label that applies, else 0.0; nan for all where there are none given."""
        if label is None:
            return [math.nan] * len(numbers)
        return [float(name in label) for name in numbers]

    def _labels(self, labels: Sequence[Any]) -> Array:
        return np.array(labels, np.float32)

    def labelled(self, encoded: Encoded) -> bool:
        """Some row has labels to compare with."""
        return not bool(np.isnan(encoded.flat["labels"]).all())

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """F1 over all decisions (micro) and averaged over labels (macro), and the share of rows that are all right."""
        from sklearn.metrics import accuracy_score, f1_score

        known = ~np.isnan(encoded.flat["labels"]).any(axis=1)
        gold = encoded.flat["labels"][known].astype(bool)
        said = self.answers(outputs, encoded, settings)[known]
        return {
            "micro_f1": float(f1_score(gold, said, average="micro", zero_division=0.0)),
            "macro_f1": float(f1_score(gold, said, average="macro", zero_division=0.0)),
            "exact": float(accuracy_score(gold, said)),
        }

    def calibrate(self, outputs: Mapping[str, Array], encoded: Encoded) -> dict[str, Any]:
        """For each label the threshold with the best F1 on these rows; rare ones share the best for all decisions."""
        known = ~np.isnan(encoded.flat["labels"]).any(axis=1)
        gold, said = encoded.flat["labels"][known].astype(bool), outputs["probabilities"][known]
        shared = best_threshold(gold.reshape(-1), said.reshape(-1))
        own = [best_threshold(gold[:, label], said[:, label]) for label in range(gold.shape[1])]
        often = gold.sum(axis=0) >= ENOUGH
        return {"thresholds": [one if enough else shared for one, enough in zip(own, often, strict=True)]}

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`logits` (B, C) first, then their sigmoid as `probabilities`."""
        spec = super().graph(inputs)

        def head(output: Any) -> tuple[Any, ...]:
            return output.logits, output.logits.sigmoid()

        return GraphSpec(spec.inputs, spec.outputs, head, spec.axes)

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Logits in fp32 and their sigmoid."""
        logits = np.asarray(outputs["logits"], np.float32)
        return {"logits": logits, "probabilities": 1.0 / (1.0 + np.exp(-np.clip(logits, -80.0, 80.0)))}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """Which labels reach their thresholds, (N, C) bool."""
        least = np.array((settings or {}).get("thresholds") or THRESHOLD, np.float32)
        return np.asarray(outputs["probabilities"] >= least)

    def agreement(self, one: Array, other: Array) -> float:
        """Share of rows with the same set of labels."""
        return float((one == other).all(axis=1).mean())

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """The labels of each row, and the probability of the decision that is least sure."""
        chosen = self.answers(outputs, encoded, settings)
        sure = np.where(chosen, outputs["probabilities"], 1.0 - outputs["probabilities"]).min(axis=1)
        return [(self._names(row, encoded), float(least)) for row, least in zip(chosen, sure, strict=True)]

    def gold(self, encoded: Encoded) -> list[str | None]:
        """The gold labels of each row."""
        return [None if np.isnan(row).any() else self._names(row > 0, encoded) for row in encoded.flat["labels"]]

    def _names(self, chosen: Array, encoded: Encoded) -> str:
        return ", ".join(name for name, there in zip(encoded.names, chosen, strict=True) if there) or "-"


def best_threshold(gold: Array, probabilities: Array) -> float:
    """The threshold with the best F1, halfway between neighbours; 0.5 where no row has the label.

    Args:
        gold: (N,) bool.
        probabilities: (N,).
    """
    if not gold.any():
        return THRESHOLD
    order = np.argsort(-probabilities, kind="stable")
    said, right = probabilities[order], np.cumsum(gold[order])
    f1 = 2.0 * right / (np.arange(1, len(gold) + 1) + gold.sum())
    f1[:-1][said[:-1] == said[1:]] = 0.0  # a threshold cannot part equals
    best = int(f1.argmax())
    below = float(said[best + 1]) if best + 1 < len(said) else 0.0
    return (float(said[best]) + below) / 2.0
