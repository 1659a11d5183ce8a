"""What a decoder writes for an image, or how likely it finds a caption that is given with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from distill.heads.base import Text, Window, encode_text
from distill.heads.images import reread, written
from distill.heads.translation import Source, Translator


class Captioner(Translator):
    """A `Translator` of images: a path, a file's bytes, or an array (H, W) or (H, W, 3) of uint8.

    A pair is an image and a caption.
    """

    reads: ClassVar[tuple[str, ...]] = ("text", "image")

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """One window an image; of a caption that is too long the end is lost.

        Raises:
            DataError: One of them is no image, or does not decode; or a caption is no text.
        """
        words, images = tokenizer
        rows = [text if isinstance(text, tuple) and len(text) == 2 else (text, None) for text in texts]
        return [[_window(words, images, image, said, row)] for row, (image, said) in enumerate(rows)]

    def kept(self, text: Text, window: Window) -> dict[str, Any]:
        """The pixels that the model read, and the caption where there is one."""
        said = {"text": text[1]} if isinstance(text, tuple) else {}
        return {"image": written(window.pixels.transpose(1, 2, 0)), **said}

    def asked(self, line: Mapping[str, Any]) -> Text:
        """The pixels as an array (H, W, C), with the caption where there is one."""
        image = reread(line["image"])
        return (image, line["text"]) if "text" in line else image


def _window(words: Any, images: Any, image: Any, caption: str | None, row: int) -> Source:
    """An image has no tokens of its own."""
    target = None if caption is None else encode_text(words, caption, row).ids
    return Source((), (), (), (), (), target, words, pixels=images.pixels(image))
