"""The next token of a text: language models that read from left to right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

import numpy as np

from distill.tasks.architectures import loads
from distill.tasks.base import GraphSpec, Task
from distill.tasks.encoded import NO_LABEL, SOURCE, Array, Batch, Encoded, Padding, pack, pad_columns
from distill.tasks.past import with_past
from distill.tasks.writing import rules_of, unfollowed

NEW_TOKENS = 32
"""How many a bundle writes behind a text where nobody says."""


class CausalLM(Task):
    """Language modelling. Each token is asked for the one behind it, which is its label.

    A text longer than the maximum is read in parts, one behind the other; the first token of a part is asked of nobody.
    Behind the last token of a text that ends, the tokenizer's `eos_token` is asked for.
    """

    name: ClassVar[str] = "causal-lm"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[str] = "likelihood"
    preset: ClassVar[str] = "language"
    suffixes: ClassVar[tuple[str, ...]] = ("LMHeadModel", "ForCausalLM")
    target: ClassVar[str] = "end"
    named: ClassVar[bool] = False
    trims: ClassVar[bool] = False
    relative: ClassVar[bool] = True
    on_policy: ClassVar[bool] = True
    unmeasured: ClassVar[frozenset[str]] = frozenset({"logits"})

    def fits(self, architecture: str) -> bool:
        """As for every task; a name that guessers of masked tokens share, such as XLM's, says too little."""
        return super().fits(architecture) and not loads("AutoModelForMaskedLM", architecture)

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids by part; `labels` is the id behind each token, of the last one the end of a text or -100.

        The column `label` says of each text whether it ends; one that its tokenizer ends already gets no second end.
        """
        texts = list(rows["text"])
        tokens = tokenizer(
            texts, truncation=True, max_length=max_length, return_overflowing_tokens=True, return_attention_mask=False
        )
        parts = [place for place, row in enumerate(tokens["input_ids"]) if row]  # of an empty text there may be none
        ids = [tokens["input_ids"][place] for place in parts]
        source = np.array(tokens["overflow_to_sample_mapping"], np.int64)[parts]
        labels = [[*row[1:], NO_LABEL] for row in ids]
        end = tokenizer.eos_token_id
        for text, part in {int(text): part for part, text in enumerate(source)}.items():  # the last part of each
            if rows["label"][text] and end is not None and ids[part][-1] != end:
                labels[part][-1] = end
        found = pack({"input_ids": ids, "labels": labels}, {SOURCE: source})
        return Encoded(found.ragged, found.flat, found.offsets, given={"text": texts})

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """input_ids, attention_mask, labels, scored (B, L); example (B,)."""
        batch = pad_columns(rows, padding)
        batch["labels"] = Padding({"labels": NO_LABEL}).stack(rows, "labels", batch["input_ids"].shape[1])
        batch["scored"] = batch["labels"] != NO_LABEL
        return batch

    def configure(self, config: Any, labels: Sequence[str]) -> None:
        """Nothing: the head has a row a token."""

    def number(self, label: Any, numbers: Mapping[str, int]) -> Any:
        """Whether the text ends."""
        return label

    def labelled(self, encoded: Encoded) -> bool:
        """Some token has one behind it, or ends a text."""
        return bool((encoded.ragged["labels"] != NO_LABEL).any())

    @property
    def by_token(self) -> frozenset[str]:
        """The logits, and what `digest` makes of them."""
        return frozenset({"logits", "surprise", "chosen"})

    def digest(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """Of the logits, `surprise` (-log of the probability of the token that came, in nats) and `chosen` (B, L)."""
        logits = np.asarray(outputs["logits"], np.float32)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        came = np.take_along_axis(shifted, np.maximum(batch["labels"], 0)[..., None], axis=-1)[..., 0]
        surprise = np.log(np.exp(shifted).sum(axis=-1)) - came
        return {"surprise": np.where(batch["scored"], surprise, 0.0), "chosen": logits.argmax(axis=-1)}

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Over all tokens but the first of each part, and the ends of texts.

        likelihood: geometric mean of the probability of the token that came: 1 / perplexity.
        perplexity: e to the mean surprise; it depends on the tokenizer.
        accuracy: share of tokens that were the most probable ones.
        """
        labels = encoded.ragged["labels"]
        known = labels != NO_LABEL
        surprise = float(outputs["surprise"][known].mean())
        return {
            "likelihood": math.exp(-surprise),
            "perplexity": math.exp(surprise),
            "accuracy": float((outputs["chosen"][known] == labels[known]).mean()),
        }

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`logits` (B, L, V): what follows each token."""
        names = tuple(inputs)
        axes = {name: {0: "batch", 1: "length"} for name in (*names, "logits")}

        def head(output: Any) -> tuple[Any, ...]:
            return (output.logits,)

        return GraphSpec(names, ("logits",), head, axes)

    def exported(self, model: Any, inputs: Iterable[str]) -> GraphSpec:
        """`logits` of the new tokens, then keys and values of all: see `distill.tasks.past`."""
        return with_past(self.graph(inputs), model)

    def rules(self, model: Any) -> dict[str, Any]:
        """As the model's `generation_config` has it but for the length; `context` is how many positions it has."""
        context = getattr(model.config, "max_position_embeddings", None)
        rules = asdict(replace(rules_of(model), max_new_tokens=NEW_TOKENS))
        return rules | ({"context": context} if context else {})

    def unfollowed(self, model: Any) -> list[str]:
        """What of its `generation_config` that leaves out."""
        return unfollowed(model)

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Logits in fp32."""
        return {"logits": np.asarray(outputs["logits"], np.float32)}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """The most probable token behind each."""
        return outputs["chosen"][encoded.ragged["labels"] != NO_LABEL]

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """The perplexity of each text."""
        rows = np.repeat(encoded.sources, encoded.lengths)
        most = len(encoded.given["text"])
        total = np.bincount(rows, outputs["surprise"], most)
        count = np.bincount(rows, encoded.ragged["labels"] != NO_LABEL, most)
        return [("perplexity", float(value)) for value in np.exp(total / np.maximum(count, 1))]

    def apart(self, one: tuple[str, float], other: tuple[str, float]) -> float:
        """How many times one perplexity is the other, less 1."""
        return max(one[1] / other[1], other[1] / one[1]) - 1.0

    def gold(self, encoded: Encoded) -> list[str | None]:
        """Nothing: a text is its own label."""
        return [None] * len(encoded.given["text"])
