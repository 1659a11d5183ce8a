"""BERT's tokenizer as ONNX nodes: texts in, token ids out, with two operators of onnxruntime-extensions' string family.

Its ready BertTokenizer is not used: it lowers letters, strips accents and finds punctuation by tables of its own, so
other ids come out of many scripts. Here the table is asked of the tokenizer itself, character by character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper
from tokenizers import Tokenizer

from distill.errors import ExportError

CONTRIB = "ai.onnx.contrib"
MARK = "\U000f0000"  # ends a row; a private character, which BERT's normalizer deletes
PROTECTED = 0xF0001  # the first of as many private characters as there are special tokens
PRIVATE = "[\U000f0000-\U000f00ff]"
HOLE = "\U000f0100"  # for a private character of the text, so that nothing closes up where it was: also deleted
MARK_ID = -2
LONG_RUN = 256
"""Neighbours of one kind that a pattern takes rather than the table; few, for patterns are compiled at each call."""


@dataclass
class Nodes:
    """ONNX nodes and constants in the making, each under a name that no other has."""

    prefix: str = "text"
    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def __call__(self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; gives the name of its output, or of all of them."""
        names = [f"{self.prefix}/{kind}_{len(self.nodes)}_{number}" for number in range(outputs)]
        name = f"{self.prefix}/{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def name(self, value: str, name: str) -> None:
        """Gives a value a name for the outside."""
        self.nodes.append(helper.make_node("Identity", [value], [name], name=f"{self.prefix}/{name}"))

    def value(self, value: Any) -> str:
        """A constant of whole numbers or strings."""
        name = f"{self.prefix}/constant_{len(self.constants)}"
        array = np.asarray(value)
        if array.dtype.kind == "U":
            flat = [str(text).encode() for text in array.reshape(-1)]
            self.constants.append(helper.make_tensor(name, TensorProto.STRING, array.shape, flat))
        else:
            self.constants.append(numpy_helper.from_array(array.astype(np.int64), name))
        return name


@dataclass(frozen=True)
class Letters:
    """What normalizer and pre-tokenizer make of each character.

    Attributes:
        dropped: Characters that vanish.
        spaces: That end a word.
        alone: That are words of their own, as they are.
        changed: All others that do not stay, and what they become.
    """

    dropped: str
    spaces: str
    alone: str
    changed: dict[str, str]


def wordpiece(tokenizer: Tokenizer, texts: str, max_length: int, padding: int) -> tuple[Nodes, dict[str, str]]:
    """Nodes that tokenize a batch of texts.

    Args:
        tokenizer: With BERT's normalizer, pre-tokenizer and special tokens around a text.
        texts: Name of the string input, (B,).
        max_length: Tokens of a row at most, special tokens included.
        padding: Id behind the shorter rows.

    Returns:
        The nodes, and by name of the model's input the output that gives it, (B, L) int64.

    Raises:
        ExportError: The tokenizer is of another kind.
    """
    facts = json.loads(tokenizer.to_str())
    refuse_other_kinds(facts)
    node = Nodes()
    special = [token["content"] for token in facts.get("added_tokens", [])]
    words = _words(node, _rows(node, texts, special), letters_of(facts), special)
    vocab = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    ids, ends = _pieces(node, words, facts["model"], vocab)
    return node, _batch(node, ids, ends, max_length, [vocab[name] for name in around(facts)], padding)


