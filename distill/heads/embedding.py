"""A vector for a text, and how alike two texts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distill.heads.base import Array, Asked, Head, Prediction, Text, Window, refuse_others

SHOWN = 6
"""Numbers of a vector that a line shows."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """What an embedder says of one text.

    Attributes:
        vector: (H,) of length 1: the product of two is their cosine similarity.
    """

    vector: Array

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"vector": [float(value) for value in self.vector]}

    def summary(self) -> str:
        """The first numbers, and how many there are."""
        shown = " ".join(f"{value:.4f}" for value in self.vector[:SHOWN])
        return f"[{shown} ...] ({len(self.vector)} numbers)"


@dataclass(frozen=True, slots=True)
class Similarity:
    """What an embedder says of two texts.

    Attributes:
        similarity: Cosine of their vectors, in [-1, 1].
    """

    similarity: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"similarity": self.similarity}

    def summary(self) -> str:
        """The number."""
        return f"{self.similarity:.4f}"


class Embedder(Head):
    """Reads `sentence_embedding` (H,); the two texts of a pair are read apart."""

    proof: ClassVar[str] = "sentence_embedding"

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """One window a text, two for a pair.

        Raises:
            DataError: One of them is neither a string nor a pair of strings.
        """
        refuse_others(texts)
        parts = [text if isinstance(text, tuple) else (text,) for text in texts]
        found = iter(super().windows(tokenizer, [one for row in parts for one in row]))
        return [[next(found)[0] for _ in row] for row in parts]

    def prefixed(self, text: Text, prefix: str) -> Text:
        """Both texts of a pair are read apart, so the words stand before both."""
        if isinstance(text, tuple):
            return tuple(super(Embedder, self).prefixed(part, prefix) for part in text)
        return super().prefixed(text, prefix)

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Prediction:
        """The vector of a text, or the similarity of two."""
        vectors = [outputs[self.proof] for outputs in asked.outputs]
        if len(vectors) == 1:
            return Embedding(vectors[0])
        return Similarity(float(np.dot(vectors[0], vectors[1])))
