"""Augmentation: new texts that are a pure function of seed and text, by ways that do what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, BertTokenizer, RobertaTokenizer

from distill.data.augmentation import (
    augment,
    drop_words,
    embedding_neighbours,
    kept_texts,
    masked_words,
    mix_sentences,
    replace_words,
)
from distill.errors import DataError
from distill.files import read_json, write_json
from distill.recipe import AugmentRecipe

TEXTS = ["Good food, slow service!", "the film was long but never dull", "one"]
WORDS = ["good", "fine", "food", "slow", "service", "the", "film", "was", "long", "but", "never", "dull", "one"]


def fixed(text: str) -> dict[int, list[str]]:
    return {0: ["fine", "great"], len(text.split()) - 1: ["waiters"]}


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def tokenizer(words: Sequence[str] = WORDS) -> Any:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", "!", "##s", *words]
    return BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)})


def language_model(rows: int, kind: str = "bert") -> Any:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, vocab_size=rows, **shape)).eval()


def test_one_seed_one_result_whatever_the_order():
    ways = [drop_words(0.3), replace_words(fixed)]
    made = augment(TEXTS, ways, copies=6, seed=1)
    assert made == augment(TEXTS, ways, copies=6, seed=1)
    assert sorted(made) == sorted(augment(TEXTS[::-1], ways, copies=6, seed=1))
    assert made != augment(TEXTS, ways, copies=6, seed=2)


def test_nothing_empty_nothing_twice_nothing_that_was_there():
    made = augment([*TEXTS, ""], [drop_words(0.5), mix_sentences(TEXTS)], copies=20)
    assert made
    assert len(set(made)) == len(made)
    assert not set(made) & set(TEXTS)
    assert all(text.strip() for text in made)


def test_no_way_is_refused():
    with pytest.raises(DataError, match=r"no way to make new texts\. Give at least one\."):
        augment(TEXTS, [])


def test_dropping_keeps_order_and_at_least_one_word():
    assert drop_words(0.0)(TEXTS[1], rng()) == TEXTS[1]
    assert drop_words(1.0)("one", rng()) == "one"
    words = drop_words(0.5)(" ".join(map(str, range(40))), rng()).split()
    assert words == sorted(words, key=int)
    assert 8 < len(words) < 32


def test_mixing_takes_a_beginning_and_an_end():
    made = mix_sentences(["a b c d e f g h"])("1 2 3 4 5 6 7 8", rng()).split()
    cut = next(at for at, word in enumerate(made) if word.isalpha())
    assert made[:cut] == list("12345678")[:cut]
    assert made[cut:] == list("abcdefgh")[cut:]
    assert 2 <= cut <= 6


def test_replacing_keeps_signs_and_capitals():
    assert replace_words(fixed, rate=1.0, among=1)(TEXTS[0], rng()) == "Fine food, slow waiters!"
    assert replace_words(fixed, rate=0.0)(TEXTS[0], rng()) == TEXTS[0]


def test_neighbours_are_the_nearest_rows():
    whole = tokenizer()
    model = language_model(len(whole))
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[whole.convert_tokens_to_ids("fine")] = 2 * table[whole.convert_tokens_to_ids("good")] + 1e-3
    found = embedding_neighbours(model, whole, among=3)("Good food, unknown!")
    assert set(found) == {0, 1}  # `unknown` is no token
    assert found[0][0] == "fine"
    assert len(found[0]) == 3
    assert "good" not in found[0]


def test_masked_words_are_what_the_model_expects_there():
    whole = tokenizer()
    model = language_model(len(whole))
    found = masked_words(model, whole, among=2)(TEXTS[0])
    assert set(found) == {0, 2} or set(found) == {0, 1, 2, 3}
    ids = torch.tensor([whole("good food, slow service!")["input_ids"]])
    ids[0, 1] = whole.mask_token_id
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 1]
    names = whole.convert_ids_to_tokens(expected.argsort(descending=True).tolist())
    assert found[0] == [name for name in names if name in WORDS and name != "good"][:2]


def test_masked_words_know_pieces_that_tell_a_space_before_a_word():
    """To RoBERTa `food` and ` food` are two tokens, and the first is rarely a word."""
    whole = RobertaTokenizer().train_new_from_iterator(TEXTS * 20, 400, show_progress=False)
    found = masked_words(language_model(len(whole), "roberta"), whole)("never long, but food")
    assert set(found) == {0, 2, 3}
    assert all(word in " ".join(TEXTS) for stand_ins in found.values() for word in stand_ins)


def test_a_tokenizer_without_a_mask_is_refused():
    whole = tokenizer()
    model = language_model(len(whole))
    whole.mask_token = None
    with pytest.raises(DataError, match=r"no mask token\. Use embedding_neighbours"):
        masked_words(model, whole)


def test_real_embeddings_know_what_is_near(minilm_folder):
    from transformers import AutoModel

    model, whole = AutoModel.from_pretrained(minilm_folder), AutoTokenizer.from_pretrained(minilm_folder)
    found = embedding_neighbours(model, whole)("a wonderful, terrible film")
    assert {"amazing", "fantastic", "marvelous"} & set(found[1])
    assert {"horrible", "awful"} & set(found[2])


def test_what_a_recipe_asks_for_is_made_once(tmp_path: Path) -> None:
    path, recipe = tmp_path / "work" / "augmented.json", AugmentRecipe(copies=6)
    words, model = tokenizer(), language_model(len(tokenizer()))
    made = kept_texts(TEXTS, recipe, model, words, path)
    assert made
    assert not set(made) & set(TEXTS)
    write_json(path, read_json(path) | {"texts": ["kept"]})
    assert kept_texts(TEXTS, recipe, model, words, path) == ["kept"]
    assert kept_texts(TEXTS, recipe, model, words, path, seed=1) != ["kept"]
    assert kept_texts(TEXTS, recipe, model, words, path) == made
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    write_json(path, read_json(path) | {"texts": ["kept"]})
    assert kept_texts(TEXTS, recipe, model, words, path) != ["kept"]


def test_a_masked_model_is_loaded_from_its_folder(tmp_path: Path) -> None:
    words, model = tokenizer(), language_model(len(tokenizer()))
    model.save_pretrained(tmp_path / "lm")
    words.save_pretrained(tmp_path / "lm")
    recipe = AugmentRecipe(copies=3, ways=["masked"], replace=1.0, model=str(tmp_path / "lm"))
    made = kept_texts(["good food", "slow service"], recipe, model, words, tmp_path / "made.json")
    assert made
    assert all(len(text.split()) == 2 for text in made)


def test_a_masked_model_that_has_learnt_more_makes_other_texts(tmp_path: Path) -> None:
    words, model, path = tokenizer(), language_model(len(tokenizer())), tmp_path / "made.json"
    model.save_pretrained(tmp_path / "lm")
    words.save_pretrained(tmp_path / "lm")
    recipe = AugmentRecipe(copies=3, ways=["masked"], replace=1.0, model=str(tmp_path / "lm"))

    def made() -> list[str]:
        return kept_texts(["good food", "slow service"], recipe, model, words, path)

    first = made()
    write_json(path, read_json(path) | {"texts": ["kept"]})
    assert made() == ["kept"]
    with torch.no_grad():
        model.cls.predictions.transform.dense.weight.mul_(-1)
    model.save_pretrained(tmp_path / "lm")
    assert made() not in (["kept"], first)
    write_json(path, read_json(path) | {"texts": ["kept"]})
    tokenizer(WORDS[::-1]).save_pretrained(tmp_path / "lm")
    assert made() != ["kept"]


def test_a_masked_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    recipe = AugmentRecipe(copies=1, ways=["masked"], model=str(tmp_path))
    with pytest.raises(DataError, match=r"data\.augment\.model: no masked language model at"):
        kept_texts(TEXTS, recipe, language_model(30), tokenizer(), tmp_path / "made.json")
