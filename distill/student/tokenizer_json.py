"""tokenizer.json with fewer pieces: what must stay, what a piece is made from, and every id rewritten.

Works on the JSON that `tokenizers` writes, for WordPiece, BPE (byte-level or not), Unigram and WordLevel models.
Why a subset gives the same output on the text it covers:

    WordPiece   takes the longest piece that matches; the one it took is still there, and no longer one has come
    Unigram     takes the best-scored path; the one it took is still there, and no better one has come
    BPE         applies the earliest merge that fits; the ones it applied are all still there, and no other has come
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import pairwise
from typing import Any

from distill.errors import StudentError

Spec = dict[str, Any]
"""A parsed tokenizer.json."""

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def check_kind(spec: Spec) -> None:
    """Refuses a model that is not one of `KINDS`.

    Raises:
        StudentError: Naming the kind.
    """
    if spec["model"].get("type") not in KINDS:
        raise StudentError(
            f"its tokenizer is a {spec['model'].get('type')!r} model, which cannot be trimmed",
            where="student.vocabulary",
            fix=f'Set it to "full"; {", ".join(KINDS)} can be trimmed.',
        )


def pieces_of(spec: Spec) -> dict[int, str]:
    """Text of each id: the model's pieces, then added tokens."""
    vocab = spec["model"]["vocab"]
    rows = enumerate(entry[0] for entry in vocab) if isinstance(vocab, list) else ((i, p) for p, i in vocab.items())
    return dict(rows) | {token["id"]: token["content"] for token in spec.get("added_tokens", [])}


def always_needed(spec: Spec) -> set[int]:
    """Ids without which the tokenizer would not work or would answer otherwise: whatever the text is."""
    model, pieces = spec["model"], pieces_of(spec)
    needed = {token["id"] for token in spec.get("added_tokens", [])}
    needed |= {number for number, piece in pieces.items() if _BYTE.fullmatch(piece) or piece == model.get("unk_token")}
    needed |= set(_named_ids(spec))
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        # An unknown character costs ten more than the worst piece, so the worst piece decides about those.
        needed |= {scores.index(min(scores))}
        needed |= {model["unk_id"]} if model.get("unk_id") is not None else set()
    return needed


def core(spec: Spec, piece: str) -> str:
    """A piece without the marks that say where in a word it stands: `##ing` is `ing`, `ing</w>` is `ing`."""
    model = spec["model"]
    return piece.removeprefix(model.get("continuing_subword_prefix") or "").removesuffix(
        model.get("end_of_word_suffix") or ""
    )


def fallback_pieces(spec: Spec, characters: Collection[str] | None = None) -> set[int]:
    """Single characters, and pieces that single characters cannot replace.

    With these kept, no text that had no unknown token before has one afterwards.

    Args:
        spec: The tokenizer.
        characters: Only what these are written with is kept; None keeps all of them. Bytes are always all kept.
    """
    if spec["model"]["type"] == "WordLevel":
        return set()
    pieces = pieces_of(spec)
    texts = set(pieces.values())
    wanted = None if characters is None or _is_byte_level(spec) else set(characters)
    kept = set()
    for number, piece in pieces.items():
        if wanted is not None and not wanted.issuperset(core(spec, piece)):
            continue
        if len(core(spec, piece)) == 1 or not texts.issuperset(_letters(spec, piece)):
            kept.add(number)
    return kept


