"""A vector for a text: for search, for finding duplicates, for clustering. It is learnt from the teacher's alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distill.tasks.base import Array, Batch, Encoded, GraphSpec, Padding, Task, pack, pad_columns

COMPARED = 1000
"""Texts between which similarities are compared: all pairs of the first ones, half a million at most."""
NEAREST = 5
"""Texts that a search shows."""
VECTOR = "sentence_embedding"
"""An output of the graph; in `Encoded.given` the teacher's, which stands for labels here."""


class SentenceEmbedding(Task):
    """Mean of the last hidden states over a text's tokens, brought to length 1.

    There are no labels: a student is as good as its similarities are the teacher's, so that it may be narrower.
    """

    name: ClassVar[str] = "sentence-embedding"
    auto_class: ClassVar[str] = "AutoModel"
    metric: ClassVar[str] = "spearman"
    preset: ClassVar[str] = "embedding"
    suffixes: ClassVar[tuple[str, ...]] = ("Model",)
    target: ClassVar[str] = "nothing"
    named: ClassVar[bool] = False
    follows: ClassVar[str] = VECTOR
    unmeasured: ClassVar[frozenset[str]] = frozenset({"last_hidden_state"})

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
        closer = (ours > ours[np.arange(len(ours)), right][:, None]).sum(axis=1)
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
            weight = values["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1.0)
            return states, pooled / pooled.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)

        def head(output: Any) -> tuple[Any, ...]:
            return (output.last_hidden_state,)

        return GraphSpec(names, ("last_hidden_state", VECTOR), head, axes, run)

    def read(self, output: Any) -> dict[str, Any]:
        """The last hidden states."""
        return {"last_hidden_state": output.last_hidden_state}

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Hidden states in fp32 and their mean over `attention_mask`, of length 1."""
        states = np.asarray(outputs["last_hidden_state"], np.float32)
        weight = np.asarray(outputs["attention_mask"], np.float32)[..., None]
        pooled = (states * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), 1.0)
        return {"last_hidden_state": states, VECTOR: _unit(pooled)}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """By text the number of the nearest other one."""
        return _similarities(outputs[VECTOR]).argmax(axis=1)

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """By text the nearest other one and its similarity."""
        near = _similarities(outputs[VECTOR])
        chosen = near.argmax(axis=1)
        texts = encoded.given["text"]
        return [(str(texts[other]), float(near[row, other])) for row, other in enumerate(chosen)]

    def gold(self, encoded: Encoded) -> list[str | None]:
        """Nothing: there are no labels."""
        return [None] * len(encoded)

    def files(self, config: Any, max_length: int) -> dict[str, Any]:
        """What sentence-transformers reads beside a model: its steps, and how the second one pools."""
        steps = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        modules = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (path, kind) in enumerate(steps)
        ]
        return {
            "modules.json": modules,
            "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
            "1_Pooling/config.json": {
                "word_embedding_dimension": config.hidden_size,
                "pooling_mode_cls_token": False,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
            },
        }

    def misfit(self, beside: Mapping[str, Any]) -> str:
        """Another pooling than the mean over tokens."""
        pooling = beside.get("1_Pooling/config.json", {})
        modes = [name.removeprefix("pooling_mode_") for name, on in pooling.items() if on is True and "_mode_" in name]
        modes += [str(pooling["pooling_mode"])] if "pooling_mode" in pooling else []
        others = [mode for mode in modes if mode not in ("mean_tokens", "mean")]
        return f"it pools by {', '.join(others)}, and this task by the mean over tokens" if others else ""


def _unit(rows: Array) -> Array:
    """Rows of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _similarities(rows: Array) -> Array:
    """(N, N) cosines; -2 of a text with itself, so that no text is its own neighbour."""
    unit = _unit(np.asarray(rows, np.float32))
    near: Array = unit @ unit.T
    np.fill_diagonal(near, -2.0)
    return near
