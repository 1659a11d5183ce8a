"""Text in, answer out: the shipped bundle without torch.

    bundle = Bundle.load("runs/demo/run/bundle")
    bundle("a fine film").label

Imports numpy, onnxruntime, tokenizers and of ours `errors`, `heads` and what opens graphs beside it alone: the base
install runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from distill.errors import BundleError, DataError
from distill.export.dual_encoder import DualEncoder
from distill.export.onnx_model import OnnxModel
from distill.export.pieces import files_of, towers
from distill.export.writer import EncoderDecoder
from distill.heads import HEADS, Asked, Text, Window
from distill.heads.generation import Rules, beam, greedy
from distill.heads.images import CONFIG, Preprocessing

Array = np.ndarray
QUANTIZED, FULL = "onnx/model_quantized.onnx", "onnx/model.onnx"
PIXELS = "pixel_values"
STREAM = 256
"""Texts held at a time when streaming: enough to sort by length, little enough to forget."""
ROOM = 1 << 28
"""Bytes of the values that a call may return a token: of a language model with a wide vocabulary they fill a memory."""


def open_graph(path: Path, *, threads: int = 1) -> Any:
    """A graph in one file, an `OnnxModel`, or in two, an `EncoderDecoder` or a `DualEncoder`.

    Raises:
        BundleError: A file is missing, broken, or not alone.
    """
    files = files_of(path)
    if len(files) == 1:
        return OnnxModel(path, threads=threads)
    return (DualEncoder if files == towers(path) else EncoderDecoder)(*files, threads=threads)


class Bundle:
    """A shipped bundle. `Bundle.load(folder)` opens one.

    Args:
        model: The graph; its metadata names task, labels and maximum length.
        tokenizer: As the bundle has it.
        padding: Values that fill short rows, by input.
        folder: Where it came from, for errors.
        images: How images are read, where they are.
        side: Where texts are cut that are too long: `right` or `left`.

    Attributes:
        cut: How many of the texts asked so far were longer than the maximum and were cut there.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None,
        padding: Mapping[str, int],
        folder: Path,
        images: Preprocessing | None = None,
        side: str = "right",
    ) -> None:
        self.model, self.folder, self.side = model, folder, side
        try:
            self.task = model.metadata["distill.task"]
            self.labels: list[str] = json.loads(model.metadata["distill.labels"])
            self.max_length = int(model.metadata["distill.max_length"])
            self.settings: dict[str, Any] = json.loads(model.metadata.get("distill.settings", "{}"))
            self.prefix: str = model.metadata.get("distill.prefix", "")
            self.rules: dict[str, Any] = json.loads(model.metadata.get("distill.rules", "{}"))
            self.head = HEADS[self.task]
        except (KeyError, ValueError) as error:
            raise BundleError(
                f"its metadata has no usable {error}", where=str(model.path), fix="Export it again with distill."
            ) from None
        self._padding = padding
        self.tokenizer: Any = tokenizer
        self.images = images
        self.cut = 0
        if tokenizer is None:
            return
        tokenizer.no_padding()
        self.head.limit(tokenizer, self.max_length, self.side)

    @classmethod
    def load(cls, folder: str | Path, *, file: str | None = None, threads: int = 1) -> Bundle:
        """Opens a bundle.

        Args:
            folder: With `tokenizer.json`, `config.json` and `onnx/`.
            file: ONNX file inside the folder; the int8 one when None.
            threads: Threads of a call.

        Raises:
            BundleError: Something is missing, broken, contradicts itself, or points outside the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise BundleError("there is no such folder", where=str(folder), fix="Name the folder of a bundle.")
        name = file or QUANTIZED
        for part in files_of(folder / name):
            inside(folder, str(Path(name).with_name(part.name)))
        model = open_graph(folder / name, threads=threads)
        head = HEADS.get(model.metadata.get("distill.task", ""))
        reads = head.reads if head else ("text",)
        tokenizer = _tokenizer(folder) if "text" in reads else None
        images = _preprocessing(folder) if "image" in reads else None
        path = inside(folder, "config.json")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            padding = {"input_ids": int(config.get("pad_token_id") or 0)}
            named = [config["id2label"][key] for key in sorted(config.get("id2label", {}), key=int)]
        except (ValueError, TypeError, AttributeError) as error:
            raise BundleError(
                f"cannot be read ({error})", where=str(path), fix="Copy the whole bundle again."
            ) from None
        bundle = cls(model, tokenizer, padding, folder, images, _side(folder))
        if bundle.labels and named != bundle.labels:
            raise BundleError(
                f"labels {named[:4]} in config.json are not the graph's {bundle.labels[:4]}",
                where=str(folder),
                fix="The files belong to different exports: copy the whole bundle again.",
            )
        return bundle

    @property
    def lost(self) -> str:
        """What a text loses that is too long: its `end` or its `beginning`."""
        return "beginning" if self.side == "left" else "end"

    @property
    def reader(self) -> Any:
        """What the head makes windows with: a tokenizer, a `Preprocessing`, or both."""
        if self.images is None or self.tokenizer is None:
            return self.images or self.tokenizer
        return self.tokenizer, self.images

    def __call__(self, text: Text, pair: str | None = None) -> Any:
        """The prediction for one text or one pair."""
        return self.predict([text if pair is None else (text, pair)])[0]

    def predict(self, texts: Sequence[Text], *, batch_size: int = 32, new_tokens: int | None = None) -> list[Any]:
        """One prediction a text, in order. Texts of like length share a batch, so little is spent on padding.

        Args:
            texts: Strings, tuples of two, or what else the task takes. An empty string is asked like any other; what
                is longer than the maximum loses its end or, where the task can, is read in overlapping windows.
            batch_size: Windows a call, at most.
            new_tokens: How many are written behind each text at most, where the bundle writes; None leaves it to the
                bundle, 0 writes nothing.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}", where="predict", fix="Set it to 1 or more.")
        if isinstance(texts, str):
            raise DataError("one text is no list of texts", where="predict", fix="Give [text], or call bundle(text).")
        if self.prefix:
            texts = [self.head.prefixed(text, self.prefix) for text in texts]
        found = self.head.windows(self.reader, texts)
        self.cut += sum(any(one.cut for one in row) for row in found)
        windows = [one for row in found for one in row]
        said: dict[int, Mapping[str, Array]] = {}
        for places in self._batches(windows, batch_size):
            batch = [windows[place] for place in places]
            said.update(zip(places, map(self.head.digest, batch, self.ask(batch)), strict=True))
        asked, at = [], 0
        for text, row in zip(texts, found, strict=True):
            asked.append(
                Asked(text, row, [said[place] for place in range(at, at + len(row))], self._writer(new_tokens))
            )
            at += len(row)
        return [self.head.decode(one, self.labels, self.settings) for one in asked]

    def _batches(self, windows: Sequence[Window], most: int) -> Iterator[list[int]]:
        """Places of windows of like length, as many as are wanted and as there is room for."""
        order = sorted(range(len(windows)), key=lambda place: len(windows[place].ids))
        begin, bytes_a_token = 0, 4 * self.model.width
        while begin < len(order):
            longest = len(windows[order[min(begin + most, len(order)) - 1]].ids)
            rows = max(1, min(most, ROOM // max(1, longest * bytes_a_token)))
            yield order[begin : begin + rows]
            begin += rows

    def ask(self, windows: Sequence[Window]) -> list[dict[str, Array]]:
        """What the graph says of each window, read in one batch; values of padding are left out."""
        if self.model.encodes:
            return [self._follow(one, getattr(one, "target", None)) for one in windows]
        if self.images is not None:
            return self._seen(windows, self.images)
        rows = [{"input_ids": one.ids, "token_type_ids": one.types} for one in windows]
        outputs = self.model.predict(self.pad(rows))
        return [
            {
                name: value[row, : len(one.ids)] if name in self.model.by_token else value[row]
                for name, value in outputs.items()
            }
            for row, one in enumerate(windows)
        ]

    def _seen(self, windows: Sequence[Window], images: Preprocessing) -> list[dict[str, Array]]:
        """What the graph says of images, and of texts where it reads those too: each is asked of all that have it."""
        said: list[dict[str, Array]] = [{} for _ in windows]
        shown = [place for place, one in enumerate(windows) if one.pixels is not None]
        told = [place for place, one in enumerate(windows) if one.ids]
        batches: list[tuple[list[int], dict[str, Array]]] = []
        if shown:
            batches.append((shown, {PIXELS: images.normalise(np.stack([windows[place].pixels for place in shown]))}))
        if told:
            texts = [{"input_ids": windows[place].ids, "token_type_ids": windows[place].types} for place in told]
            batches.append((told, self.pad(texts)))
        for places, batch in batches:
            for name, value in self.model.predict(batch).items():
                for place, row in zip(places, value, strict=True):
                    said[place][name] = row
        return said

    def _follow(self, one: Window, target: Sequence[int] | None) -> dict[str, Array]:
        """What a decoder says at each place of a target, shown what stands before it; and the target as `labels`."""
        if target is None:
            return {}
        if "around" in self.rules:
            target = self._retold(target)
        ends = self.rules.get("ends") or []
        if self.images is not None and ends and (not target or target[-1] not in ends):  # as training ended it
            target = [*target[: self.max_length - 1], int(ends[0])]
        shown = np.array([[int(self.rules.get("start", 0)), *target[:-1]]], np.int64)
        outputs = self.model.predict(
            {**self._source(one.ids if self.images is None else one.pixels), "decoder_input_ids": shown}
        )
        return {**{name: value[0] for name, value in outputs.items()}, "labels": np.array(target, np.int64)}

    def _retold(self, target: Sequence[int]) -> list[int]:
        """A target as training read it: with its own special tokens in place of a source's around it."""
        before, behind = self.rules["around"]
        around = self.tokenizer.encode("a").sequence_ids  # of any text: None before and behind it
        inside = [place for place, text in enumerate(around) if text is not None]
        after = len(around) - inside[-1] - 1
        text = target[inside[0] : len(target) - after]
        return [*before, *text[: self.max_length - len(before) - len(behind)], *behind]

    def _source(self, given: Any) -> dict[str, Array]:
        """A batch of what an encoder reads: the pixels of an image, or the ids of a text."""
        if self.images is not None:
            return {PIXELS: self.images.normalise(given[None])}
        return self.pad([{"input_ids": given, "token_type_ids": [0] * len(given)}])

    def write(self, ids: Any, rules: Rules) -> list[int]:
        """The ids that follow, or that come of these, token by token; of a prompt that is too long the end is read.

        Args:
            ids: At least one; of an image, which has none, its pixels (C, H, W) uint8.
            rules: What may be written, and whether by beams.
        """
        if self.model.encodes:
            return self.model.write(self._source(ids), rules)[0]
        longest = int(self.rules.get("context", self.max_length))
        last = list(ids)[: -1 if len(ids) > 1 and ids[-1] in rules.ends else None]  # the tokenizer's own end
        room = longest - len(last) if len(last) < longest else longest // 2  # what fits is read whole
        rules = replace(rules, max_new_tokens=min(rules.max_new_tokens, room))
        prompt = last[-(longest - rules.max_new_tokens) :]
        if rules.beams > 1:
            return beam(self.model.step, prompt, rules)[0][0]
        return greedy(self.model.step, np.array([prompt], np.int64), rules)[0]

    def _writer(self, new_tokens: int | None) -> Callable[[Any], list[int]] | None:
        if not self.model.writes or new_tokens == 0:
            return None
        rules = Rules.of(self.rules)
        return partial(self.write, rules=rules if new_tokens is None else replace(rules, max_new_tokens=new_tokens))

    def prove(self, window: Window) -> Array:
        """The head's proof of one window; a graph with a memory reads half of it at once and then token by token."""
        ids = np.array([window.ids], np.int64)
        if not self.model.memory:
            return self.head.prove({**self.ask([window])[0], "input_ids": ids[0]})
        half = -(-ids.shape[1] // 2)
        logits, past = self.model.read(ids[:, :half], None)
        said = [logits]
        for place in range(half, ids.shape[1]):
            logits, past = self.model.read(ids[:, place : place + 1], past)
            said.append(logits)
        return self.head.prove({self.model.outputs[0]: np.concatenate(said, axis=1)[0], "input_ids": ids[0]})

    def stream(self, texts: Iterable[Text], *, batch_size: int = 32, new_tokens: int | None = None) -> Iterator[Any]:
        """Predictions in order for any number of texts, holding a few hundred at a time.

        Raises:
            DataError: A text is none that the task takes, named by its place; those before it are answered.
        """
        waiting, first = iter(texts), 0
        while chunk := list(islice(waiting, STREAM)):
            try:
                found: Iterable[Any] = self.predict(chunk, batch_size=batch_size, new_tokens=new_tokens)
            except DataError:
                found = self._until_refused(chunk, first, new_tokens)
            yield from found
            first += len(chunk)

    def _until_refused(self, texts: Sequence[Text], first: int, new_tokens: int | None) -> Iterator[Any]:
        """Asks texts alone until the one at fault, counted on from `first`."""
        for place, text in enumerate(texts, first):
            try:
                yield from self.predict([text], new_tokens=new_tokens)
            except DataError as error:
                where = f"text {place}" if error.where == "text 0" else error.where
                raise DataError(error.what, where=where, fix=error.fix) from None

    def encode(self, texts: Sequence[Text]) -> list[dict[str, list[int]]]:
        """Token ids and token types of each text's first window, special tokens included; no prefix is put before it.

        Raises:
            DataError: One of them is neither a string nor a pair of strings.
        """
        found = self.head.windows(self.reader, texts)
        return [{"input_ids": list(row[0].ids), "token_type_ids": list(row[0].types)} for row in found]

    def pad(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Array]:
        """Rows of ids to `input_ids`, `attention_mask` and `token_type_ids`, (B, L) int64 each."""
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: np.full((len(rows), longest), self._padding.get(name, 0), np.int64)
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = row["input_ids"]
            batch["token_type_ids"][index, :length] = row["token_type_ids"]
            batch["attention_mask"][index, :length] = 1
        return batch


def _tokenizer(folder: Path) -> Tokenizer:
    path = inside(folder, "tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"cannot be read ({reason})", where=str(path), fix="Copy the whole bundle again.") from None


def _side(folder: Path) -> str:
    """Where the tokenizer cuts, as transformers keeps it."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return "right"
    try:
        said = json.loads(inside(folder, path.name).read_text(encoding="utf-8")).get("truncation_side", "right")
    except (ValueError, AttributeError) as error:
        raise BundleError(f"cannot be read ({error})", where=str(path), fix="Copy the whole bundle again.") from None
    return "left" if said == "left" else "right"


def _preprocessing(folder: Path) -> Preprocessing:
    path = inside(folder, CONFIG)
    try:
        return Preprocessing.of(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:  # DataError is a ValueError
        raise BundleError(f"cannot be read ({error})", where=str(path), fix="Copy the whole bundle again.") from None


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the bundle.

    Raises:
        BundleError: It is missing, or lies outside the folder, by `..`, an absolute path or a link; the links of the
            hub's cache are known.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) and not stored_by_hub(folder, path):
        raise BundleError(f"{name} lies outside the bundle", where=str(folder), fix="Name a file inside the folder.")
    if not path.is_file():
        raise BundleError(f"{name} is missing", where=str(folder), fix="Copy the whole bundle again.")
    return path


def stored_by_hub(folder: Path, path: Path) -> bool:
    """The folder is a snapshot in the hub's cache, and the file a link to one of that repository's blobs."""
    snapshots = folder.resolve().parent
    return snapshots.name == "snapshots" and path.resolve().parent == snapshots.parent / "blobs"
