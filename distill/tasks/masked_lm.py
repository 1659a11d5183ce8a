"""Masked language models: general distillation on running text, for no task in particular."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from distill.errors import TeacherError
from distill.tasks.base import GraphSpec, Predictor, Task
from distill.tasks.encoded import NO_LABEL, SOURCE, Array, Batch, Encoded, Padding, pack, pad_columns

MASKED = 0.15
"""Share of the tokens that are to be guessed (1810.04805)."""

HIDDEN, SWAPPED = 0.8, 0.1
"""Shares of those: shown as the mask token; shown as another token of the text. The others are shown as they are."""

SPECIAL, MASK_ID = "special", "mask_id"
"""Columns that masking anew reads: 1 for tokens that are never hidden; what hidden ones are shown as."""


class MaskedLanguageModel(Task):
    """The student guesses masked tokens as its teacher does and relates tokens as it does; its encoder ships.

    Each epoch masks a row anew, as RoBERTa does (1907.11692): drawn from (seed, epoch, example), so that a run repeats
    itself and goes on exactly after an interruption. What is measured has the masks of `encode`, drawn from the text.
    The teacher answers live, for its logits of every token would fill a disk.
    """

    name: ClassVar[str] = "masked-lm"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"
    metric: ClassVar[str] = "masked_accuracy"
    preset: ClassVar[str] = "labels+logits+relations"
    suffixes: ClassVar[tuple[str, ...]] = ("ForMaskedLM",)
    target: ClassVar[str] = "nothing"
    named: ClassVar[bool] = False
    cached: ClassVar[bool] = False
    trims: ClassVar[bool] = False

    def configure(self, config: Any, labels: Sequence[str]) -> None:
        """Nothing: the head belongs to the vocabulary."""

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Masked token ids, a long text in several rows; `labels` are the tokens behind the masks, -100 elsewhere.

        Raises:
            TeacherError: The tokenizer has no mask token.
        """
        if tokenizer.mask_token_id is None:
            raise TeacherError(
                "its tokenizer has no mask token", where="masked-lm", fix="Give a masked language model such as BERT."
            )
        texts = list(rows["text"])
        tokens = tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
        )
        source = np.array(tokens["overflow_to_sample_mapping"], np.int64)
        ragged: dict[str, list[Sequence[int]]] = {"input_ids": [], "labels": []}
        ragged[SPECIAL] = list(tokens["special_tokens_mask"])
        if "token_type_ids" in tokens:
            ragged["token_type_ids"] = list(tokens["token_type_ids"])
        for place, (row, ids) in enumerate(zip(source, tokens["input_ids"], strict=True)):
            part = place - int(np.searchsorted(source, row))
            seed = zlib.crc32(texts[row].encode("utf-8", "surrogatepass"), part)
            shown, labels = mask(
                np.array(ids), np.array(tokens["special_tokens_mask"][place]), tokenizer.mask_token_id, seed
            )
            ragged["input_ids"].append(shown.tolist())
            ragged["labels"].append(labels.tolist())
        return pack(ragged, {SOURCE: source, MASK_ID: np.full(len(source), tokenizer.mask_token_id)})

    def vary(self, row: Mapping[str, Any], seed: int, epoch: int) -> Mapping[str, Any]:
        """Other tokens are hidden in each epoch."""
        known = row["labels"] != NO_LABEL
        ids = np.where(known, row["labels"], row["input_ids"])
        shown, labels = mask(ids, row[SPECIAL], int(row[MASK_ID]), (seed, epoch, int(row["example"])))
        return {**row, "input_ids": shown, "labels": labels}

    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """input_ids, attention_mask, token_type_ids, labels, scored (B, L); example (B,)."""
        batch = pad_columns(rows, padding)
        batch["labels"] = Padding({"labels": NO_LABEL}).stack(rows, "labels", batch["input_ids"].shape[1])
        batch["scored"] = batch["labels"] != NO_LABEL
        return batch

    def labelled(self, encoded: Encoded) -> bool:
        """Some token is masked."""
        return bool((encoded.ragged["labels"] != NO_LABEL).any())

    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Share of masked tokens guessed, and exp of the mean negative log-likelihood of masked tokens."""
        known = encoded.ragged["labels"] != NO_LABEL
        return {
            "masked_accuracy": float((outputs["guess"][known] == encoded.ragged["labels"][known]).mean()),
            "pseudo_perplexity": float(np.exp(outputs["surprise"][known].astype(np.float64).mean())),
        }

    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """`last_hidden_state` (B, L, H) of the encoder; the head for guessing stays behind."""
        names = tuple(inputs)
        axes = {name: {0: "batch", 1: "length"} for name in (*names, "last_hidden_state")}

        def head(output: Any) -> tuple[Any, ...]:
            return (output.last_hidden_state,)

        return GraphSpec(names, ("last_hidden_state",), head, axes)

    @property
    def by_token(self) -> frozenset[str]:
        """Every output."""
        return frozenset(("last_hidden_state", "guess", "surprise"))

    def shipped(self, model: Any) -> Any:
        """The encoder."""
        return model.base_model

    def read(self, output: Any) -> dict[str, Any]:
        """The encoder's states."""
        return {"last_hidden_state": output.last_hidden_state}

    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """The same in fp32."""
        return {"last_hidden_state": np.asarray(outputs["last_hidden_state"], np.float32)}

    def judge(self, predictor: Predictor, model: Any) -> Predictor:
        """Guesses from the predictor's states with the head of `model`."""
        return _Guesses(predictor, model)

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """The guesses."""
        return outputs["guess"][encoded.ragged["labels"] != NO_LABEL]

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """Nothing: single guesses say little."""
        return []

    def gold(self, encoded: Encoded) -> list[str | None]:
        """Nothing."""
        return []