def refuse_other_kinds(facts: dict[str, Any]) -> None:
    """Says which part of a tokenizer.json these nodes do not know.

    Raises:
        ExportError: There is one.
    """
    kinds = {part: (facts.get(part) or {}).get("type") for part in ("model", "normalizer", "pre_tokenizer")}
    wanted = {"model": "WordPiece", "normalizer": "BertNormalizer", "pre_tokenizer": "BertPreTokenizer"}
    odd = [f"{part} is {kind}, not {wanted[part]}" for part, kind in kinds.items() if kind != wanted[part]]
    if not odd and not facts["normalizer"]["clean_text"]:
        odd = ["its normalizer keeps control characters"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = facts.get("added_tokens", [])
    odd += [f"token {t['content']!r} is no plain special token" for t in tokens if plain.items() - t.items()]
    if not odd and len(around(facts)) != 2:
        odd = ["its special tokens are not one before and one after a text"]
    if odd or len(tokens) > 0xFE:
        raise ExportError(
            f"this tokenizer cannot go into the graph: {'; '.join(odd[:3]) or 'too many special tokens'}",
            fix="Ship the bundle, whose tokenizer runs beside the graph.",
        )


def around(facts: dict[str, Any]) -> list[str]:
    """The special tokens before and after a single text."""
    after = facts.get("post_processor") or {}
    if after.get("type") == "BertProcessing":
        return [after["cls"][0], after["sep"][0]]
    pieces = after.get("single") or []
    names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    return names if [next(iter(piece)) for piece in pieces] == ["SpecialToken", "Sequence", "SpecialToken"] else []


def letters_of(facts: dict[str, Any]) -> Letters:
    """Asks a tokenizer's normalizer and pre-tokenizer about every character there is, 1.1 million; some seconds.

    Args:
        facts: Its tokenizer.json.
    """
    parts = {part: facts[part] for part in ("normalizer", "pre_tokenizer")}
    return _letters(json.dumps({**parts, "model": {"type": "BPE", "vocab": {}, "merges": []}}))


@cache
def _letters(facts: str) -> Letters:
    tokenizer = Tokenizer.from_str(facts)
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    dropped, spaces, alone = "", "", ""
    changed: dict[str, str] = {}
    shapes: dict[str, str] = {}

    def shape(letter: str) -> str:
        """A letter as it joins its neighbours, or with spaces where it parts them."""
        if letter not in shapes:
            pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(f"a{letter}a")]
            shapes[letter] = {1: letter, 2: " "}.get(len(pieces), f" {letter} ")
        return shapes[letter]

    for block in _blocks():
        if normalizer.normalize_str(block) == "":  # most of the code space: unassigned or private
            dropped += block
            continue
        for letter in block:
            made = re.sub(" +", " ", "".join(map(shape, normalizer.normalize_str(letter))))
            if made == "":
                dropped += letter
            elif made == " ":
                spaces += letter
            elif made == f" {letter} ":
                alone += letter
            elif made != letter:
                changed[letter] = made
    return Letters(dropped, spaces, alone, changed)


def _blocks() -> Iterator[str]:
    """Every character that a text can hold when this is asked, 256 at a time."""
    for begin in range(0, 0x110000, 256):
        if not 0xD800 <= begin < 0xE000 and begin != ord(MARK):  # surrogates, and the graph's own private ones
            yield "".join(map(chr, range(max(begin, 1), begin + 256)))


def runs_of(letters: str) -> tuple[list[tuple[int, int]], str]:
    """The long runs of neighbouring characters, first and last code of each, and the letters that are in none."""
    runs: list[tuple[int, int]] = []
    for code in sorted(map(ord, letters)):
        if runs and code == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], code)
        else:
            runs.append((code, code))
    few = "".join(chr(code) for low, high in runs if high - low < LONG_RUN for code in range(low, high + 1))
    return [(low, high) for low, high in runs if high - low >= LONG_RUN], few


def _class(runs: list[tuple[int, int]]) -> str:
    """A class of characters for RE2."""
    return "[" + "".join(f"\\x{{{low:X}}}-\\x{{{high:X}}}" for low, high in runs) + "]"


def _replace(node: Nodes, texts: str, pattern: str, by: str) -> str:
    name: str = node("StringRegexReplace", texts, node.value([pattern]), node.value([by]), domain=CONTRIB)
    return name


def _join(node: Nodes, parts: str, axis: int) -> str:
    name: str = node("StringJoin", parts, node.value([""]), node.value([axis]), domain=CONTRIB)
    return name


def _rows(node: Nodes, texts: str, special: list[str]) -> str:
    """All texts in one string, MARK behind each; special tokens inside them as one private character each."""
    parts, _ = node("StringSplit", texts, outputs=2, delimiter=b"\x00")  # the other operators stop at a NUL
    rows = _replace(node, _join(node, parts, 1), PRIVATE, HOLE)
    for number, token in enumerate(special):
        rows = _replace(node, rows, re.escape(token), chr(PROTECTED + number))
    return _join(node, node("StringConcat", rows, node.value([MARK])), 0)


