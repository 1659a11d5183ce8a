"""One label for an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from distill.heads.base import Text, Window
from distill.heads.classification import Classifier
from distill.heads.images import reread, written


class ImageClassifier(Classifier):
    """Reads `probabilities` (C,). An image is a path, a file's bytes, or an array (H, W) or (H, W, 3) of uint8."""

    reads: ClassVar[tuple[str, ...]] = ("image",)

    def windows(self, tokenizer: Any, texts: Sequence[Text]) -> list[list[Window]]:
        """The pixels of each image; `tokenizer` is a `Preprocessing`.

        Raises:
            DataError: One of them is no image, or does not decode.
        """
        return [[seen(tokenizer.pixels(image))] for image in texts]

    def kept(self, text: Text, window: Window) -> dict[str, Any]:
        """The pixels that the model read: they are compared without a decoder."""
        return {"image": written(window.pixels.transpose(1, 2, 0))}

    def asked(self, line: Mapping[str, Any]) -> Text:
        """The pixels."""
        return reread(line["image"])


def seen(pixels: Any) -> Window:
    """An image as a window: it has no token ids."""
    return Window((), (), (), (), (), pixels=pixels)