class Ancestry:
    """For BPE, the pieces that merges pass through on the way to a piece; for others, nothing.

    Args:
        spec: The tokenizer.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.pieces = pieces_of(spec)
        self.ids = {piece: number for number, piece in self.pieces.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(_merges(spec))}

    def of(self, number: int) -> set[int]:
        """The id itself with all that leads to it."""
        if not self.ranks:
            return {number}
        found = {number}
        parts = _letters(self.spec, self.pieces[number])
        steps = [*parts]
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, len(self.ranks)), at) for at, pair in enumerate(pairwise(parts)))
            if rank == len(self.ranks):
                break
            parts[at : at + 2] = [_joined(self.spec, parts[at], parts[at + 1])]
            steps.append(parts[at])
        # A piece that merges do not reach is only ever taken whole (`ignore_merges`, added tokens).
        return found | {self.ids[step] for step in steps if step in self.ids} if len(parts) == 1 else found


def keep_only(spec: Spec, kept: list[int]) -> Spec:
    """The same tokenizer with the pieces of `kept` alone, numbered by their place in it.

    Args:
        spec: The tokenizer; it stays as it is.
        kept: Old ids in ascending order, closed under `Ancestry`.
    """
    new = {old: number for number, old in enumerate(kept)}
    model = dict(spec["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        rows = sorted((new[old], piece) for piece, old in model["vocab"].items() if old in new)
        model["vocab"] = {piece: number for number, piece in rows}
    if "merges" in model:
        vocab = model["vocab"]
        pairs = zip(model["merges"], _merges(spec), strict=True)
        model["merges"] = [m for m, (a, b) in pairs if a in vocab and b in vocab and _joined(spec, a, b) in vocab]
    changed = dict(spec) | {"model": model}
    changed["added_tokens"] = [token | {"id": new[token["id"]]} for token in spec.get("added_tokens", [])]
    changed["post_processor"] = _renumber(spec.get("post_processor"), new)
    if spec.get("padding"):
        changed["padding"] = spec["padding"] | {"pad_id": new[spec["padding"]["pad_id"]]}
    return changed


def _named_ids(spec: Spec) -> Iterator[int]:
    """Every id that is named outside the vocabulary: by padding and by the post-processor."""
    if spec.get("padding"):
        yield spec["padding"]["pad_id"]
    yield from _processor_ids(spec.get("post_processor"))


def _processor_ids(processor: Any) -> Iterator[int]:
    if not processor:
        return
    for inner in processor.get("processors", []):
        yield from _processor_ids(inner)
    for key in ("sep", "cls"):  # BertProcessing and RobertaProcessing: [token, id]
        if key in processor:
            yield processor[key][1]
    if processor.get("type") == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            yield from entry["ids"]


def _renumber(processor: Any, new: dict[int, int]) -> Any:
    """A post-processor whose ids are the new ones."""
    if not processor:
        return processor
    changed = dict(processor)
    if "processors" in processor:
        changed["processors"] = [_renumber(inner, new) for inner in processor["processors"]]
    for key in ("sep", "cls"):
        if key in processor:
            changed[key] = [processor[key][0], new[processor[key][1]]]
    if processor.get("type") == "TemplateProcessing":
        changed["special_tokens"] = {
            name: entry | {"ids": [new[old] for old in entry["ids"]]}
            for name, entry in processor["special_tokens"].items()
        }
    return changed


def _merges(spec: Spec) -> list[tuple[str, str]]:
    """A BPE model's merges, earliest first; older files write them as one string."""
    merges = (m.split(" ") if isinstance(m, str) else m for m in spec["model"].get("merges") or [])
    return [(left, right) for left, right in merges]


def _letters(spec: Spec, piece: str) -> list[str]:
    """The single-character pieces that spell a piece, each with its mark."""
    model, letters = spec["model"], list(core(spec, piece))
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    first = bool(prefix) and piece.startswith(prefix) and piece != prefix
    marked = [letter if at == 0 and not first else f"{prefix}{letter}" for at, letter in enumerate(letters)]
    if suffix and piece.endswith(suffix) and marked:
        marked[-1] += suffix
    return marked


def _joined(spec: Spec, left: str, right: str) -> str:
    return left + right.removeprefix(spec["model"].get("continuing_subword_prefix") or "")


def _is_byte_level(spec: Spec) -> bool:
    return any('"ByteLevel"' in repr(spec.get(key)).replace("'", '"') for key in ("pre_tokenizer", "normalizer"))
