"""One label for each word; neighbouring words of one kind are an entity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from distill.errors import DataError
from distill.heads.base import Asked, Head, Text, Window, encode_texts, whole, window

STRIDE = 0.25
"""Share of a window that the next one repeats, so that every word is read with words on both sides."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A stretch of the text with a label.

    Attributes:
        label: Without `B-` or `I-`.
        text: What it says.
        start: Character of the text at which it begins.
        end: The character behind it.
        probability: Of its words' labels, averaged.
    """

    label: str
    text: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True, slots=True)
class Tagging:
    """What a tagger says of one text.

    Attributes:
        entities: In the order of the text; words labelled `O` belong to none.
        tags: A label a word. Words are those given or, of a plain text, those that the tokenizer finds.
    """

    entities: list[Entity]
    tags: list[str]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        found = [
            {"label": one.label, "text": one.text, "start": one.start, "end": one.end, "probability": one.probability}
            for one in self.entities
        ]
        return {"entities": found, "tags": self.tags}

    def summary(self) -> str:
        """Each entity as `label=text[start:end] probability`."""
        shown = [
            f"{one.label}={' '.join(one.text.split())}[{one.start}:{one.end}] {one.probability:.4f}"
            for one in self.entities
        ]
        return "; ".join(shown) or "-"


class Tagger(Head):
    """Reads `probabilities` (L, C); a word is what its first token says."""

    goes_on: ClassVar[bool] = True
    stride: ClassVar[float] = STRIDE

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """The windows of each text; a list is a text that is cut into words already.

        Raises:
            DataError: One of them is neither a string nor a list of strings.
        """
        found: list[Any] = []
        for row, text in enumerate(texts):
            if isinstance(text, list) and text and all(isinstance(word, str) for word in text):
                found.append(tokenizer.encode([whole(word) for word in text], is_pretokenized=True))
            elif isinstance(text, str):
                found += encode_texts(tokenizer, [text])
            else:
                raise DataError(
                    f"{text!r:.60} is no text", where=f"text {row}", fix="Give strings, or lists of one string a word."
                )
        return [[window(one) for one in (encoding, *encoding.overflowing)] for encoding in found]

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Tagging:
        """Entities as transformers' pipeline finds them with `aggregation_strategy="first"`."""
        text, words = _spans(asked)
        tags, sure = [], []
        for number in sorted(words):
            place, position = words[number][0]
            row = asked.outputs[place]["probabilities"][position]
            tags.append(labels[int(row.argmax())])
            sure.append(float(row.max()))
        spans = [words[number][1] for number in sorted(words)]
        found = entities(text, spans, tags, sure, ends=names_parts(labels))
        if isinstance(asked.text, list):  # a word without a token, such as a lone accent, has no entity
            told = dict(zip(sorted(words), tags, strict=True))
            tags = [told.get(number, "O") for number in range(len(asked.text))]
        return Tagging(found, tags)


def names_parts(labels: Sequence[str]) -> bool:
    """Labels say where entities begin (`B-PER`, `I-PER`), unlike those of parts of speech."""
    return any(label[:2] in ("B-", "I-") for label in labels)


def entities(
    text: str, spans: Sequence[tuple[int, int]], tags: Sequence[str], sure: Sequence[float], *, ends: bool
) -> list[Entity]:
    """Joins words: `B-` begins an entity, `I-` or no prefix goes on with one of the same kind, as seqeval counts them.

    Args:
        text: The words stand in it.
        spans: (begin, end) of each word.
        tags: A label a word.
        sure: Probability of each label.
        ends: `E-` ends an entity and `S-` is a whole one (BIOES); else they are the beginnings of names.
    """
    begins, closes = (("B-", "S-"), ("E-", "S-")) if ends else (("B-",), ())
    groups: list[tuple[str, list[int]]] = []
    for index, tag in enumerate(tags):
        kind = tag[2:] if tag[:2] in ("I-", *begins, *closes) else tag
        closed = index > 0 and tags[index - 1][:2] in closes
        if groups and groups[-1][0] == kind and tag[:2] not in begins and not closed:
            groups[-1][1].append(index)
        else:
            groups.append((kind, [index]))
    found = []
    for kind, members in groups:
        if kind != "O":
            begin, end = spans[members[0]][0], spans[members[-1]][1]
            found.append(Entity(kind, text[begin:end], begin, end, math.fsum(sure[i] for i in members) / len(members)))
    return found


def first_pieces(windows: Sequence[Sequence[int | None]]) -> dict[int, tuple[int, int]]:
    """For each word the window that reads it with the most text around it, and where its first token is in there.

    Args:
        windows: The number of the word of each token, None for special tokens; windows in the order of the text.
    """
    best: dict[int, tuple[float, int, int]] = {}
    for place, words in enumerate(windows):
        inside = [position for position, word in enumerate(words) if word is not None]
        if not inside:
            continue
        first, last = inside[0], inside[-1]
        seen: set[int] = set()
        for position in inside:
            word = words[position]
            if word is None or word in seen:
                continue
            seen.add(word)
            before = math.inf if place == 0 else position - first
            behind = math.inf if place == len(windows) - 1 else last - position
            margin = min(before, behind)
            if word not in best or margin > best[word][0]:
                best[word] = (margin, place, position)
    return {word: (place, position) for word, (_, place, position) in best.items()}


def _spans(asked: Asked) -> tuple[str, dict[int, tuple[tuple[int, int], tuple[int, int]]]]:
    """The text, and of each word where its first token is and where it stands in the text."""
    places = first_pieces([one.words for one in asked.windows])
    if isinstance(asked.text, list):
        begins = [0]
        for word in asked.text:
            begins.append(begins[-1] + len(word) + 1)
        spans = {word: (begins[word], begins[word + 1] - 1) for word in places}
        return " ".join(asked.text), {word: (place, spans[word]) for word, place in places.items()}
    stretch: dict[int, tuple[int, int]] = {}
    for one in asked.windows:
        for word, (begin, end) in zip(one.words, one.offsets, strict=True):
            if word is not None:
                known = stretch.get(word, (begin, end))
                stretch[word] = (min(known[0], begin), max(known[1], end))
    return asked.text, {word: (place, stretch[word]) for word, place in places.items()}
