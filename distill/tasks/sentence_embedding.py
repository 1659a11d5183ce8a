"""A vector for a text: for search, for finding duplicates, for clustering. It is learnt from the teacher's alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from distill.errors import StudentError
from distill.tasks import pooling
from distill.tasks.architectures import decodes
from distill.tasks.base import GraphSpec, Task
from distill.tasks.encoded import Array, Batch, Encoded, Padding, pack, pad_columns

COMPARED = 1000
"""Texts between which similarities are compared: all pairs of the first ones, half a million at most."""
BLOCK = 1024
"""Texts that are compared with all others at once: of 100,000 rows, 400 MB."""
NEAREST = 5
"""Texts that a search shows."""
VECTOR = "sentence_embedding"
"""An output of the graph; in `Encoded.given` the teacher's, which stands for labels here."""


class SentenceEmbedding(Task):
    """The last hidden states of a text's tokens, pooled as the teacher pools and brought to length 1.

    There are no labels: a student is as good as its similarities are the teacher's. One that is narrower keeps the
    projection it was trained with, so that its vectors have the teacher's width. Nothing is dropped while it learns:
    it follows vectors, and dropout is noise in its own (docs/tasks.md has the curves).
    """

    name: ClassVar[str] = "sentence-embedding"
    auto_class: ClassVar[str] = "AutoModel"
    logits: ClassVar[bool] = False
    metric: ClassVar[str] = "spearman"
    preset: ClassVar[str] = "embedding"
    suffixes: ClassVar[tuple[str, ...]] = ("Model",)
    target: ClassVar[str] = "nothing"
    named: ClassVar[bool] = False
    follows: ClassVar[str] = VECTOR
    prefixes: ClassVar[bool] = True
    dropout: ClassVar[float | None] = 0.0
    beside: ClassVar[tuple[str, ...]] = ("modules.json", "1_Pooling/config.json", f"{pooling.FOLDER}/config.json")
    unmeasured: ClassVar[frozenset[str]] = frozenset({"last_hidden_state"})

    def fits(self, architecture: str) -> bool:
        """As for every task; of an encoder with a decoder the last hidden states are the decoder's."""
        return super().fits(architecture) and not decodes(architecture)

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids, cut to `max_length`."""
        texts = list(rows["text"])
        tokens = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)
        cut = sum(bool(encoding.overflowing) for encoding in tokens.encodings)
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        found = pack({name: tokens[name] for name in names}, {}, cut)
        return Encoded(found.ragged, found.flat, found.offsets, cut=cut, given={"text": texts})

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """input_ids, attention_mask, token_type_ids (B, L); scored, example (B,)."""
        return {**pad_columns(rows, padding), "scored": np.ones(len(rows), bool)}

    def labelled(self, encoded: Encoded) -> bool:
        """The teacher's vectors are there."""
        return VECTOR in encoded.given

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Against the teacher's vectors, over the first `COMPARED` texts.

        spearman: Spearman's correlation of the cosine similarities of all pairs.
        recall_at_1, recall_at_5: share of texts whose nearest other text by the teacher is among so many nearest.
        """
        from scipy.stats import spearmanr

        ours, theirs = (_similarities(np.asarray(each)[:COMPARED]) for each in (outputs[VECTOR], encoded.given[VECTOR]))
        above = np.triu_indices(len(ours), 1)
        apart = len(ours) > 2 and np.ptp(ours[above]) > 0 and np.ptp(theirs[above]) > 0
        right = theirs.argmax(axis=1)
        closer = (ours >= ours[np.arange(len(ours)), right][:, None]).sum(axis=1) - 1  # ties count against; itself not
        return {
            "spearman": float(spearmanr(ours[above], theirs[above]).statistic) if apart else 0.0,
            "recall_at_1": float((closer < 1).mean()),
            f"recall_at_{NEAREST}": float((closer < NEAREST).mean()),
        }

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`last_hidden_state` (B, L, H) first, then `sentence_embedding` (B, H) of length 1."""
        names = tuple(inputs)
        axes: dict[str, dict[int, str]] = {
            name: {0: "batch", 1: "length"} for name in (*names, "last_hidden_state", VECTOR)
        }
        axes[VECTOR] = {0: "batch"}

        def run(model: Any, values: Mapping[str, Any]) -> tuple[Any, ...]:
            states = model(**values, return_dict=True).last_hidden_state
            return states, pooling.vectors(model, states, values["attention_mask"])

        def head(output: Any) -> tuple[Any, ...]:
            return (output.last_hidden_state,)

        return GraphSpec(names, ("last_hidden_state", VECTOR), head, axes, run)

    def ask(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The last hidden states and the vectors."""
        states = model(**inputs).last_hidden_state.float()
        return {"last_hidden_state": states, VECTOR: pooling.vectors(model, states, inputs["attention_mask"])}

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Both in fp32."""
        return {name: np.asarray(outputs[name], np.float32) for name in ("last_hidden_state", VECTOR)}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """By text the number of the nearest other one."""
        return _nearest(outputs[VECTOR])[0]

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """By text the nearest other one and its similarity."""
        texts = encoded.given["text"]
        return [(str(texts[other]), float(near)) for other, near in zip(*_nearest(outputs[VECTOR]), strict=True)]

    def gold(self, encoded: Encoded) -> list[str | None]:
        """Nothing: there are no labels."""
        return [None] * len(encoded)

    def save(self, model: Any, folder: Path, max_length: int) -> None:
        """Writes the model, and its steps as sentence-transformers reads them."""
        pooling.save(model, folder)
        pooling.write_files(model, folder, max_length)

    def restore(self, model: Any, beside: Mapping[str, Any], find: Callable[[str], Path | None]) -> None:
        """How it pools, and the projection of its vectors."""
        pooling.restore(model, beside, find)

    def misfit(self, beside: Mapping[str, Any]) -> str:
        """A pooling that is none of ours, several at once, or further layers behind it."""
        found = pooling.read_pooling(beside)
        if len(found) > 1 or set(found) - set(pooling.POOLINGS):
            return f"it pools by {' and '.join(found)}, and this task by one of {', '.join(pooling.POOLINGS)}"
        steps = [str(step["type"]).rsplit(".", 1)[-1] for step in beside.get("modules.json", ())]
        activation = beside.get(f"{pooling.FOLDER}/config.json", {}).get("activation_function", pooling.IDENTITY)
        if steps and [step for step in steps if step != "Normalize"] not in (
            ["Transformer", "Pooling"], ["Transformer", "Pooling", "Dense"]
        ):  # fmt: skip
            return f"its steps are {', '.join(steps)}, and this task knows Transformer, Pooling, Dense, Normalize"
        if activation != pooling.IDENTITY:
            return f"its Dense layer applies {activation}, and this task a linear one"
        return ""

    def teaches(self, model: Any) -> str:
        """A projection behind the pooling: losses compare what is before it."""
        projects = getattr(model, "sentence_projection", None) is not None
        reason = "its vectors go through a Dense layer, and students learn from what is before that; give one without"
        return reason if projects else ""

    def options(self, teacher: Any) -> dict[str, Any]:
        """Losses pool as the teacher does."""
        kind = pooling.pooling_of(teacher.config)
        return {} if kind == "mean" else {"pooling": pooling.POOLINGS[kind]}

    def keep(self, student: Any, teacher: Any, objective: Any) -> None:
        """A narrower student keeps the projection that brings its vectors to the teacher's width.

        Raises:
            StudentError: It is narrower and pools by the maximum, which no map behind it can follow.
        """
        kind = pooling.pooling_of(teacher.config)
        if kind != "mean":
            student.config.sentence_pooling = kind
        terms = [plan.name for plan in objective.plans if plan.loss.name == "embedding"]
        kept = [objective.projections[name] for name in terms if name in objective.projections]
        if kept and kind == "max":
            raise StudentError(
                f"it is {student.config.hidden_size} wide, its teacher {teacher.config.hidden_size}, and both pool by "
                "the maximum",
                where="student.hidden_size",
                fix="Make it as wide as its teacher: no map of the pooled vector is the map of its tokens.",
            )
        if kept:
            trained = getattr(student, "sentence_projection", None)
            if trained is not None:  # it goes on learning
                kept[0].last.load_state_dict(trained.state_dict())
            student.sentence_projection = kept[0].last


def _unit(rows: Array) -> Array:
    """Rows of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _nearest(rows: Array) -> tuple[Array, Array]:
    """(N,) the number of each row's nearest other one, and their cosine; `BLOCK` rows are compared at once."""
    unit = _unit(np.asarray(rows, np.float32))
    chosen, near = np.zeros(len(unit), np.int64), np.zeros(len(unit), np.float32)
    for begin in range(0, len(unit), BLOCK):
        block: Array = unit[begin : begin + BLOCK] @ unit.T
        own = np.arange(len(block))
        block[own, begin + own] = -2.0  # no text is its own neighbour
        chosen[begin : begin + BLOCK] = block.argmax(axis=1)
        near[begin : begin + BLOCK] = block.max(axis=1)
    return chosen, near


def _similarities(rows: Array) -> Array:
    """(N, N) cosines; -2 of a text with itself, so that no text is its own neighbour."""
    unit = _unit(np.asarray(rows, np.float32))
    near: Array = unit @ unit.T
    np.fill_diagonal(near, -2.0)
    return near
