"""Images and texts in one space, as CLIP puts them: for search in either direction."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from distill.heads.image_text import IMAGE, TEXT
from distill.tasks.base import GraphSpec, Task
from distill.tasks.encoded import NO_LABEL, Array, Batch, Encoded, Padding, pack, pad_columns
from distill.tasks.image_classification import (
    PIXELS,
    blank,
    encode_images,
    image_shape,
    image_tokens,
    normalised,
)

RANKS = (1, 5, 10)
"""Results among which the right one is looked for."""

BLOCK = 1024
"""Rows that are compared with all others at once: of 100,000 rows, 400 MB."""


class ImageText(Task):
    """Two encoders, one vector of length 1 for an image and one for a text; what belongs together lies close.

    Tokens are those of the text: hidden states and relations are compared in its encoder alone.
    """

    name: ClassVar[str] = "image-text"
    auto_class: ClassVar[str] = "AutoModel"
    metric: ClassVar[str] = "mean_recall"
    preset: ClassVar[str] = "image-text"
    losses: ClassVar[Mapping[str, str]] = {"soft_labels": "similarity_kl", "hard_labels": "pair_labels"}
    suffixes: ClassVar[tuple[str, ...]] = ("CLIPModel",)
    inputs: ClassVar[str] = "image"
    target: ClassVar[str] = "nothing"
    pairs: ClassVar[Literal["allowed", "required", "none"]] = "required"
    named: ClassVar[bool] = False
    trims: ClassVar[bool] = False
    feeds: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", PIXELS)
    stretches: ClassVar[bool] = False
    cut: ClassVar[Literal["", "decoder", "towers", "captioner"]] = "towers"

    def configure(self, config: Any, labels: Sequence[str]) -> None:
        """Nothing: there are no classes."""

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids, cut to `max_length`, and pixels (N, C, H, W) uint8; `labels` are equal where texts are."""
        texts = list(rows["text_pair"])
        tokens = tokenizer.tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
        cut = sum(bool(encoding.overflowing) for encoding in tokens.encodings)
        labels = np.array([zlib.crc32(text.encode("utf-8", "surrogatepass")) for text in texts], np.int64)
        flat = {PIXELS: encode_images(rows["text"], tokenizer), "labels": labels}
        found = pack({"input_ids": tokens["input_ids"]}, flat, cut)
        return Encoded(found.ragged, found.flat, found.offsets, cut=cut, given={"text": texts})

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """input_ids, attention_mask (B, L); pixel_values (B, C, H, W) fp32; labels, scored, example (B,)."""
        return {
            **pad_columns(rows, padding),
            PIXELS: normalised(rows, padding),
            "labels": np.array([row["labels"] for row in rows], np.int64),
            "scored": np.ones(len(rows), bool),
        }

    def plain(self, text: Any) -> str:
        """The image's path."""
        return str(text["path"])

    def golden(self, row: Mapping[str, Any]) -> Any:
        """The image and its text."""
        return row["text"], row["text_pair"]

    def images(self, config: Any) -> tuple[tuple[int, int, int], int]:
        """Of the image encoder."""
        return image_shape(config.vision_config), image_tokens(config.vision_config)

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Search among all images and all different texts of the set.

        text_recall_at_k: share of images one of whose own texts is among the k nearest texts.
        image_recall_at_k: share of different texts one of whose own images is among the k nearest images.
        mean_recall: the mean of all of them, k = 1, 5 and 10, as papers on search sum them up.
        """
        images, texts, labels, first = _vectors(outputs, encoded)
        by_text, by_image = _before(images, texts, labels, first), _before(texts, images, first, labels)
        found = {f"text_recall_at_{k}": float((by_text < k).mean()) for k in RANKS}
        found |= {f"image_recall_at_{k}": float((by_image < k).mean()) for k in RANKS}
        return {"mean_recall": sum(found.values()) / len(found), **found}

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`text_embeds` (B, P), `image_embeds` (B, P) of length 1; it ships in two files, one for each."""
        names = ("input_ids", "attention_mask", PIXELS)
        axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "length"} for name in names[:2]}
        axes |= {TEXT: {0: "batch"}, PIXELS: {0: "images"}, IMAGE: {0: "images"}}

        def head(output: Any) -> tuple[Any, ...]:
            return output.text_embeds, output.image_embeds

        return GraphSpec(names, (TEXT, IMAGE), head, axes)

    def exported(self, model: Any, inputs: Iterable[str]) -> GraphSpec:
        """The same, traced with three images for two texts, so that neither counts the other's rows."""
        spec, shape = self.graph(inputs), image_shape(model.config.vision_config)

        def sample(ids: Any, mask: Any) -> tuple[Any, ...]:
            return ids, mask, blank(ids[:1].repeat(3, 1), shape)

        return GraphSpec(spec.inputs, spec.outputs, spec.head, spec.axes, sample=sample)

    def read(self, output: Any) -> dict[str, Any]:
        """Both vectors."""
        return {TEXT: output.text_embeds, IMAGE: output.image_embeds}

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Both vectors in fp32."""
        return {name: np.asarray(outputs[name], np.float32) for name in (TEXT, IMAGE)}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """By image the number of the nearest text."""
        images, texts, *_ = _vectors(outputs, encoded)
        return _nearest(images, texts)[0]

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """By image the nearest text and its similarity."""
        images, texts, *_ = _vectors(outputs, encoded)
        first, said = _first(encoded), encoded.given["text"]
        return [(str(said[first[best]]), float(near)) for best, near in zip(*_nearest(images, texts), strict=True)]

    def gold(self, encoded: Encoded) -> list[str | None]:
        """The texts."""
        return [str(text) for text in encoded.given["text"]]

    def labelled(self, encoded: Encoded) -> bool:
        """Always: an image's label is its text."""
        return bool((encoded.flat["labels"] != NO_LABEL).any())


def _first(encoded: Encoded) -> Array:
    """The first row of each different text."""
    return np.asarray(np.unique(encoded.flat["labels"], return_index=True)[1])


def _vectors(outputs: Mapping[str, Array], encoded: Encoded) -> tuple[Array, Array, Array, Array]:
    """Vectors of all images and of all different texts; the labels of both."""
    images, texts = (np.asarray(outputs[name], np.float32) for name in (IMAGE, TEXT))
    first, labels = _first(encoded), encoded.flat["labels"]
    return images, texts[first], labels, labels[first]


def _blocks(rows: int) -> list[slice]:
    return [slice(begin, begin + BLOCK) for begin in range(0, rows, BLOCK)]


def _nearest(asked: Array, among: Array) -> tuple[Array, Array]:
    """(rows of `asked`,): the number of the nearest of `among`, and their cosine."""
    tables = (asked[block] @ among.T for block in _blocks(len(asked)))
    found = [(table.argmax(axis=1), table.max(axis=1)) for table in tables]
    return np.concatenate([best for best, _ in found]), np.concatenate([near for _, near in found])


def _before(asked: Array, among: Array, ours: Array, theirs: Array) -> Array:
    """(rows of `asked`,): how many of `among` are as near as its nearest own one, that has its label; ties count."""
    counts = []
    for block in _blocks(len(asked)):
        near, own = asked[block] @ among.T, ours[block, None] == theirs[None, :]
        best = np.where(own, near, -np.inf).max(axis=1, keepdims=True)
        counts.append(((near >= best) & ~own).sum(axis=1))
    return np.concatenate(counts)
