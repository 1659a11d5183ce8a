"""A smaller vocabulary: keep the pieces that the texts need, and give every piece a new number.

    counts = count_pieces(texts, tokenizer)
    trimmed = trim_vocabulary(tokenizer, counts)          # or keep=8000
    check_identical(tokenizer, trimmed, texts)            # proves it
    measure_coverage(tokenizer, trimmed, held_out)        # what other text will meet
    student = trim_embeddings(model, trimmed.kept_ids)

It stands before training, where the smaller table also makes every step faster.
"""

from __future__ import annotations

import copy
import json
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import nn
from transformers import PreTrainedModel

from distill.errors import StudentError
from distill.progress import SILENT, Progress
from distill.student.tokenizer_json import (
    Ancestry,
    Spec,
    always_needed,
    check_kind,
    core,
    fallback_pieces,
    keep_only,
    pieces_of,
)

_BATCH = 1000  # texts a call of the tokenizer, which spreads them over its threads
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True, slots=True)
class Trimmed:
    """A tokenizer with fewer pieces.

    Attributes:
        tokenizer: Of the type that was given; the one given stays as it is.
        kept_ids: The old id of each new id, ascending.
        before: Pieces before, added tokens included.
        unknown: New id of the unknown token; None where there is none.
    """

    tokenizer: Any
    kept_ids: tuple[int, ...]
    before: int
    unknown: int | None

    @property
    def after(self) -> int:
        """Pieces that are left."""
        return len(self.kept_ids)

    @property
    def old_to_new(self) -> dict[int, int]:
        """New id of each kept old id."""
        return {old: new for new, old in enumerate(self.kept_ids)}

    def lookup(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """int64 array: new id at each old id, -1 where the piece is gone. Turns ids encoded before into new ones."""
        table = np.full(max(self.before, self.kept_ids[-1] + 1), -1, np.int64)
        table[list(self.kept_ids)] = np.arange(self.after)
        return table

    def rows(self, width: int) -> list[list[str]]:
        """Pieces, fp32 bytes and int8 bytes of a table `width` wide, before and after: for a printed table."""
        sizes = (("before", self.before), ("after", self.after), ("saved", self.before - self.after))
        return [[name, f"{n:,}", f"{n * width * 4:,}", f"{n * width:,}"] for name, n in sizes]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How a trimmed tokenizer does on text that it was not trimmed for.

    Attributes:
        texts: How many there were.
        identical: Texts that give the same pieces as before.
        tokens_before: Pieces of all texts before, special tokens left out.
        tokens_after: The same after; more, where words fall into smaller pieces.
        unknown_before: Unknown tokens before.
        unknown_after: Unknown tokens after.
    """

    texts: int
    identical: int
    tokens_before: int
    tokens_after: int
    unknown_before: int
    unknown_after: int


def count_pieces(texts: Iterable[str], tokenizer: Any, *, progress: Progress = SILENT) -> Counter[int]:
    """How often each piece occurs in `texts`, whole texts, without special tokens.

    Args:
        texts: Read once.
        tokenizer: A fast tokenizer of transformers, or one of tokenizers.
        progress: Told about texts as they are counted.
    """
    counts: Counter[int] = Counter()
    plain = _plain(tokenizer)
    with progress.stage("Counting pieces", unit="texts") as stage:
        for batch in _batches(texts):
            for encoding in plain.encode_batch(batch, add_special_tokens=False):
                counts.update(encoding.ids)
            stage.advance(len(batch))
    return counts


def trim_vocabulary(
    tokenizer: Any,
    counts: Mapping[int, int],
    *,
    keep: Literal["used"] | int = "used",
    safety: Iterable[str] = (),
    characters: Literal["all", "used"] = "used",
) -> Trimmed:
    """Keeps special tokens, single characters and what the counted texts need, and drops the rest.

    Text whose pieces are all kept is split exactly as before. Other text falls into smaller pieces, and has a new
    unknown token only where it holds a character whose piece was dropped.

    Args:
        tokenizer: A fast tokenizer of transformers, or one of tokenizers; it stays as it is.
        counts: Occurrences of each id, as `count_pieces` gives them.
        keep: `used` keeps every counted piece. A number keeps that many pieces: the most frequent ones, then, where
            there is room left, the tokenizer's own first ones.
        safety: Texts whose pieces are kept whatever `keep` says.
        characters: `used` keeps the single characters that counted texts and the safety set are written with, ASCII
            and every byte; `all` keeps those of every other script too, and makes no new unknown token at all.

    Raises:
        StudentError: For a kind of tokenizer that cannot be trimmed, or a number too small for what must stay.
    """
    spec = _spec(tokenizer)
    check_kind(spec)
    kept = sorted(_choose(spec, counts, keep, count_pieces(safety, tokenizer), characters))
    changed = keep_only(spec, kept)
    unknown = _plain(Tokenizer.from_str(json.dumps(changed))).token_to_id(_unknown_token(spec))
    return Trimmed(_same_type(tokenizer, changed), tuple(kept), len(pieces_of(spec)), unknown)


def check_identical(tokenizer: Any, trimmed: Trimmed, texts: Iterable[str]) -> int:
    """Proves that the trimmed tokenizer gives the same pieces and offsets for each text; returns how many there were.

    Raises:
        StudentError: Naming the first text that differs.
    """
    count = 0
    for text, before, after in _both(tokenizer, trimmed, texts):
        count += 1
        if not _agree(before, after, trimmed):
            raise StudentError(
                f"the trimmed vocabulary splits {text[:80]!r} into {after.tokens[:12]}, before {before.tokens[:12]}",
                where="student.vocabulary",
                fix='Count this text too, or set it to "full".',
            )
    return count


def measure_coverage(tokenizer: Any, trimmed: Trimmed, texts: Iterable[str]) -> Coverage:
    """Compares both tokenizers on other text, special tokens left out."""
    old_unknown = _plain(tokenizer).token_to_id(_unknown_token(_spec(tokenizer)))
    totals = np.zeros(6, np.int64)
    for _, before, after in _both(tokenizer, trimmed, texts):
        unknown = [sum(i == number for i in e.ids) for e, number in ((before, old_unknown), (after, trimmed.unknown))]
        totals += [1, _agree(before, after, trimmed), len(before.ids), len(after.ids), *unknown]
    return Coverage(*map(int, totals))


def trim_embeddings(model: Model, kept_ids: Sequence[int]) -> Model:
    """A copy of a model whose tables and output over tokens hold the kept rows alone.

    Args:
        model: Any transformers model; it stays as it is.
        kept_ids: The old id of each new id, as `Trimmed.kept_ids`.

    Raises:
        StudentError: When the model has fewer rows than the ids ask for.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if max(kept_ids) >= rows:
        raise StudentError(
            f"the vocabulary has ids up to {max(kept_ids)}, the model's embedding has {rows} rows",
            where="student.vocabulary",
            fix="They belong to different models: trim the tokenizer of this model.",
        )
    small = copy.deepcopy(model)
    kept = torch.tensor(kept_ids)
    new = {old: number for number, old in enumerate(kept_ids)}
    for module in _vocabulary_modules(small):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.shape[0] == rows:
                values = parameter.detach().index_select(0, kept.to(parameter.device)).clone()
                setattr(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(kept_ids)
            module.padding_idx = new.get(module.padding_idx) if module.padding_idx is not None else None
        elif isinstance(module, nn.Linear):
            module.out_features = len(kept_ids)
    _renumber_config(small.config, new)
    small.tie_weights()
    return small


def _vocabulary_modules(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The token table, the output over tokens, and what else of the head has a number for each token."""
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    yield table
    if output is not None:
        yield output
        inside = set(model.base_model.modules()) if model.base_model is not model else set()
        yield from (module for module in model.modules() if module not in inside and module is not output)


def _renumber_config(config: Any, new: Mapping[int, int]) -> None:
    for key, value in config.to_dict().items():
        if key.endswith("_token_id") and isinstance(value, int):
            setattr(config, key, new.get(value))
    config.vocab_size = len(new)


def _choose(
    spec: Spec,
    counts: Mapping[int, int],
    keep: Literal["used"] | int,
    safety: Mapping[int, int],
    characters: Literal["all", "used"],
) -> set[int]:
    pieces, ancestry = pieces_of(spec), Ancestry(spec)
    used = {number for number, count in counts.items() if count > 0} | set(safety)
    written = set(string.printable).union(*(core(spec, pieces[number]) for number in used))
    alphabet = None if characters == "all" else written
    kept = always_needed(spec) | fallback_pieces(spec, alphabet)
    for number in [*kept, *safety]:
        kept |= ancestry.of(number)
    if keep == "used":
        return kept.union(*(ancestry.of(number) for number in used))
    if len(kept) > keep:
        raise StudentError(
            f"{keep} pieces are too few: special tokens, single characters and the safety set take {len(kept)}",
            where="student.vocabulary",
            fix=f'Set it to {len(kept)} or more, or to "used".',
        )
    frequent = sorted(used, key=lambda number: (-counts.get(number, 0), number))
    others = (number for number in sorted(pieces) if number not in used and not pieces[number].startswith("[unused"))
    for number in [*frequent, *others]:
        if len(kept) == keep:
            break
        wanted = kept | ancestry.of(number) if number not in kept else kept
        kept = wanted if len(wanted) <= keep else kept
    return kept


def _both(tokenizer: Any, trimmed: Trimmed, texts: Iterable[str]) -> Iterator[tuple[str, Encoding, Encoding]]:
    before, after = _plain(tokenizer), _plain(trimmed.tokenizer)
    for batch in _batches(texts):
        encoded = (side.encode_batch(batch, add_special_tokens=True) for side in (before, after))
        yield from zip(batch, *encoded, strict=True)


def _agree(before: Encoding, after: Encoding, trimmed: Trimmed) -> bool:
    kept = trimmed.kept_ids
    return [kept[number] for number in after.ids] == before.ids and after.offsets == before.offsets


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _backend(tokenizer: Any) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise StudentError(
            f"{type(tokenizer).__name__} has no tokenizer.json behind it",
            where="student.vocabulary",
            fix="Use a fast tokenizer.",
        )
    return backend


def _spec(tokenizer: Any) -> Spec:
    spec: Spec = json.loads(_backend(tokenizer).to_str())
    return spec


def _plain(tokenizer: Any) -> Tokenizer:
    """A copy that neither cuts nor pads."""
    plain = Tokenizer.from_str(_backend(tokenizer).to_str())
    plain.no_truncation()
    plain.no_padding()
    return plain


def _unknown_token(spec: Spec) -> str:
    model = spec["model"]
    if model["type"] == "Unigram":
        return model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else ""
    return model.get("unk_token") or ""


def _same_type(tokenizer: Any, spec: Spec) -> Any:
    """The new tokenizer in the wrapper that the old one came in."""
    backend = Tokenizer.from_str(json.dumps(spec))
    if isinstance(tokenizer, Tokenizer):
        return backend
    wrapped: Any = copy.deepcopy(tokenizer)
    wrapped._tokenizer = backend
    if hasattr(wrapped, "_vocab"):
        wrapped._vocab = spec["model"]["vocab"]
    if hasattr(wrapped, "vocab_file"):
        wrapped.vocab_file = None  # a sentencepiece file of the old vocabulary must not be saved beside the new one
    return wrapped
