"""One number for a sentence or a pair of sentences: ratings, similarities, prices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distill.tasks.base import GraphSpec
from distill.tasks.encoded import Array, Encoded
from distill.tasks.text_classification import TextClassification

CLOSE = 0.1
"""Two models agree where their numbers differ by less than this share of the first one's deviation."""


class Regression(TextClassification):
    """Sentence and sentence-pair regression with one output."""

    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "spearman"
    losses: ClassVar[Mapping[str, str]] = {"soft_labels": "regression", "hard_labels": "regression_labels"}
    problems: ClassVar[tuple[str | None, ...]] = ("regression",)
    problem: ClassVar[str | None] = "regression"
    outputs: ClassVar[int | None] = 1
    target: ClassVar[str] = "number"
    named: ClassVar[bool] = False

    def configure(self, config: Any, labels: Sequence[str]) -> None:
        """One output."""
        super().configure(config, ["value"])

    def number(self, label: Any, numbers: Mapping[str, int]) -> Any:
        """The number; nan where there is none."""
        return math.nan if label is None else float(label)

    def _labels(self, labels: Sequence[Any]) -> Array:
        return np.array(labels, np.float32)

    def labelled(self, encoded: Encoded) -> bool:
        """Some row has a number to compare with."""
        return not bool(np.isnan(encoded.flat["labels"]).all())

    def spread(self, encoded: Encoded) -> float:
        """The labels' deviation, with a thousandth of their mean: fp32 rounds by what is far from 0."""
        labels = encoded.flat["labels"].astype(np.float64)
        return float(np.nanstd(labels) + 1e-3 * abs(np.nanmean(labels))) or 1.0

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Spearman's and Pearson's correlation, 0 where all numbers are the same, and the root mean square error."""
        from scipy.stats import pearsonr, spearmanr

        gold = encoded.flat["labels"].astype(np.float64)
        known = ~np.isnan(gold)
        gold, said = gold[known], outputs["value"][known].astype(np.float64)
        told_apart = len(gold) > 1 and gold.std() > 0 and said.std() > 1e-9 * max(1.0, float(np.abs(said).max()))
        return {
            "spearman": float(spearmanr(gold, said).statistic) if told_apart else 0.0,
            "pearson": float(pearsonr(gold, said).statistic) if told_apart else 0.0,
            "rmse": float(np.sqrt(np.mean((gold - said) ** 2))),
        }

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`logits` (B, 1) first, then the same as `value` (B,)."""
        names = tuple(inputs)
        axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "length"} for name in names}
        axes |= {name: {0: "batch"} for name in ("logits", "value")}

        def head(output: Any) -> tuple[Any, ...]:
            return output.logits, output.logits.squeeze(-1)

        return GraphSpec(names, ("logits", "value"), head, axes)

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Logits in fp32 and the value."""
        logits = np.asarray(outputs["logits"], np.float32)
        return {"logits": logits, "value": logits[..., 0]}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """The numbers."""
        return outputs["value"]

    def agreement(self, one: Array, other: Array) -> float:
        """Share of rows whose numbers differ by at most `CLOSE` deviations of the first, or by rounding in fp32."""
        return float((np.abs(one - other) <= np.maximum(CLOSE * one.std(), 1e-6 * np.abs(one))).mean())

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """The number of each row."""
        return [("value", float(value)) for value in outputs["value"]]

    def apart(self, one: tuple[str, float], other: tuple[str, float]) -> float:
        """The distance of two numbers."""
        return abs(one[1] - other[1])

    def gold(self, encoded: Encoded) -> list[str | None]:
        """The gold numbers."""
        return [None if math.isnan(value) else f"{value:.2f}" for value in encoded.flat["labels"]]
