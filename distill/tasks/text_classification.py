"""One label for a sentence or a pair of sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from distill.tasks.base import GraphSpec, Task
from distill.tasks.encoded import NO_LABEL, Array, Batch, Encoded, Padding, pack, pad_columns, softmax


class TextClassification(Task):
    """Sentence and sentence-pair classification with one label a row."""

    name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metric: ClassVar[str] = "accuracy"
    preset: ClassVar[str] = "logits+hidden"
    suffixes: ClassVar[tuple[str, ...]] = ("ForSequenceClassification",)
    problems: ClassVar[tuple[str | None, ...]] = (None, "single_label_classification")
    pairs: ClassVar[Literal["allowed", "required", "none"]] = "allowed"
    augments: ClassVar[bool] = True

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids, cut to `max_length`; `labels` is -100 where a row has none."""
        texts = list(rows["text"])
        pairs = list(rows["text_pair"]) if rows.get("text_pair") is not None else None
        tokens = tokenizer(texts, pairs, truncation=True, max_length=max_length, return_attention_mask=False)
        encodings = tokens.encodings
        cut = sum(bool(encoding.overflowing) for encoding in encodings)
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        return pack({name: tokens[name] for name in names}, {"labels": self._labels(rows["label"])}, cut)

    def _labels(self, labels: Sequence[Any]) -> Array:
        """The column `labels`, an entry a row."""
        return np.array([NO_LABEL if label is None else int(label) for label in labels], np.int64)

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """input_ids, attention_mask, token_type_ids (B, L); labels, scored, example (B,)."""
        batch = pad_columns(rows, padding)
        batch["labels"] = np.array([row["labels"] for row in rows])
        batch["scored"] = np.ones(len(rows), bool)
        return batch

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Accuracy, and F1 averaged over the classes that occur, over labelled rows."""
        from sklearn.metrics import accuracy_score, f1_score

        labels = encoded.flat["labels"]
        known = labels != NO_LABEL
        chosen = outputs["logits"].argmax(axis=-1)[known]
        return {
            "accuracy": float(accuracy_score(labels[known], chosen)),
            "macro_f1": float(f1_score(labels[known], chosen, average="macro", zero_division=0.0)),
        }

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`logits` (B, C) first, then their softmax as `probabilities`."""
        names = tuple(inputs)
        axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "length"} for name in names}
        axes |= {name: {0: "batch"} for name in ("logits", "probabilities")}

        def head(output: Any) -> tuple[Any, ...]:
            return output.logits, output.logits.softmax(-1)

        return GraphSpec(names, ("logits", "probabilities"), head, axes)

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Logits in fp32 and their softmax."""
        logits = np.asarray(outputs["logits"], np.float32)
        return {"logits": logits, "probabilities": softmax(logits)}
