"""One label for an image, its patches the tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from distill.tasks.base import GraphSpec
from distill.tasks.encoded import Array, Batch, Encoded, Padding
from distill.tasks.text_classification import TextClassification

PIXELS = "pixel_values"


class ImageClassification(TextClassification):
    """ViT and its kin. Every image is brought to one size, so that all have as many patches and no mask is needed.

    Pixels are kept as bytes and normalised batch by batch: 10,000 images of 224 x 224 take 1.5 GB.
    """

    name: ClassVar[str] = "image-classification"
    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    suffixes: ClassVar[tuple[str, ...]] = ("ForImageClassification",)
    inputs: ClassVar[str] = "image"
    pairs: ClassVar[Literal["allowed", "required", "none"]] = "none"
    augments: ClassVar[bool] = False
    trims: ClassVar[bool] = False
    feeds: ClassVar[tuple[str, ...]] = (PIXELS,)
    stretches: ClassVar[bool] = False

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Pixels (N, C, H, W) uint8; `tokenizer` is an `ImageReader`, and its length is known once a batch is made."""
        pixels = encode_images(rows["text"], tokenizer)
        flat = {PIXELS: pixels, "labels": self._labels(rows["label"])}
        return Encoded({}, flat, np.arange(len(pixels) + 1, dtype=np.int64) * tokenizer.tokens)

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """pixel_values (B, C, H, W) fp32; attention_mask (B, L) of ones; labels, scored, example (B,)."""
        return {
            PIXELS: normalised(rows, padding),
            "attention_mask": np.ones((len(rows), rows[0]["length"]), np.int64),
            "example": np.array([row["example"] for row in rows], np.int64),
            "labels": np.array([row["labels"] for row in rows]),
            "scored": np.ones(len(rows), bool),
        }

    def plain(self, text: Any) -> str:
        """The image's path."""
        return str(text["path"])

    def golden(self, row: Mapping[str, Any]) -> Any:
        """The image."""
        return row["text"]

    def longest(self, config: Any, max_length: int) -> int:
        """The class token and the patches."""
        return image_tokens(config)

    def images(self, config: Any) -> tuple[tuple[int, int, int], int]:
        """As the config says."""
        return image_shape(config), image_tokens(config)

    def inputs_of(self, encoded: Encoded) -> list[str]:
        """The pixels."""
        return [PIXELS]

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`logits` (B, C) first, then their softmax as `probabilities`."""
        found = super().graph((PIXELS,))
        return GraphSpec(found.inputs, found.outputs, found.head, {**found.axes, PIXELS: {0: "batch"}})

    def exported(self, model: Any, inputs: Iterable[str]) -> GraphSpec:
        """The same, traced with images of the model's size."""
        spec, shape = self.graph(inputs), image_shape(model.config)
        return GraphSpec(spec.inputs, spec.outputs, spec.head, spec.axes, sample=lambda ids, mask: (blank(ids, shape),))


def blank(ids: Any, shape: tuple[int, int, int]) -> Any:
    """(B, C, H, W) fp32 zeros, where `ids` is a tensor (B, L)."""
    return ids.new_zeros((len(ids), *shape)).float()


def encode_images(images: Sequence[Any], reader: Any) -> Array:
    """(N, C, H, W) uint8."""
    found = [reader.images.pixels(image) for image in images]
    return np.stack(found) if found else np.zeros((0, *reader.images.shape), np.uint8)


def normalised(rows: Sequence[Mapping[str, Any]], padding: Padding) -> Array:
    """(B, C, H, W) fp32 of encoded rows."""
    assert padding.images is not None, "a batch of images is made with the Padding of their reader"
    return padding.images.normalise(np.stack([row[PIXELS] for row in rows]))


def image_shape(config: Any) -> tuple[int, int, int]:
    """(C, H, W) that a model's config names."""
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    return int(config.num_channels), int(size[0]), int(size[1])


def image_tokens(config: Any) -> int:
    """The patches of an image, and the class token before them; DeiT has a second one."""
    _, height, width = image_shape(config)
    side = config.patch_size if isinstance(config.patch_size, (list, tuple)) else (config.patch_size,) * 2
    return (height // int(side[0])) * (width // int(side[1])) + (2 if config.model_type == "deit" else 1)
