"""What an encoder with a decoder writes for a text, or how likely it finds a text that is given with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.heads.base import Array, Asked, Head, Text, Window, encode_texts, refuse_others


@dataclass(frozen=True, slots=True)
class Source(Window):
    """A text with what may have been made of it.

    Attributes:
        target: Token ids of the text that came of it; None where that is to be written.
        tokenizer: Of tokenizers.
    """

    target: Sequence[int] | None
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Translation:
    """What came of one text.

    Attributes:
        text: What was written; of a pair, what was given.
        likelihood: Of a pair, the geometric mean of the probabilities of its tokens; else None.
    """

    text: str | None
    likelihood: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"output": self.text, "likelihood": self.likelihood}

    def summary(self) -> str:
        """The text, on one line."""
        text = " ".join((self.text or "").split())
        return text if self.likelihood is None else f"{text}\t{self.likelihood:.4f}"


class Translator(Head):
    """Reads `logits` (T, V) where a target is given with the text; else asks for what the bundle writes."""

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """One window a text; a text that is too long loses its end.

        Raises:
            DataError: One of them is neither a string nor a pair of strings.
        """
        refuse_others(texts)
        sources = encode_texts(tokenizer, [text[0] if isinstance(text, tuple) else text for text in texts])
        return [
            [
                Source(
                    found.ids,
                    found.type_ids,
                    found.offsets,
                    found.word_ids,
                    found.sequence_ids,
                    encode_texts(tokenizer, [text[1]])[0].ids if isinstance(text, tuple) else None,
                    tokenizer,
                    cut=bool(found.overflowing),
                )
            ]
            for text, found in zip(texts, sources, strict=True)
        ]

    def digest(self, window: Window, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """`chances` (T,) of a target's tokens, not a row of logits a token; nothing where there is no target."""
        return {"chances": self.prove(outputs)} if outputs else {}

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Translation:
        """The likelihood of the target where there is one, else what is written."""
        window = asked.windows[0]
        target, tokenizer = getattr(window, "target"), getattr(window, "tokenizer")  # noqa: B009  # it is a `Source`
        if target is not None:
            chances = np.maximum(asked.outputs[0]["chances"], 1e-30)
            return Translation(asked.text[1], math.exp(float(np.log(chances).mean())))
        if asked.write is None:
            return Translation(None)
        read = window.ids if window.pixels is None else window.pixels
        return Translation(tokenizer.decode(asked.write(read), skip_special_tokens=True).strip())

    def prove(self, outputs: Mapping[str, Array]) -> Array:
        """(T,) probabilities of the target's tokens, each behind those before it."""
        labels = outputs["labels"]
        logits = outputs["logits"][: len(labels)].astype(np.float64)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        chances: Array = weights[np.arange(len(labels)), labels] / weights.sum(axis=-1)
        return chances
