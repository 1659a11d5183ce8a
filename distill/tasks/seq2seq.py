"""One text from another: translation, summaries, whatever an encoder with a decoder behind it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from distill.errors import TeacherError
from distill.heads.generation import Rules
from distill.tasks.base import GraphSpec, Predictor, Task
from distill.tasks.encoded import NO_LABEL, Array, Batch, Encoded, Padding, Ragged, pack, pad_columns
from distill.tasks.overlap import compare
from distill.tasks.past import ROWS
from distill.tasks.translation_graph import with_memory
from distill.tasks.writing import rules_of, spelled, unfollowed

UNWRITTEN = -1
"""Fills the rows of `written` behind their ends."""


class Seq2Seq(Task):
    """Encoder and decoder. While it learns, the decoder is shown the target up to each token and asked for that token.

    What is reported is measured on texts that the model writes by itself, as it would in an app. Checkpoints and int8
    forms are chosen by the likelihood of the targets, which takes one pass a batch.
    """

    name: ClassVar[str] = "seq2seq"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    metric: ClassVar[str] = "likelihood"
    preset: ClassVar[str] = "language"
    suffixes: ClassVar[tuple[str, ...]] = ("ForConditionalGeneration", "MTModel")
    target: ClassVar[str] = "text"
    named: ClassVar[bool] = False
    cached: ClassVar[bool] = False
    trims: ClassVar[bool] = False
    cut: ClassVar[Literal["", "decoder", "towers", "captioner"]] = "decoder"
    relative: ClassVar[bool] = True
    prefixes: ClassVar[bool] = True

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids of the source, cut to `max_length`; `labels`, those of the target, cut likewise."""
        texts, targets = list(rows["text"]), [label or "" for label in rows["label"]]
        options = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        sources = tokenizer(texts, **options)
        labels = tokenizer(text_target=targets, **options)
        pairs = zip(sources.encodings, labels.encodings, strict=True)
        cut = sum(bool(one.overflowing or two.overflowing) for one, two in pairs)
        found = pack({"input_ids": sources["input_ids"]}, {"labels": Ragged.of(labels["input_ids"])}, cut)
        given = {"target": targets, "tokenizer": (tokenizer,)}
        return Encoded(found.ragged, found.flat, found.offsets, cut=cut, given=given)

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """input_ids, attention_mask (B, L); decoder_input_ids, labels, scored (B, T); example (B,)."""
        return {**pad_columns(rows, padding), **self.shown(rows, padding)}

    def shown(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """decoder_input_ids, labels, scored (B, T): the target behind the token that a decoder starts with."""
        longest = max(len(row["labels"]) for row in rows)
        begun = [{"decoder_input_ids": [padding.start, *row["labels"][:-1]]} for row in rows]
        labels = Padding({"labels": NO_LABEL}).stack(rows, "labels", longest)
        given = padding.stack(begun, "decoder_input_ids", longest)
        return {"decoder_input_ids": given, "labels": labels, "scored": labels != NO_LABEL}

    def configure(self, config: Any, labels: Sequence[str]) -> None:
        """Nothing: the head has a row a token."""

    def restore(self, model: Any, beside: Mapping[str, Any], find: Callable[[str], Path | None]) -> None:
        """The token before the first written one, where the model's `generation_config` alone names it.

        Raises:
            TeacherError: Nothing names it.
        """
        known = getattr(model.config, "decoder_start_token_id", None)
        start = model.generation_config.decoder_start_token_id if known is None else known
        if start is None:
            raise TeacherError(
                "nothing says what its decoder is shown before the first token",
                where=str(model.name_or_path),
                fix="Set model.generation_config.decoder_start_token_id, of mBART the target language's token, and "
                "save it again.",
            )
        model.config.decoder_start_token_id = int(start)

    def number(self, label: Any, numbers: Mapping[str, int]) -> Any:
        """The target as it is."""
        return label

    def labelled(self, encoded: Encoded) -> bool:
        """Some row has a target."""
        return len(encoded.flat["labels"].values) > 0

    @property
    def by_token(self) -> frozenset[str]:
        """What there is of each token of the target."""
        return frozenset({"surprise", "chosen"})

    def tokens(self, batch: Batch) -> Array:
        """(B,) tokens of each target."""
        return np.asarray(batch["scored"].sum(axis=1))

    def counts(self, encoded: Encoded) -> Array:
        """(rows,) tokens of each target."""
        return np.diff(encoded.flat["labels"].offsets)

    def judge(self, predictor: Predictor, model: Any) -> Predictor:
        """How surprising each token of the target is to the predictor."""
        return _Scores(predictor)

    def examine(self, predictor: Predictor, model: Any) -> Predictor:
        """The same, and what it writes by itself."""
        return _Written(predictor, getattr(predictor, "rules", None) or rules_of(model))

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Over the tokens of the targets, shown the target before each; and, where texts were written, over those.

        likelihood: geometric mean of the probability of the token that came: 1 / perplexity.
        accuracy: share of tokens that were the most probable ones.
        The rest is that of `compare`, in [0, 100].
        """
        labels = encoded.flat["labels"].values
        surprise = float(outputs["surprise"].mean())
        measured = {
            "likelihood": math.exp(-surprise),
            "perplexity": math.exp(surprise),
            "accuracy": float((outputs["chosen"] == labels).mean()),
        }
        if "written" in outputs:
            measured |= compare(self._texts(outputs, encoded), encoded.given["target"])
        return measured

    def _texts(self, outputs: Mapping[str, Array], encoded: Encoded) -> list[str]:
        (tokenizer,) = encoded.given["tokenizer"]
        rows = [row[row != UNWRITTEN].tolist() for row in outputs["written"]]
        return spelled(tokenizer, rows)

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`logits` (B, T, V): what each token of the decoder's input is followed by."""
        names = (*inputs, "decoder_input_ids")
        axes = {name: {0: ROWS, 1: "length"} for name in names}
        axes |= {name: {0: ROWS, 1: "written"} for name in ("decoder_input_ids", "logits")}

        def head(output: Any) -> tuple[Any, ...]:
            return (output.logits,)

        return GraphSpec(names, ("logits",), head, axes)

    def exported(self, model: Any, inputs: Iterable[str]) -> GraphSpec:
        """The same with what the decoder remembers: see `distill.tasks.translation_graph`."""
        return with_memory(self.graph(inputs), model)

    def rules(self, model: Any) -> dict[str, Any]:
        """As the model's `generation_config` has it."""
        return asdict(rules_of(model))

    def around(self, tokenizer: Any) -> dict[str, Any]:
        """Those of mBART and NLLB name the language."""
        source, target = _around(tokenizer(text="a")), _around(tokenizer(text_target="a"))
        return {} if source == target else {"around": target}

    def unfollowed(self, model: Any) -> list[str]:
        """What of its `generation_config` that leaves out."""
        return unfollowed(model)

    def golden(self, row: Mapping[str, Any]) -> Any:
        """The source with its target."""
        return row["text"], row["label"]

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Logits in fp32."""
        return {"logits": np.asarray(outputs["logits"], np.float32)}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """The most probable token at each place of the target."""
        return outputs["chosen"]

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """What was written for each row, and the likelihood of its target."""
        labels = encoded.flat["labels"]
        rows = np.repeat(np.arange(len(labels)), np.diff(labels.offsets))
        total = np.bincount(rows, outputs["surprise"], len(labels))
        likely = np.exp(-total / np.maximum(np.diff(labels.offsets), 1))
        return list(zip(self._texts(outputs, encoded), likely.tolist(), strict=True))

    def apart(self, one: tuple[str, float], other: tuple[str, float]) -> float:
        """How far the texts are apart: 1 less the share of characters that ROUGE-like matching keeps; 0 where equal."""
        from difflib import SequenceMatcher

        return 1.0 - SequenceMatcher(None, one[0], other[0], autojunk=False).ratio()

    def gold(self, encoded: Encoded) -> list[str | None]:
        """The targets."""
        return [target or None for target in encoded.given["target"]]


class _Scores:
    """A predictor's logits, read at the targets alone: those of all tokens of all rows would fill the memory."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """`surprise` (B, T), -log of the probability of the target's token in nats, and `chosen` (B, T) int64."""
        logits = np.asarray(self._predictor.predict(batch)["logits"], np.float32)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        came = np.take_along_axis(shifted, np.maximum(batch["labels"], 0)[..., None], axis=-1)[..., 0]
        surprise = np.log(np.exp(shifted).sum(axis=-1)) - came
        return {"surprise": np.where(batch["scored"], surprise, 0.0), "chosen": logits.argmax(axis=-1)}


class _Written(_Scores):
    """The same with what the predictor writes by itself."""

    def __init__(self, predictor: Any, rules: Rules) -> None:
        super().__init__(predictor)
        self._writer, self._rules = predictor, rules

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """`surprise`, `chosen` (B, T); `written` (B, most) int64, -1 behind the end."""
        rows = self._writer.write(batch, self._rules)
        written = np.full((len(rows), self._rules.max_new_tokens), UNWRITTEN, np.int64)
        for place, row in enumerate(rows):
            written[place, : len(row)] = row
        return {**super().predict(batch), "written": written}


def _around(encoded: Any) -> list[list[int]]:
    """The special tokens before and behind a text."""
    ids, places = encoded["input_ids"], encoded.sequence_ids(0)
    inside = [place for place, text in enumerate(places) if text is not None]
    return [list(ids[: inside[0]]), list(ids[inside[-1] + 1 :])] if inside else [[], list(ids)]
