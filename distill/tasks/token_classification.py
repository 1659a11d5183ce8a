"""One label a word: named entities, slots, parts of speech."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distill.heads.tagging import STRIDE, entities, first_pieces, names_parts
from distill.tasks.base import GraphSpec, Task
from distill.tasks.encoded import NO_LABEL, SOURCE, Array, Batch, Encoded, Padding, pack, pad_columns, softmax


class TokenClassification(Task):
    """Tagging of words. The first token of a word carries its label; the others are neither scored nor distilled.

    A sentence longer than the maximum is read in overlapping windows, and each word counts once: in the window that
    shows it with the most text around it.
    """

    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "f1"
    preset: ClassVar[str] = "logits+hidden"
    suffixes: ClassVar[tuple[str, ...]] = ("ForTokenClassification",)
    inputs: ClassVar[str] = "words"
    target: ClassVar[str] = "tags"

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids by window; `labels` is -100 on all but the first tokens of labelled words, `scored` 1 on those."""
        given = {"text": list(rows["text"]), "label": list(rows["label"])}
        tokens = tokenizer(
            given["text"],
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            stride=int(STRIDE * max_length),
            return_overflowing_tokens=True,
            return_attention_mask=False,
        )
        source = np.array(tokens["overflow_to_sample_mapping"], np.int64)
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        ragged: dict[str, list[list[int]]] = {name: tokens[name] for name in names}
        ragged["labels"] = [[NO_LABEL] * len(ids) for ids in tokens["input_ids"]]
        ragged["scored"] = [[0] * len(ids) for ids in tokens["input_ids"]]
        ragged["words"] = [[NO_LABEL] * len(ids) for ids in tokens["input_ids"]]
        begins = np.searchsorted(source, np.arange(len(given["text"]) + 1))
        for row, tags in enumerate(given["label"]):
            windows = [encoding.word_ids for encoding in tokens.encodings[begins[row] : begins[row + 1]]]
            for word, (place, position) in first_pieces(windows).items():
                window = int(begins[row]) + place
                ragged["scored"][window][position] = 1
                ragged["words"][window][position] = word
                if tags is not None:
                    ragged["labels"][window][position] = tags[word]
        packed = pack(ragged, {SOURCE: source})
        return Encoded(packed.ragged, packed.flat, packed.offsets, given=given)

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """input_ids, attention_mask, token_type_ids, labels, scored (B, L); example (B,)."""
        batch = pad_columns(rows, padding)
        longest = batch["input_ids"].shape[1]
        batch["labels"] = Padding({"labels": NO_LABEL}).stack(rows, "labels", longest)
        batch["scored"] = Padding().stack(rows, "scored", longest).astype(bool)
        return batch

    def number(self, label: Any, numbers: Mapping[str, int]) -> Any:
        """Class numbers of the tags of a sentence."""
        return None if label is None else [numbers[tag] for tag in label]

    def plain(self, text: Any) -> str:
        """The words with a space between."""
        return " ".join(text)

    def labelled(self, encoded: Encoded) -> bool:
        """Some word has a label."""
        return bool((encoded.ragged["labels"] != NO_LABEL).any())

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """F1, precision and recall of whole entities, as seqeval counts them, and accuracy over words.

        Where no name of a class begins with `B-` or `I-`, such as parts of speech, there are no entities: F1, precision
        and recall are micro averages over words whose class is not `O`.
        """
        labels = encoded.ragged["labels"]
        known = labels != NO_LABEL
        chosen = outputs["logits"].argmax(axis=-1)
        gold, said = self._sentences(labels, encoded), self._sentences(chosen, encoded)
        both = [
            (one, other) for row, (one, other) in enumerate(zip(gold, said, strict=True)) if self._has(encoded, row)
        ]
        gold, said = [one for one, _ in both], [other for _, other in both]
        scores = _of_entities if names_parts(encoded.names) else _of_words
        return {**scores(gold, said), "accuracy": float((chosen[known] == labels[known]).mean())}

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`logits` (B, L, C) first, then their softmax as `probabilities`."""
        names = tuple(inputs)
        outputs = ("logits", "probabilities")
        axes = {name: {0: "batch", 1: "length"} for name in (*names, *outputs)}

        def head(output: Any) -> tuple[Any, ...]:
            return output.logits, output.logits.softmax(-1)

        return GraphSpec(names, outputs, head, axes)

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Logits in fp32 and their softmax."""
        logits = np.asarray(outputs["logits"], np.float32)
        return {"logits": logits, "probabilities": softmax(logits)}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """The name of each word's class, as a model without that word names none."""
        return np.array([tag for tags in self._sentences(outputs["logits"].argmax(axis=-1), encoded) for tag in tags])

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """The entities of each sentence as `label=text`, and the probability of its least sure word."""
        tags = self._sentences(outputs["logits"].argmax(axis=-1), encoded)
        sure = outputs["probabilities"].max(axis=-1)
        scored = encoded.ragged["scored"] == 1
        rows = np.repeat(encoded.sources, encoded.lengths)[scored]
        least = np.ones(len(tags))
        np.minimum.at(least, rows, sure[scored])
        texts = encoded.given["text"]
        return [
            (_shown(words, found, encoded.names), float(low))
            for words, found, low in zip(texts, tags, least, strict=True)
        ]

    def gold(self, encoded: Encoded) -> list[str | None]:
        """The entities of each sentence by its labels."""
        tags = self._sentences(encoded.ragged["labels"], encoded)
        texts = encoded.given["text"]
        return [
            _shown(words, found, encoded.names) if self._has(encoded, row) else None
            for row, (words, found) in enumerate(zip(texts, tags, strict=True))
        ]

    def _has(self, encoded: Encoded, row: int) -> bool:
        return encoded.given["label"][row] is not None

    def _sentences(self, numbers: Array, encoded: Encoded) -> list[list[str]]:
        """By sentence the name of each of its words' classes; `numbers` has an entry a token."""
        tags: list[list[str]] = [["O"] * len(words) for words in encoded.given["text"]]
        scored = encoded.ragged["scored"] == 1
        rows = np.repeat(encoded.sources, encoded.lengths)[scored]
        for row, word, number in zip(rows, encoded.ragged["words"][scored], numbers[scored], strict=True):
            tags[row][word] = encoded.names[number] if number != NO_LABEL else "O"
        return tags


def _of_entities(gold: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> dict[str, float]:
    from seqeval.metrics import f1_score, precision_score, recall_score

    counts = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {name: float(count(gold, said, zero_division=0)) for name, count in counts.items()}


def _of_words(gold: Sequence[Sequence[str]], said: Sequence[Sequence[str]]) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    ours, theirs = ([tag for tags in sentences for tag in tags] for sentences in (gold, said))
    counted = sorted({*ours, *theirs} - {"O"})
    found = precision_recall_fscore_support(ours, theirs, labels=counted, average="micro", zero_division=0)
    precision, recall, f1 = found[:3] if counted else (0.0, 0.0, 0.0)
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall)}


def _shown(words: Sequence[str], tags: Sequence[str], names: Sequence[str]) -> str:
    """Entities in words."""
    begins = np.concatenate([[0], np.cumsum([len(word) + 1 for word in words])])
    spans = [(int(begins[i]), int(begins[i]) + len(word)) for i, word in enumerate(words)]
    found = entities(" ".join(words), spans, tags, [1.0] * len(words), ends=names_parts(names))
    return "; ".join(f"{one.label}={one.text}" for one in found) or "-"
