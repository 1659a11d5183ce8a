"""More text for a small transfer set: new sentences made from those there are, for the teacher to label softly.

    ways = [drop_words(), mix_sentences(texts), replace_words(embedding_neighbours(model, tokenizer))]
    more = augment(texts, ways, copies=10, seed=0)

Every new text is a pure function of (seed, text, copy), whatever the order of the texts, so a cache of the teacher's
answers keeps fitting.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel

from distill.errors import DataError, first_line
from distill.files import read_json, sha256_json, write_json
from distill.progress import SILENT, Progress
from distill.recipe import AugmentRecipe

Way = Callable[[str, np.random.Generator], str]
"""Makes a new text from one; gives the same text back where it can do nothing."""

Candidates = Callable[[str], Mapping[int, Sequence[str]]]
"""For a text: word number -> words that could stand in its place, likeliest first."""

_WORD = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)
_ROWS = 64  # masked copies a forward pass


def augment(
    texts: Iterable[str],
    ways: Sequence[Way],
    *,
    copies: int = 10,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[str]:
    """New texts, none of them empty, twice there, or among `texts`; in the order of the texts they come from.

    Args:
        texts: What to start from.
        ways: One is drawn for each copy, all being as likely.
        copies: Tries for each text; fewer may come of it.
        seed: One seed, one result.
        progress: Told about texts.

    Raises:
        DataError: When no way is given.
    """
    if not ways:
        raise DataError("there is no way to make new texts", where="augmentation", fix="Give at least one.")
    given = list(texts)
    seen, new = set(given), []
    with progress.stage("Augmenting", total=len(given), unit="texts") as stage:
        for text in given:
            for copy in range(copies):
                source = np.random.default_rng(_number(seed, text, copy))
                made = ways[int(source.integers(len(ways)))](text, source)
                if made.strip() and made not in seen:
                    seen.add(made)
                    new.append(made)
            stage.advance()
    return new


def kept_texts(
    texts: Sequence[str],
    recipe: AugmentRecipe,
    model: PreTrainedModel,
    tokenizer: Any,
    path: Path,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[str]:
    """What a recipe asks for, made once: `path` keeps it with a hash of all that it depends on.

    Args:
        texts: The training texts.
        recipe: Which ways, and how many copies.
        model: The teacher, whose token table `neighbours` reads.
        tokenizer: The teacher's.
        path: A JSON file.
        seed: One seed, one result.
        progress: Told about texts.

    Raises:
        DataError: The masked language model cannot be loaded or has no mask token.
    """
    made_from = {"texts": sha256_json(list(texts)), "recipe": recipe.model_dump(mode="json"), "seed": seed}
    masked = _language_model(recipe.model) if "masked" in recipe.ways else None
    if masked:
        made_from["language_model"] = _digest(*masked)
    if "neighbours" in recipe.ways:
        table = model.get_input_embeddings().weight.detach().float().cpu().contiguous()
        made_from["table"] = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    kept = read_json(path)
    if kept and kept["made_from"] == made_from:
        return list(kept["texts"])
    ways = _ways(texts, recipe, model, tokenizer, masked)
    made = augment(texts, ways, copies=recipe.copies, seed=seed, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"made_from": made_from, "texts": made})
    return made


def _ways(
    texts: Sequence[str],
    recipe: AugmentRecipe,
    model: PreTrainedModel,
    tokenizer: Any,
    masked: tuple[PreTrainedModel, Any] | None,
) -> list[Way]:
    ways: list[Way] = []
    for name in recipe.ways:
        if name == "drop":
            ways.append(drop_words(recipe.drop))
        elif name == "mix":
            ways.append(mix_sentences(texts))
        elif name == "neighbours":
            ways.append(replace_words(embedding_neighbours(model, tokenizer), rate=recipe.replace))
        elif masked:
            ways.append(replace_words(masked_words(*masked), rate=recipe.replace))
    return ways


def _language_model(source: str) -> tuple[PreTrainedModel, Any]:
    try:
        return (
            AutoModelForMaskedLM.from_pretrained(source, use_safetensors=True, trust_remote_code=False),
            AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False),
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"no masked language model at {source!r} ({first_line(error)})",
            where="data.augment.model",
            fix="Give a folder with its safetensors and tokenizer, or a hub id, or leave the way `masked` out.",
        ) from error


def _digest(model: PreTrainedModel, tokenizer: Any) -> str:
    """sha256 of a model's weights and of its tokenizer."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def drop_words(rate: float = 0.1) -> Way:
    """Leaves out each word with probability `rate`, but never all of them."""

    def way(text: str, source: np.random.Generator) -> str:
        words = text.split()
        kept = [word for word, luck in zip(words, source.random(len(words)), strict=True) if luck >= rate]
        return " ".join(kept or words)

    return way


def mix_sentences(texts: Sequence[str]) -> Way:
    """Puts the first part of a text before the last part of another one, each cut at the same random share."""
    pool = list(texts)

    def way(text: str, source: np.random.Generator) -> str:
        other = pool[int(source.integers(len(pool)))].split()
        words, share = text.split(), source.uniform(0.25, 0.75)
        return " ".join([*words[: round(len(words) * share)], *other[round(len(other) * share) :]])

    return way


