"""What a head is: it cuts a text into what the graph reads at once, and makes one answer of what the graph said."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from distill.errors import DataError

Array = np.ndarray
Text = Any
"""A text, a pair of them (a tuple), or a text cut into words (a list), as the task takes it."""


@dataclass(frozen=True, slots=True)
class Window:
    """What the graph reads at once: a whole text or, where that is too long, a part of it.

    Attributes:
        ids: Token ids, special tokens included.
        types: Token types.
        offsets: (begin, end) of each token in characters of its text.
        words: Number of the word of each token, None for special tokens.
        sequences: 0 for tokens of the first text, 1 for the second, None for special tokens.
        pixels: (C, H, W) uint8 of an image, which has no tokens.
        cut: The text is longer, and what is behind this is read nowhere.
    """

    ids: Sequence[int]
    types: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    words: Sequence[int | None]
    sequences: Sequence[int | None]
    pixels: Any = field(default=None, kw_only=True)
    cut: bool = field(default=False, kw_only=True)


class Prediction(Protocol):
    """What an app gets for a text."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""

    def summary(self) -> str:
        """The same as a line without line breaks, parts between tabs."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One text with all that its answer is made of.

    Attributes:
        text: As it was given.
        windows: Its parts; one where it is short enough.
        outputs: By window, the head's digest of what the graph said without padding: (L, ...) for a value a token.
        write: From ids, or an image's pixels, to the ids that the bundle writes behind them; None where it writes none.
    """

    text: Text
    windows: Sequence[Window]
    outputs: Sequence[Mapping[str, Array]]
    write: Callable[[Any], list[int]] | None = None


class Head(ABC):
    """How one task's bundles are asked and read. It holds no state.

    Attributes:
        proof: Name under which golden vectors keep what `prove` gives.
        counts: The proof are numbers at a scale of their own, as prices are, not probabilities.
        goes_on: A long text is read in further windows; else it is cut.
        stride: Share of a window that the next one repeats.
        cut: Which of two texts is cut, as `tokenizers` names strategies.
        reads: What it reads: `text` takes a tokenizer, `image` a preprocessor_config.json.
    """

    proof: ClassVar[str] = "probabilities"
    counts: ClassVar[bool] = False
    goes_on: ClassVar[bool] = False
    stride: ClassVar[float] = 0.0
    cut: ClassVar[str] = "longest_first"
    reads: ClassVar[tuple[str, ...]] = ("text",)

    def limit(self, tokenizer: Any, max_length: int, side: str = "right") -> None:
        """Sets once how long windows are; nothing of the tokenizer changes when texts are read, in whichever thread.

        Args:
            tokenizer: Of tokenizers.
            max_length: Tokens of a window.
            side: Where a long text is cut, `right` or `left`; one that is read on is not.
        """
        overlap = self.overlap(max_length, tokenizer)
        side = "right" if self.goes_on else side
        tokenizer.enable_truncation(max_length, stride=overlap, strategy=self.cut, direction=side)

    def overlap(self, max_length: int, tokenizer: Any) -> int:
        """Tokens that the next window repeats."""
        return int(self.stride * max_length)

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """The windows of each text. `tokenizer` (of tokenizers) cuts as `limit` told it.

        Raises:
            DataError: One of them is neither a string nor a pair of strings.
        """
        return [
            [window(one, cut=bool(one.overflowing) and not self.goes_on) for one in (found, *self._rest(found))]
            for found in encode_texts(tokenizer, texts)
        ]

    def prefixed(self, text: Text, prefix: str) -> Text:
        """The text, or the first of two, with the words that stand before every one; what is no text stays."""
        if isinstance(text, tuple):
            return (self.prefixed(text[0], prefix), *text[1:])
        return prefix + text if isinstance(text, str) else text

    def _rest(self, encoding: Any) -> Sequence[Any]:
        return encoding.overflowing if self.goes_on else ()

    def digest(self, window: Window, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """Of what the graph said of a window, what `decode` reads: hundreds of texts' are held at once."""
        return outputs

    @abstractmethod
    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Prediction:
        """The answer to one text.

        Args:
            asked: The text and what the graph said.
            labels: Names by class number.
            settings: Of the bundle, such as thresholds.
        """

    def kept(self, text: Text, window: Window) -> dict[str, Any]:
        """What golden vectors keep of a text, as plain values."""
        if isinstance(text, tuple):
            return {"text": whole(text[0]), "text_pair": whole(text[1])}
        return {"text": whole(text) if isinstance(text, str) else [whole(word) for word in text]}

    def asked(self, line: Mapping[str, Any]) -> Text:
        """The text of a line of golden vectors.

        Raises:
            KeyError: The line holds none.
        """
        return (line["text"], line["text_pair"]) if "text_pair" in line else line["text"]

    def prove(self, outputs: Mapping[str, Array]) -> Array:
        """The numbers of one window that are kept as a proof and compared later.

        Args:
            outputs: What the graph said of it without padding, and its `input_ids` (L,).
        """
        return outputs[self.proof]


def window(encoding: Any, *, cut: bool = False) -> Window:
    """What `tokenizers` found, kept."""
    return Window(encoding.ids, encoding.type_ids, encoding.offsets, encoding.word_ids, encoding.sequence_ids, cut=cut)


def encode_texts(tokenizer: Any, texts: Sequence[Text]) -> list[Any]:
    """Encodings of strings and pairs of strings; halves of surrogate pairs become U+FFFD.

    Raises:
        DataError: One of them is neither a string nor a pair of strings.
    """
    try:
        return tokenizer.encode_batch(list(texts))
    except (TypeError, UnicodeEncodeError):  # something that is no text, or half a surrogate pair
        refuse_others(texts)
        return tokenizer.encode_batch(
            [tuple(map(whole, text)) if isinstance(text, tuple) else whole(text) for text in texts]
        )


def encode_text(tokenizer: Any, text: Any, row: int) -> Any:
    """The encoding of a string, halves of surrogate pairs as `encode_texts` has them.

    Raises:
        DataError: It is no string; `row` is the number of what it is a part of.
    """
    if not isinstance(text, str):
        raise DataError(f"{text!r:.60} is no text", where=f"text {row}", fix="Give a string.")
    return encode_texts(tokenizer, [text])[0]


def whole(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, as browsers do it, which UTF-8 cannot hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def refuse_others(texts: Sequence[Text]) -> None:
    """Looks for what is neither a string nor a pair of strings.

    Raises:
        DataError: There is one; names the first by its number.
    """
    for row, text in enumerate(texts):
        parts = text if isinstance(text, tuple) and len(text) == 2 else (text,)
        if not all(isinstance(part, str) for part in parts):
            raise DataError(
                f"{text!r:.60} is no text", where=f"text {row}", fix="Give strings, or tuples of two strings."
            )
