"""Answers that stand in a text, as in SQuAD: `text` is the question, `text_pair` the context."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from distill.heads.spans import QUESTION, Answer, Read, answer, cut_question, null_score, overlap, spans
from distill.tasks.base import GraphSpec, Task
from distill.tasks.encoded import NO_LABEL, SOURCE, Array, Batch, Encoded, Padding, pack, pad_columns

SILENT = 1e9
"""The margin of a context without a token: no threshold makes it answer."""


class QuestionAnswering(Task):
    """Start and end of the answer. A long context is read in overlapping windows, each with the whole question.

    Tokens of the question and padding are ruled out; the first token of a window stands for no answer in it.
    """

    name: ClassVar[str] = "question-answering"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    metric: ClassVar[str] = "f1"
    preset: ClassVar[str] = "logits+hidden"
    losses: ClassVar[Mapping[str, str]] = {"soft_labels": "soft_spans", "hard_labels": "span_labels"}
    suffixes: ClassVar[tuple[str, ...]] = ("ForQuestionAnswering",)
    target: ClassVar[str] = "span"
    pairs: ClassVar[Literal["allowed", "required", "none"]] = "required"
    named: ClassVar[bool] = False

    def configure(self, config: Any, labels: Sequence[str]) -> None:
        """Two outputs a token, as every config of transformers has."""
        config.num_labels = 2

    def number(self, label: Any, numbers: Mapping[str, int]) -> Any:
        """Answers as they are."""
        return label

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids by window; `labels` are the answer's first and last token, 0 and 0 where the window lacks it."""
        given = {"text": list(rows["text"]), "text_pair": list(rows["text_pair"]), "label": list(rows["label"])}
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # whatever the call before asked for
        asked = [cut_question(backend, question, int(QUESTION * max_length)) for question in given["text"]]
        cut = sum(len(one) < len(whole) for one, whole in zip(asked, given["text"], strict=True))
        tokens = tokenizer(
            asked,
            given["text_pair"],
            truncation="only_second",
            max_length=max_length,
            stride=overlap(max_length, backend.num_special_tokens_to_add(True)),
            return_overflowing_tokens=True,
            return_attention_mask=False,
        )
        source = np.array(tokens["overflow_to_sample_mapping"], np.int64)
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        ragged: dict[str, list[list[int]]] = {name: tokens[name] for name in names}
        for name in ("inside", "begins", "ends"):
            ragged[name] = []
        labels = np.full((len(source), 2), NO_LABEL, np.int64)
        for place, (row, encoding) in enumerate(zip(source, tokens.encodings, strict=True)):
            ragged["inside"].append([int(sequence == 1) for sequence in encoding.sequence_ids])
            ragged["begins"].append([begin for begin, _ in encoding.offsets])
            ragged["ends"].append([end for _, end in encoding.offsets])
            if given["label"][row] is not None:
                labels[place] = _positions(
                    given["label"][row], *(ragged[name][-1] for name in ("inside", "begins", "ends"))
                )
        packed = pack(ragged, {SOURCE: source, "labels": labels})
        return Encoded(packed.ragged, packed.flat, packed.offsets, cut=cut, given=given)

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """input_ids, attention_mask, token_type_ids, inside (B, L); labels, scored (B, 2); example (B,)."""
        batch = pad_columns(rows, padding)
        batch["labels"] = np.array([row["labels"] for row in rows], np.int64)
        batch["scored"] = np.ones((len(rows), 2), bool)
        batch["inside"] = Padding().stack(rows, "inside", batch["input_ids"].shape[1]).astype(bool)
        batch["inside"][:, 0] = True  # no answer
        return batch

    def labelled(self, encoded: Encoded) -> bool:
        """Some question has an answer, or is known to have none."""
        return any(label is not None for label in encoded.given["label"])

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """F1 over words and exact match, as SQuAD's own script counts them, the best of several answers."""
        said = self._answers(outputs, encoded, settings)
        gold = encoded.given["label"]
        pairs = [(one.text, label["text"] or [""]) for one, label in zip(said, gold, strict=True) if label is not None]
        return {
            "f1": float(np.mean([max(word_f1(one, other) for other in texts) for one, texts in pairs])),
            "exact_match": float(np.mean([max(plain(one) == plain(other) for other in texts) for one, texts in pairs])),
        }

    def calibrate(self, outputs: Mapping[str, Array], encoded: Encoded) -> dict[str, Any]:
        """How much higher no answer must score to be said; nothing where every question has an answer."""
        known = [row for row, label in enumerate(encoded.given["label"]) if label is not None]
        if all(encoded.given["label"][row]["text"] for row in known):
            return {}
        reads, margins, gains = self._reads(outputs, encoded), [], []
        for row in known:
            gold, best = encoded.given["label"][row]["text"], spans(reads[row], 1)
            text = encoded.given["text_pair"][row][best[0].start : best[0].end] if best else ""
            margins.append(null_score(reads[row]) - best[0].score if best else SILENT)
            gains.append(max(word_f1(text, other) for other in gold or [""]) - float(not gold))
        order = np.argsort(margins, kind="stable")  # the first k are answered, the others are not
        total = np.cumsum(np.array(gains)[order])
        kept = int(total.argmax())
        return {"null_threshold": float(margins[order[kept]]) if total[kept] > 0 else float(margins[order[0]]) - 1.0}

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`start_logits` and `end_logits` (B, L), over all tokens."""
        names = tuple(inputs)
        outputs = ("start_logits", "end_logits")
        axes = {name: {0: "batch", 1: "length"} for name in (*names, *outputs)}

        def head(output: Any) -> tuple[Any, ...]:
            return output.start_logits, output.end_logits

        return GraphSpec(names, outputs, head, axes)

    def read(self, output: Any) -> dict[str, Any]:
        """Starts and ends."""
        return {"start_logits": output.start_logits, "end_logits": output.end_logits}

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """The same in fp32."""
        return {name: np.asarray(outputs[name], np.float32) for name in ("start_logits", "end_logits")}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """Begin and end of each answer in characters, as one string."""
        return np.array([f"{one.start}:{one.end}" for one in self._answers(outputs, encoded, settings)])

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """Each answer."""
        return [(one.text or "-", one.probability) for one in self._answers(outputs, encoded, settings)]

    def gold(self, encoded: Encoded) -> list[str | None]:
        """The first of the gold answers."""
        return [None if label is None else (label["text"] or ["-"])[0] for label in encoded.given["label"]]

    def _answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None
    ) -> list[Answer]:
        threshold = (settings or {}).get("null_threshold")
        contexts = encoded.given["text_pair"]
        return [
            answer(text, reads, threshold) for text, reads in zip(contexts, self._reads(outputs, encoded), strict=True)
        ]

    def _reads(self, outputs: Mapping[str, Array], encoded: Encoded) -> list[list[Read]]:
        """The windows of each row."""
        rows: list[list[Read]] = [[] for _ in encoded.given["text"]]
        offsets = np.stack([encoded.ragged["begins"], encoded.ragged["ends"]], axis=1)
        for place, row in enumerate(encoded.sources):
            part = slice(encoded.offsets[place], encoded.offsets[place + 1])
            starts, ends = outputs["start_logits"][part], outputs["end_logits"][part]
            rows[row].append(Read(starts, ends, encoded.ragged["inside"][part] == 1, offsets[part]))
        return rows


def _positions(
    label: Mapping[str, Any], inside: Sequence[int], begins: Sequence[int], ends: Sequence[int]
) -> tuple[int, int]:
    """First and last token of the first answer; the first token twice where it is not all in this window."""
    tokens = [place for place, there in enumerate(inside) if there]
    if not label["text"] or not tokens:
        return 0, 0
    begin = label["answer_start"][0]
    end = begin + len(label["text"][0])
    if begins[tokens[0]] > begin or ends[tokens[-1]] < end:
        return 0, 0
    first = max(place for place in tokens if begins[place] <= begin)
    return first, min(place for place in tokens if ends[place] >= end)


def plain(text: str) -> str:
    """Lower case without punctuation, articles and more than one space, as SQuAD's script evaluate-v1.1 compares."""
    kept = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def word_f1(said: str, gold: str) -> float:
    """Harmonic mean of the shares of words that are common, 1 where both are empty (evaluate-v2.0)."""
    one, other = plain(said).split(), plain(gold).split()
    if not one or not other:
        return float(one == other)
    common = sum((Counter(one) & Counter(other)).values())
    return 2.0 * common / (len(one) + len(other))
