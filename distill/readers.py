"""What turns images into what a model reads, and the captions beside them: a tokenizer's counterpart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.files import sha256_json, write_json
from distill.heads.images import CONFIG, Preprocessing

SHORTER = ("Bit", "CLIP", "ChineseCLIP")
"""How the names of image processors begin to which a size without a name is that of the shorter side."""


@dataclass(frozen=True)
class ImageReader:
    """An image processor as its checkpoint has it.

    Attributes:
        images: What is done to an image.
        config: The JSON it was read from, which ships.
        tokens: How many tokens an image is to the model: its patches and what stands before them.
        tokenizer: Of the captions, where the model reads those too.
    """

    images: Preprocessing
    config: Mapping[str, Any]
    tokens: int
    tokenizer: Any = None

    def save_pretrained(self, folder: Path) -> None:
        """Writes what transformers and transformers.js read beside a model."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, dict(self.config))

    def digest(self) -> str:
        """sha256 of everything that what a model reads depends on."""
        words = None if self.tokenizer is None else json.loads(self.tokenizer.backend_tokenizer.to_str())
        said = None if words is None else {**words, "truncation": None, "padding": None}  # what it was last asked to
        return sha256_json([dict(self.config), said])


def image_reader(
    config: Mapping[str, Any], shape: tuple[int, int, int], tokens: int, tokenizer: Any = None
) -> ImageReader:
    """From a `preprocessor_config.json`.

    Args:
        config: The JSON.
        shape: (C, H, W) that the model reads.
        tokens: How many tokens that is to it.
        tokenizer: Of the captions.

    Raises:
        DataError: It is empty, asks for what is not known here, or makes images of another shape.
    """
    config = _named(config)
    images = Preprocessing.of(config)
    if images.shape != shape:
        raise DataError(
            f"it makes images of shape {images.shape}, the model reads {shape}",
            where=CONFIG,
            fix="They belong to different models: put the image processor of this model into the folder.",
        )
    return ImageReader(images, config, tokens, tokenizer)


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON with a size that says which side it means: of a lone number that depends on the processor's class."""
    kind, size = str(config.get("image_processor_type") or config.get("feature_extractor_type")), config.get("size")
    if kind.startswith(SHORTER) and isinstance(size, int):
        return {**config, "size": {"shortest_edge": size}}
    return dict(config)
