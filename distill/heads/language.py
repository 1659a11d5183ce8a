"""How a text goes on, what may come next in it, and how surprising it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distill.errors import DataError
from distill.heads.base import Array, Asked, Head, Text, Window, encode_texts

MOST = 5
"""Next tokens that are told."""


@dataclass(frozen=True, slots=True)
class Prompt(Window):
    """A part of a text with the tokenizer that can read its ids.

    Attributes:
        tokenizer: Of tokenizers.
    """

    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a language model says of one text.

    Attributes:
        next: The most probable next tokens, as text, with their probabilities.
        perplexity: Of the text; None of a single token.
        text: What it writes behind the text; None where it was asked for nothing.
    """

    next: list[tuple[str, float]]
    perplexity: float | None
    text: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        found = [{"text": text, "probability": probability} for text, probability in self.next]
        return {"continuation": self.text, "next": found, "perplexity": self.perplexity}

    def summary(self) -> str:
        """What it writes, or else the next tokens with their probabilities."""
        if self.text is not None:
            return " ".join(self.text.split())
        return "; ".join(f"{text!r} {probability:.4f}" for text, probability in self.next)


class Writer(Head):
    """Reads `logits` (L, V); those of the last token say what comes next.

    The proof is how probable each token was but the first, and how probable the most probable next one is: (L,).
    """

    goes_on: ClassVar[bool] = True

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """The parts of each text, one behind the other.

        Raises:
            DataError: One of them is no string, or has no token.
        """
        rows: list[list[Window]] = [
            [_prompt(part, tokenizer) for part in _parts(found)] for found in encode_texts(tokenizer, texts)
        ]
        for row, parts in enumerate(rows):
            if not parts:
                raise DataError("it has no token to go on from", where=f"text {row}", fix="Give at least a word.")
        return rows

    def digest(self, window: Window, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """`surprises` (L - 1,), and the `best` tokens behind the last one with their `chances`: no logits."""
        chances = _chances(outputs["logits"][-1])
        best = np.argsort(-chances, kind="stable")[:MOST]
        return {"surprises": _surprises(window.ids, outputs["logits"]), "best": best, "chances": chances[best]}

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Continuation:
        """What is written, the most probable next tokens, and the text's perplexity."""
        last = asked.outputs[-1]
        tokenizer = getattr(asked.windows[-1], "tokenizer")  # noqa: B009  # its windows are `Prompt`s
        told = [
            (tokenizer.decode([int(one)], skip_special_tokens=False), float(chance))
            for one, chance in zip(last["best"], last["chances"], strict=True)
        ]
        every = np.concatenate([said["surprises"] for said in asked.outputs])
        new = asked.write(_whole(asked.windows)) if asked.write else None
        text = None if new is None else tokenizer.decode(new, skip_special_tokens=True)
        return Continuation(told, math.exp(float(every.mean())) if len(every) else None, text)

    def prove(self, outputs: Mapping[str, Array]) -> Array:
        """(L,) probabilities: of each token that came, then of the most probable next one."""
        came = np.exp(-_surprises(outputs["input_ids"].tolist(), outputs["logits"]))
        return np.append(came, _chances(outputs["logits"][-1]).max())


def _chances(logits: Array) -> Array:
    """(V,) probabilities."""
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(weights / weights.sum())


def _parts(encoding: Any) -> list[Any]:
    return [part for part in (encoding, *encoding.overflowing) if part.ids]


def _whole(windows: Sequence[Window]) -> list[int]:
    """The ids of the text as one: each of several parts has special tokens of its own around it."""
    first, last = windows[0], windows[-1]
    inside = [[place for place, text in enumerate(one.sequences) if text is not None] for one in windows]
    if len(windows) == 1 or not all(inside):
        return list(first.ids)
    text = [one.ids[place] for one, places in zip(windows, inside, strict=True) for place in places]
    return [*first.ids[: inside[0][0]], *text, *last.ids[inside[-1][-1] + 1 :]]


def _prompt(encoding: Any, tokenizer: Any) -> Prompt:
    return Prompt(
        encoding.ids, encoding.type_ids, encoding.offsets, encoding.word_ids, encoding.sequence_ids, tokenizer
    )


def _surprises(ids: Sequence[int], logits: Array) -> Array:
    """-log of the probability of each token but the first."""
    before = logits[:-1].astype(np.float64)
    shifted = before - before.max(axis=-1, keepdims=True)
    came: Array = shifted[np.arange(len(before)), np.array(ids[1:], np.int64)]
    return np.asarray(np.log(np.exp(shifted).sum(axis=-1)) - came)
