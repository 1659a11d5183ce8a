"""What an image says: captions, lines of handwriting, whatever a decoder behind an image encoder writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from distill.tasks.base import GraphSpec
from distill.tasks.captioning_graph import with_memory
from distill.tasks.encoded import Batch, Encoded, Padding, Ragged
from distill.tasks.image_classification import PIXELS, encode_images, image_shape, image_tokens, normalised
from distill.tasks.seq2seq import Seq2Seq

ENCODERS = ("vit", "deit")
"""Families of image encoders whose states are as many as their patches, as `image_tokens` counts them."""


class Captioning(Seq2Seq):
    """`VisionEncoderDecoderModel`: a ViT with a GPT-2, or a TrOCR. All but what is read is as in `seq2seq`.

    It has a name of its own because bundles are read by task, without their config: an image and a text are asked of
    different files in different ways. A caption is cut to `data.max_length` and ends as the tokenizer's texts do.
    """

    name: ClassVar[str] = "image-captioning"
    kin: ClassVar[str] = "seq2seq"
    auto_class: ClassVar[str] = "AutoModelForImageTextToText"
    suffixes: ClassVar[tuple[str, ...]] = ("VisionEncoderDecoderModel",)
    inputs: ClassVar[str] = "image"
    cut: ClassVar[Literal["", "decoder", "towers", "captioner"]] = "captioner"
    prefixes: ClassVar[bool] = False
    feeds: ClassVar[tuple[str, ...]] = (PIXELS, "decoder_input_ids")
    stretches: ClassVar[bool] = False

    def around(self, tokenizer: Any) -> dict[str, Any]:
        """Nothing: images have no tokens."""
        return {}

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Pixels (N, C, H, W) uint8; `labels`, the tokens of the captions. `tokenizer` is an `ImageReader`."""
        words = tokenizer.tokenizer
        captions = [label or "" for label in rows["label"]]
        found = words(captions, truncation=True, max_length=max_length, return_attention_mask=False)
        labels = [_ended(ids, words, max_length) for ids in found["input_ids"]]
        pixels = encode_images(rows["text"], tokenizer)
        cut = sum(bool(encoding.overflowing) for encoding in found.encodings)
        offsets = np.arange(len(pixels) + 1, dtype=np.int64) * tokenizer.tokens
        given = {"target": captions, "tokenizer": (words,)}
        return Encoded({}, {PIXELS: pixels, "labels": Ragged.of(labels)}, offsets, cut=cut, given=given)

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """pixel_values (B, C, H, W) fp32; attention_mask (B, L) of ones; decoder_input_ids, labels, scored (B, T)."""
        return {
            PIXELS: normalised(rows, padding),
            "attention_mask": np.ones((len(rows), rows[0]["length"]), np.int64),
            "example": np.array([row["example"] for row in rows], np.int64),
            **self.shown(rows, padding),
        }

    def plain(self, text: Any) -> str:
        """The image's path."""
        return str(text["path"])

    def images(self, config: Any) -> tuple[tuple[int, int, int], int]:
        """Of the encoder."""
        return image_shape(config.encoder), image_tokens(config.encoder)

    def inputs_of(self, encoded: Encoded) -> list[str]:
        """The pixels."""
        return [PIXELS]

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`logits` (B, T, V): what each token of the decoder's input is followed by."""
        names = (PIXELS, "decoder_input_ids")
        axes: dict[str, dict[int, str]] = {PIXELS: {0: "batch_size"}}
        axes |= {name: {0: "batch_size", 1: "written"} for name in ("decoder_input_ids", "logits")}

        def head(output: Any) -> tuple[Any, ...]:
            return (output.logits,)

        return GraphSpec(names, ("logits",), head, axes)

    def exported(self, model: Any, inputs: Iterable[str]) -> GraphSpec:
        """The same with what the decoder remembers: see `distill.tasks.captioning_graph`."""
        return with_memory(self.graph(inputs), model)

    def restore(self, model: Any, beside: Mapping[str, Any], find: Callable[[str], Path | None]) -> None:
        """Writes into the config what the decoder starts with, where `generation_config` alone says so."""
        config, writing = model.config, model.generation_config
        if getattr(config, "decoder_start_token_id", None) is None:
            start = writing.decoder_start_token_id
            config.decoder_start_token_id = writing.bos_token_id if start is None else start

    def teaches(self, model: Any) -> str:
        """Why not: an encoder of another family, or nothing that begins or ends a caption."""
        if model.config.encoder.model_type not in ENCODERS:
            family = model.config.encoder.model_type
            return f"its encoder is of the family {family!r}; known for captions are {', '.join(ENCODERS)}"
        if model.config.decoder_start_token_id is None or not self.rules(model)["ends"]:
            return "no caption would end: its generation_config must name decoder_start_token_id and eos_token_id"
        return ""


def _ended(ids: Sequence[int], words: Any, most: int) -> list[int]:
    """The ids of a caption with the token that ends it: GPT-2's tokenizer adds none, and nothing would teach an end."""
    end = words.eos_token_id if words.eos_token_id is not None else words.sep_token_id
    if end is None or (ids and ids[-1] == end):
        return list(ids)
    return [*ids[: most - 1], end]
