"""An encoder and a decoder in two ONNX files as one model that writes: NumPy and ONNX Runtime alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from distill.export.onnx_model import OnnxModel
from distill.heads.generation import Past, Rules, Step, beam, greedy

Array = np.ndarray


class EncoderDecoder:
    """Two files, cut by `distill.export.encoder_decoder`, that answer as the graph they were cut from.

    Args:
        encoder: The file that reads.
        decoder: The file that writes; its metadata speaks for both.
        threads: Threads of a call.

    Raises:
        BundleError: A file is missing, broken, or not alone.
    """

    def __init__(self, encoder: str | Path, decoder: str | Path, *, threads: int = 1) -> None:
        self.encoder, self.decoder = OnnxModel(encoder, threads=threads), OnnxModel(decoder, threads=threads)
        self.rules = Rules.of(json.loads(self.decoder.metadata.get("distill.rules", "{}")))
        self.path, self.metadata = self.decoder.path, self.decoder.metadata
        self.inputs, self.outputs = self.encoder.inputs, ("logits",)
        self.by_token: frozenset[str] = frozenset()
        own = {value.name: value for value in self.decoder.session.get_inputs()}
        self._past = {name: value.shape for name, value in own.items() if name.startswith("past_key_values.")}
        names = [name.replace("past_key_values", "present") for name in self._past]
        self._first = dict(zip(names, self._past, strict=True))
        self._next = {present: past for present, past in self._first.items() if ".encoder." not in past}

    encodes, writes = True, True
    width = 1  # it is asked for one text at a time
    memory: Mapping[str, tuple[int, ...]] = {}
    """None that a caller has to keep."""

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """`logits` (B, T, V) behind each of `decoder_input_ids` (B, T), for what the encoder reads.

        That is `input_ids`, `attention_mask` (B, L), or `pixel_values` (B, C, H, W).
        """
        states, mask = self._read(batch)
        logits, _ = self._step(batch["decoder_input_ids"], states, mask, None)
        return {"logits": logits}

    def write(self, batch: Mapping[str, Array], rules: Rules) -> list[list[int]]:
        """By row of what the encoder reads, as in `predict`, the ids that the decoder writes, with the end.

        Args:
            batch: The sources.
            rules: `start` is what the decoder is shown first.
        """
        states, mask = self._read(batch)
        lengths = mask.sum(axis=1).tolist()
        ids = batch.get("input_ids", np.empty((len(states), 0), np.int64))  # an image has none
        sources = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        if rules.beams == 1:
            prompts = np.full((len(states), 1), rules.start, np.int64)
            return greedy(self._stepper(states, mask), prompts, rules, sources)
        found = []
        for row, length in enumerate(lengths):  # padding would be carried along by every beam
            step = self._stepper(states[row : row + 1, :length], mask[row : row + 1, :length])
            found.append(beam(step, [rules.start], rules, sources[row])[0][0])
        return found

    @property
    def vocabulary(self) -> int:
        """How many ids there are."""
        return int(next(value.shape[2] for value in self.decoder.session.get_outputs() if value.name == "logits"))

    def stepper(self, batch: Mapping[str, Array]) -> Step:
        """What writes behind the sources, token by token."""
        return self._stepper(*self._read(batch))

    def _read(self, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        states = self.encoder.predict(batch)["last_hidden_state"]
        whole = "input_ids" not in batch  # an image has no padding
        return states, np.ones(states.shape[:2], np.int64) if whole else batch["attention_mask"]

    def _stepper(self, states: Array, mask: Array) -> Step:
        def step(ids: Array, past: Past | None) -> tuple[Array, Past]:
            known = dict(past or {"mask": mask})
            logits, new = self._step(ids, states, known.pop("mask"), known or None)
            return logits[:, -1], new

        return step

    def _step(self, ids: Array, states: Array, mask: Array, past: Mapping[str, Array] | None) -> tuple[Array, Past]:
        """Logits (B, T, V) of new tokens, and what the next ones need: keys and values, and the encoder's mask."""
        if "use_cache_branch" not in self.decoder.inputs and len(states) == 1:  # read at every token: each beam its own
            states = np.repeat(states, len(ids), axis=0)
        feed: dict[str, Any] = {"input_ids": ids, "encoder_attention_mask": mask, "encoder_hidden_states": states}
        if past is None:
            past = {name: np.zeros((len(ids), shape[1], 0, shape[3]), np.float32) for name, shape in self._past.items()}
            wanted, feed["use_cache_branch"] = self._first, np.array([False])
        else:
            wanted, feed["use_cache_branch"] = self._next, np.array([True])
        feed |= past
        named = {name: feed[name] for name in self.decoder.inputs}
        logits, *kept = self.decoder.session.run(["logits", *wanted], named)
        return logits, {**past, **dict(zip(wanted.values(), kept, strict=True)), "mask": mask}
