"""Answers that stand in a text: the best span, the next best ones, and whether there is one at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from distill.errors import DataError
from distill.heads.base import Array, Asked, Head, Text, Window, encode_texts, window

STRIDE = 0.25
"""Share of a window that the next one repeats."""

QUESTION = 0.5
"""Share of a window that the question may take; more of it is cut off."""

LONGEST = 30
"""Tokens of an answer at most."""

BEST = 20
"""Starts and ends of each window that are tried with each other."""


@dataclass(frozen=True, slots=True)
class Span:
    """One place that may be the answer.

    Attributes:
        start: Character of the context at which it begins.
        end: The character behind it.
        score: Logit of its first token as a start and of its last as an end, added.
    """

    start: int
    end: int
    score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says to a question.

    Attributes:
        text: The answer as it stands in the context; empty where there is none.
        start: Character of the context at which it begins.
        end: The character behind it.
        probability: Among the candidates and no answer, in [0, 1].
        none: Probability that there is no answer, among the same.
        candidates: (text, start, end, probability), the best first.
    """

    text: str
    start: int
    end: int
    probability: float
    none: float
    candidates: list[tuple[str, int, int, float]]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values; the answer under `answer`, since `text` is the question beside it."""
        names = ("answer", "start", "end", "probability")
        best = dict(zip(names, (self.text, self.start, self.end, self.probability), strict=True))
        candidates = [dict(zip(names, one, strict=True)) for one in self.candidates]
        return {**best, "none": self.none, "candidates": candidates}

    def summary(self) -> str:
        """The answer, where it stands, and its probability."""
        return f"{' '.join(self.text.split()) or '-'}[{self.start}:{self.end}]\t{self.probability:.4f}"


@dataclass(frozen=True, slots=True)
class Read:
    """One window as the graph read it.

    Attributes:
        starts: (L,) logits.
        ends: (L,) logits.
        inside: (L,) bool: tokens of the context.
        offsets: (L, 2) characters of each token in the context.
    """

    starts: Array
    ends: Array
    inside: Array
    offsets: Array


class Reader(Head):
    """Reads `start_logits` and `end_logits` (L,). The first token of a window stands for no answer."""

    proof: ClassVar[str] = "start_and_end_probabilities"
    goes_on: ClassVar[bool] = True
    cut: ClassVar[str] = "only_second"

    def overlap(self, max_length: int, tokenizer: Any) -> int:
        """A quarter of a window, or less where the longest question leaves less room."""
        return overlap(max_length, tokenizer.num_special_tokens_to_add(True))

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """The windows of each (question, context): the whole question with a part of the context.

        Raises:
            DataError: One of them is no pair of strings.
        """
        for row, text in enumerate(texts):
            if not (isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)):
                raise DataError(
                    f"{text!r:.60} is no question with its context",
                    where=f"text {row}",
                    fix="Give (question, context), on the command line the context with --pair.",
                )
        most = int(QUESTION * int(tokenizer.truncation["max_length"]))
        pairs = [(cut_question(tokenizer, question, most), context) for question, context in texts]
        lost = [len(short) < len(question) for (short, _), (question, _) in zip(pairs, texts, strict=True)]
        return [
            [window(one, cut=cut) for one in (found, *found.overflowing)]
            for found, cut in zip(encode_texts(tokenizer, pairs), lost, strict=True)
        ]

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Answer:
        """The best span over all windows; none where `null_threshold` is given and no answer beats the best by more."""
        reads = [
            Read(
                said["start_logits"],
                said["end_logits"],
                np.array([sequence == 1 for sequence in one.sequences]),
                np.array(one.offsets).reshape(-1, 2),
            )
            for one, said in zip(asked.windows, asked.outputs, strict=True)
        ]
        return answer(asked.text[1], reads, settings.get("null_threshold"))

    def prove(self, outputs: Mapping[str, Array]) -> Array:
        """Softmax over the tokens, (2, L): the first row of starts, the second of ends."""
        logits = np.stack([outputs["start_logits"], outputs["end_logits"]]).astype(np.float64)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def cut_question(tokenizer: Any, question: str, most: int) -> str:
    """The question, cut behind its first `most` tokens.

    It is read as a second text, since what cuts contexts refuses a text alone.

    Args:
        tokenizer: Of tokenizers; it cuts second texts to more than `most` tokens, or none at all.
        question: Any text.
        most: Tokens.
    """
    (found,) = encode_texts(tokenizer, [("", question)])
    ends = [end for (_, end), sequence in zip(found.offsets, found.sequence_ids, strict=True) if sequence == 1]
    return question if len(ends) <= most else question[: ends[most - 1]]


def overlap(max_length: int, special: int) -> int:
    """Tokens that the next window repeats: a quarter of one, or less where the longest question leaves less room.

    Args:
        max_length: Tokens of a window.
        special: Of those, tokens that belong to neither text.

    Raises:
        DataError: Beside the longest question there is no room for the context.
    """
    room = max_length - int(QUESTION * max_length) - special
    if room < 1:
        raise DataError(
            f"windows of {max_length} tokens have no room for a question, its context and {special} special tokens",
            where="data.max_length",
            fix=f"Set it to {2 * special + 2} or more; 384 is usual.",
        )
    return min(int(STRIDE * max_length), room - 1)


def spans(reads: Sequence[Read], most: int = BEST) -> list[Span]:
    """The best spans of all windows, the best first: ends not before starts, at most `LONGEST` tokens apart.

    Args:
        reads: Windows of one context; the same span of two windows counts once, with its better score.
        most: Spans at most.
    """
    found: dict[tuple[int, int], float] = {}
    for one in reads:
        inside = np.flatnonzero(one.inside)
        if not len(inside):
            continue
        starts = inside[np.argsort(-one.starts[inside], kind="stable")[:BEST]]
        ends = inside[np.argsort(-one.ends[inside], kind="stable")[:BEST]]
        for start in starts:
            for end in ends:
                if start <= end < start + LONGEST:
                    place = (int(one.offsets[start][0]), int(one.offsets[end][1]))
                    score = float(one.starts[start]) + float(one.ends[end])
                    found[place] = max(score, found.get(place, -np.inf))
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [Span(*place, score) for place, score in ranked[:most]]


def null_score(reads: Sequence[Read]) -> float:
    """Score of no answer: that of the window which is least sure that there is none."""
    return min(float(one.starts[0]) + float(one.ends[0]) for one in reads)


def answer(context: str, reads: Sequence[Read], null_threshold: float | None = None) -> Answer:
    """The best span as an answer.

    Args:
        context: What the spans stand in.
        reads: Its windows.
        null_threshold: How much higher than the best span's the score of no answer must be to be said; None always
            answers.
    """
    best, null = spans(reads), null_score(reads)
    scores = np.array([null, *(one.score for one in best)])
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    candidates = [
        (context[one.start : one.end], one.start, one.end, float(share))
        for one, share in zip(best, shares[1:], strict=True)
    ]
    silent = null_threshold is not None and (not best or null - best[0].score > null_threshold)
    first = ("", 0, 0, float(shares[0])) if silent or not best else candidates[0]
    return Answer(*first, none=float(shares[0]), candidates=candidates)
