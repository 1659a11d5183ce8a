"""A vector for an image or a text, and how alike an image and a text are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from distill.heads.base import Array, Asked, Head, Prediction, Text, Window, encode_text, window
from distill.heads.embedding import Embedding, Similarity
from distill.heads.image_classification import seen
from distill.heads.images import reread, written

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""A string that ends so names a file."""
TEXT, IMAGE = "text_embeds", "image_embeds"


class Retriever(Head):
    """Reads `text_embeds` and `image_embeds` (P,), each of length 1.

    A string is a text, or a file where it ends as images do; an image is also bytes or an array (H, W) or (H, W, 3). A
    pair is an image and a text.
    """

    proof: ClassVar[str] = "vectors"
    reads: ClassVar[tuple[str, ...]] = ("text", "image")

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """One window each: of a text its tokens, of an image its pixels, of a pair both.

        Raises:
            DataError: One of them is neither text nor image, or does not decode.
        """
        words, images = tokenizer
        return [[_window(words, images, text, row)] for row, text in enumerate(texts)]

    def decode(self, asked: Asked, labels: Sequence[str], settings: Mapping[str, Any]) -> Prediction:
        """The vector of an image or a text, or the similarity of a pair."""
        found = asked.outputs[0]
        if TEXT in found and IMAGE in found:
            return Similarity(float(np.dot(found[TEXT], found[IMAGE])))
        return Embedding(found[TEXT if TEXT in found else IMAGE])

    def prove(self, outputs: Mapping[str, Array]) -> Array:
        """Both vectors, one behind the other."""
        return np.concatenate([outputs[name] for name in (TEXT, IMAGE) if name in outputs])

    def kept(self, text: Text, window: Window) -> dict[str, Any]:
        """The text, and the pixels that the model read."""
        said = text[1] if isinstance(text, tuple) else text
        shown = {} if window.pixels is None else {"image": written(window.pixels.transpose(1, 2, 0))}
        return {**shown, **({"text": said} if window.ids else {})}

    def asked(self, line: Mapping[str, Any]) -> Text:
        """An image as `Pixels`, a text, or both."""
        if "image" not in line:
            return line["text"]
        return (reread(line["image"]), line["text"]) if "text" in line else reread(line["image"])


def _window(words: Any, images: Any, given: Any, row: int) -> Window:
    if isinstance(given, tuple) and len(given) == 2:
        return replace(_words(words, given[1], row), pixels=images.pixels(given[0]))
    if isinstance(given, str) and Path(given).suffix.lower() not in SUFFIXES:
        return _words(words, given, row)
    return seen(images.pixels(given))


def _words(tokenizer: Any, text: Any, row: int) -> Window:
    found = encode_text(tokenizer, text, row)
    return window(found, cut=bool(found.overflowing))