class _Guesses:
    """States of any predictor, read by a PyTorch model's own head at masked tokens alone."""

    def __init__(self, predictor: Predictor, model: Any) -> None:
        self._predictor, self._model = predictor, model

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """`guess` (B, L) int64 and `surprise` (B, L), the negative log-likelihood of the label; 0 where none is."""
        import torch
        from transformers.modeling_outputs import BaseModelOutput

        states = self._predictor.predict(batch)["last_hidden_state"]
        scored = batch["scored"]
        guess, surprise = np.zeros(scored.shape, np.int64), np.zeros(scored.shape, np.float32)
        if not scored.any():
            return {"guess": guess, "surprise": surprise}
        encoder = self._model.base_model
        device = next(encoder.parameters()).device
        given = BaseModelOutput(last_hidden_state=torch.from_numpy(states[scored][None]).to(device))
        encoder.forward = lambda *_, **__: given  # the head alone, whatever the family calls it
        training = self._model.training
        try:
            with torch.inference_mode():
                ids = torch.from_numpy(batch["input_ids"][scored][None]).to(device)
                logits = self._model.eval()(input_ids=ids).logits[0].float()
        finally:
            del encoder.forward
            self._model.train(training)
        labels = torch.from_numpy(batch["labels"][scored]).to(device)
        guess[scored] = logits.argmax(-1).cpu().numpy()
        surprise[scored] = torch.nn.functional.cross_entropy(logits, labels, reduction="none").cpu().numpy()
        return {"guess": guess, "surprise": surprise}


def mask(ids: Array, special: Array, mask_id: int, seed: int | Sequence[int]) -> tuple[Array, Array]:
    """Hides tokens of one row.

    Args:
        ids: (L,) int.
        special: (L,): 1 for tokens that are never hidden.
        mask_id: What most of the hidden ones are shown as.
        seed: Decides which, whatever the ids are.

    Returns:
        The ids that are shown, and the hidden ones, -100 elsewhere. One token at least is hidden where there is one.
    """
    draw = np.random.default_rng(seed)
    chance, fate, other = draw.random(len(ids)), draw.random(len(ids)), draw.random(len(ids))
    chance = np.where(special == 1, 2.0, chance)
    chosen = (chance < MASKED) | (chance == chance.min(initial=2.0))
    chosen &= special == 0
    labels = np.where(chosen, ids, NO_LABEL)
    inside = np.flatnonzero(special == 0)
    swapped = ids[inside[(other * len(inside)).astype(int)]] if len(inside) else ids
    shown = np.where(fate < HIDDEN, mask_id, np.where(fate < HIDDEN + SWAPPED, swapped, ids))
    return np.where(chosen, shown, ids), labels