def _words(node: Nodes, text: str, letters: Letters, special: list[str]) -> str:
    """The words of all rows, (W,); MARK and special tokens are words."""
    changed = {MARK: f" {MARK} ", **{chr(PROTECTED + n): f" {token} " for n, token in enumerate(special)}}
    changed |= letters.changed
    for few, form in ((letters.dropped, ""), (letters.spaces, " "), (letters.alone, " {} ")):
        runs, rest = runs_of(few)
        changed |= {letter: form.format(letter) for letter in rest}
        if runs:
            text = _replace(node, text, f"({_class(runs)})", form.format(r"\1"))
    every = node.value(["(?s)(.)"])
    split = node("StringRegexSplitWithOffsets", text, every, every, domain=CONTRIB, outputs=4)[0]
    codes = node(
        "LabelEncoder",
        split,
        domain="ai.onnx.ml",
        keys_strings=list(changed),
        values_int64s=list(range(1, len(changed) + 1)),
        default_int64=0,
    )
    made = node("Gather", node.value(["", *changed.values()]), codes)
    letter = node("Where", node("Equal", codes, node.value(0)), split, made)
    words, _ = node("StringSplit", _join(node, letter, 0), outputs=2)
    return str(node("Reshape", words, node.value([-1])))


def _pieces(node: Nodes, words: str, model: dict[str, Any], vocab: dict[str, int]) -> tuple[str, str]:
    """Token ids of all rows, (K,), and behind which of them each row ends, (B,)."""
    unknown = model["unk_token"]
    pieces, starts, _, _ = node(
        "WordpieceTokenizer",
        words,
        node.value(np.zeros(0, np.int64)),
        domain=CONTRIB,
        outputs=4,
        vocab=json.dumps({**vocab, MARK: len(vocab)}),
        suffix_indicator=model["continuing_subword_prefix"],
        unknown_token=unknown,
        max_input_chars_per_word=model["max_input_chars_per_word"],
    )
    ids = node(
        "LabelEncoder",
        pieces,
        domain="ai.onnx.ml",
        keys_strings=[*vocab, MARK],
        values_int64s=[*vocab.values(), MARK_ID],
        default_int64=vocab[unknown],
    )
    # A word that ends in an unknown piece is unknown as a whole; the operator leaves the pieces before it.
    one, zero = node.value([1]), node.value([0])
    end = node("Slice", starts, one, node.value([np.iinfo(np.int64).max]), zero)
    last = node("Sub", end, one)
    first = node("Slice", starts, zero, node.value([-1]), zero)
    unknown_word = node("Equal", node("Gather", ids, last), node.value(vocab[unknown]))
    none = node("Mul", ids, node.value(0))
    begins = node("ScatterElements", none, first, node("Add", node("Mul", first, node.value(0)), one))
    word = node("Sub", node("CumSum", begins, node.value(0)), one)
    lasts = node("ScatterElements", none, last, node("Add", node("Mul", last, node.value(0)), one))
    good = node("Or", node("Not", node("Gather", unknown_word, word)), node("Equal", lasts, one))
    mark = node("Equal", ids, node.value(MARK_ID))
    kept = node("And", good, node("Not", mark))
    count = node("CumSum", node("Cast", kept, to=TensorProto.INT64), node.value(0))
    return node("Compress", ids, kept, axis=0), node("Compress", count, mark, axis=0)


def _batch(node: Nodes, ids: str, ends: str, max_length: int, around: list[int], padding: int) -> dict[str, str]:
    """Rows cut, between their special tokens and padded, (B, L)."""
    one, zero = node.value([1]), node.value([0])
    starts = node("Concat", zero, node("Slice", ends, zero, node.value([-1]), zero), axis=0)
    lengths = node("Min", node("Sub", ends, starts), node.value([max_length - 2]))
    longest = node("Add", node("ReduceMax", lengths, keepdims=0), node.value(2))
    places = node("Range", node.value(0), longest, node.value(1))  # (L,)
    lengths, starts = node("Unsqueeze", lengths, one), node("Unsqueeze", starts, one)
    found = node("Add", starts, node("Sub", places, one))  # where each place's id stands among all, (B, L)
    behind = node("Concat", ids, node.value([padding]), axis=0)
    most = node("Sub", node("Shape", behind), one)
    taken = node("Gather", behind, node("Max", node("Min", found, most), zero))
    close = node("Add", lengths, one)
    rows = node("Where", node("Equal", places, close), node.value(around[1]), taken)
    rows = node("Where", node("Greater", places, close), node.value(padding), rows)
    rows = node("Where", node("Equal", places, zero), node.value(around[0]), rows)
    mask = node("Cast", node("LessOrEqual", places, close), to=TensorProto.INT64)
    return {"input_ids": rows, "attention_mask": mask, "token_type_ids": node("Mul", mask, zero)}