def replace_words(candidates: Candidates, *, rate: float = 0.4, among: int = 15) -> Way:
    """TinyBERT's augmentation: each word, with probability `rate`, makes way for one of its likeliest stand-ins.

    Jiao et al. 2019 (arXiv:1909.10351), algorithm 1: p = 0.4, K = 15. Signs around a word stay, as does its capital.

    Args:
        candidates: `embedding_neighbours` or `masked_words`.
        rate: Probability for each word that has stand-ins.
        among: One of this many likeliest ones is drawn.
    """

    def way(text: str, source: np.random.Generator) -> str:
        words, found = text.split(), candidates(text)
        luck, draw = source.random(len(words)), source.random(len(words))
        for number, stand_ins in found.items():
            if stand_ins and luck[number] < rate:
                choice = stand_ins[: min(among, len(stand_ins))]
                words[number] = _dressed(words[number], choice[int(draw[number] * len(choice))])
        return " ".join(words)

    return way


def embedding_neighbours(model: PreTrainedModel, tokenizer: Any, *, among: int = 15) -> Candidates:
    """Words whose rows of the model's token table are nearest by cosine; for words that are one token.

    Args:
        model: Its input embedding is read once.
        tokenizer: The fast tokenizer it was trained with.
        among: Neighbours of each word.
    """
    ids = _whole_words(tokenizer)
    names = list(ids)
    table = model.get_input_embeddings().weight.detach().float()[list(ids.values())]
    table = torch.nn.functional.normalize(table, dim=-1)
    known: dict[str, list[str]] = {}
    place = {name: number for number, name in enumerate(names)}

    def candidates(text: str) -> Mapping[int, Sequence[str]]:
        found = {}
        for number, word in enumerate(text.split()):
            plain = _normal(tokenizer, _bare(word))
            if plain not in place:
                continue
            if plain not in known:
                near = (table @ table[place[plain]]).topk(min(among + 1, len(names))).indices.tolist()
                known[plain] = [names[other] for other in near if names[other] != plain][:among]
            found[number] = known[plain]
        return found

    return candidates


def masked_words(model: PreTrainedModel, tokenizer: Any, *, among: int = 15, max_length: int = 128) -> Candidates:
    """Words that a masked language model expects in a word's place; for words that are one token.

    Args:
        model: With a masked-language-model head.
        tokenizer: The fast tokenizer it was trained with; it needs a mask token.
        among: Expected words for each place.
        max_length: Tokens of a text that are read.

    Raises:
        DataError: When the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            "the tokenizer has no mask token", where="augmentation", fix="Use embedding_neighbours with this model."
        )
    ids = _whole_words(tokenizer)
    name_of = {number: name for name, number in ids.items()}
    allowed = torch.full((model.get_input_embeddings().weight.shape[0],), -torch.inf)
    allowed[list(name_of)] = 0
    model.eval()

    def candidates(text: str) -> Mapping[int, Sequence[str]]:
        words = [f" {word}" for word in text.split()]  # as `_whole_words` reads them, the first one too
        encoded = tokenizer("".join(words), truncation=True, max_length=max_length, return_offsets_mapping=True)
        of_sign = [number for number, word in enumerate(words) for _ in word]
        owners = [of_sign[end - 1] if end > begin else None for begin, end in encoded["offset_mapping"]]
        row = torch.tensor(encoded["input_ids"])
        places = {n: owners.index(n) for n in range(len(words)) if owners.count(n) == 1}
        alone = {n: at for n, at in places.items() if int(row[at]) in name_of}
        found: dict[int, list[str]] = {}
        numbers = list(alone)
        for begin in range(0, len(numbers), _ROWS):
            part = numbers[begin : begin + _ROWS]
            best = _expected(model, row, [alone[n] for n in part], tokenizer.mask_token_id, allowed, among + 1)
            for number, choice in zip(part, best.tolist(), strict=True):
                own = int(row[alone[number]])
                found[number] = [name_of[other] for other in choice if other in name_of and other != own][:among]
        return found

    return candidates


@torch.no_grad()
def _expected(model: PreTrainedModel, row: Tensor, places: list[int], mask: int, allowed: Tensor, among: int) -> Tensor:
    """(places, among): the likeliest allowed tokens at each place, with that place masked."""
    rows = row.repeat(len(places), 1)
    rows[torch.arange(len(places)), torch.tensor(places)] = mask
    logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
    there = logits[torch.arange(len(places)), torch.tensor(places)].float() + allowed
    return there.topk(min(among, there.shape[-1])).indices


def _whole_words(tokenizer: Any) -> dict[str, int]:
    """Words of letters alone that are one token at the start of a word, with their ids."""
    backend, special = tokenizer.backend_tokenizer, set(tokenizer.all_special_ids)
    ids = [number for number in range(backend.get_vocab_size()) if number not in special]
    words = [backend.decode([number]).strip() for number in ids]
    kept = [(word, number) for word, number in zip(words, ids, strict=True) if word.isalpha()]
    encoded = tokenizer([f" {word}" for word, _ in kept], add_special_tokens=False)["input_ids"] if kept else []
    return {word: number for (word, number), found in zip(kept, encoded, strict=True) if found == [number]}


def _normal(tokenizer: Any, word: str) -> str:
    """A word as the tokenizer's normaliser leaves it: lower case for an uncased one."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return normalizer.normalize_str(word).strip() if normalizer is not None and word else word


def _bare(word: str) -> str:
    found = _WORD.match(word)
    return found.group(2) if found else word


def _dressed(old: str, new: str) -> str:
    """The new word with the old one's signs and capital."""
    found = _WORD.match(old)
    before, bare, after = found.groups() if found else ("", old, "")
    return f"{before}{new.capitalize() if bare[:1].isupper() and new.islower() else new}{after}"


def _number(seed: int, text: str, copy: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{copy}\0{text}".encode()).digest()[:8], "big")
