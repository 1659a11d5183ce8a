"""Teachers: lengths, hashes and floors."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
)

from distill.errors import TeacherError
from distill.tasks import TASKS
from distill.teacher import Checkpoint, check_floor, hash_tensors, load_reader, position_limit


def test_positions_a_model_really_has():
    assert position_limit(BertConfig(max_position_embeddings=512)) == 512
    assert position_limit(RobertaConfig(max_position_embeddings=514)) == 512


def test_the_hash_of_a_tokenizer_is_that_of_what_it_makes_of_a_text(minilm_folder):
    checkpoint = Checkpoint(None, AutoTokenizer.from_pretrained(minilm_folder), [], str(minilm_folder), [])
    before = checkpoint.tokenizer_hash()
    checkpoint.tokenizer(["a", "a longer text"], truncation=True, max_length=4, padding=True)
    assert checkpoint.tokenizer_hash() == before
    checkpoint.tokenizer.add_tokens(["distilled"])
    assert checkpoint.tokenizer_hash() != before


def test_the_hash_sees_names_shapes_types_and_values():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "c": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.float16), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
    ]
    assert len({hash_tensors(tensors) for tensors in [base, *others]}) == 5
    assert hash_tensors(base) == hash_tensors(dict(reversed(base.items())))


def test_the_hash_of_a_model_sees_how_its_weights_are_used():
    def checkpoint(**changes):
        torch.manual_seed(0)
        shape = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=8, **changes))
        return Checkpoint(model, None, [], "here")

    found = [checkpoint(), checkpoint(hidden_act="relu"), checkpoint(layer_norm_eps=1e-5)]
    assert len({one.weights_hash() for one in found}) == 3
    renamed = checkpoint(id2label={0: "no", 1: "yes"}, problem_type="single_label_classification")
    assert renamed.weights_hash() == found[0].weights_hash()


@pytest.mark.parametrize("value", [0.4, float("nan")])
def test_a_teacher_below_its_floor_stops_the_run(value):
    check_floor(0.5, 0.5, "accuracy", "t")
    with pytest.raises(TeacherError, match=r"below its floor of 0.500"):
        check_floor(value, 0.5, "accuracy", "t")


@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_words_are_split_as_the_text_they_stand_in(kind, tmp_path):
    """A tagger would learn from `song` and be asked of ` song`, which are two tokens to a byte-level tokenizer."""
    made = {"roberta": transformers.RobertaTokenizer, "gpt2": transformers.GPT2Tokenizer}[kind]
    texts = ["play this song now", "this song again", "do play it"] * 20
    learnt = made().train_new_from_iterator(texts, 400, show_progress=False)
    learnt.pad_token = learnt.eos_token
    learnt.save_pretrained(tmp_path / "one")
    task, words = TASKS["token-classification"], ["play", "this", "song"]
    reader = load_reader(str(tmp_path / "one"), task)
    asked = Tokenizer.from_str(reader.backend_tokenizer.to_str())
    encoded = task.encode({"text": [words], "label": [None]}, reader, 16)
    assert encoded[0]["input_ids"].tolist() == asked.encode(" ".join(words)).ids
    assert load_reader(str(tmp_path / "one"), TASKS["regression"])("play")["input_ids"] == learnt("play")["input_ids"]
    reader.save_pretrained(tmp_path / "student")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "student")
    assert again(" ".join(words))["input_ids"] == encoded[0]["input_ids"].tolist()


def test_a_tokenizer_that_cannot_split_words_as_texts_is_refused(tmp_path):
    learnt = transformers.GPT2Tokenizer().train_new_from_iterator(["play this song"] * 9, 300, show_progress=False)
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=learnt.backend_tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    whole.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="splits words given one by one otherwise than the text"):
        load_reader(str(tmp_path), TASKS["token-classification"])
