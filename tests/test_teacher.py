"""Teachers: labels matched by name, heads put in order, lengths and hashes."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from distill.errors import TeacherError
from distill.tasks import TASKS
from distill.teacher import (
    Checkpoint,
    check_floor,
    final_names,
    hash_tensors,
    load_reader,
    match_labels,
    numbered,
    position_limit,
    rename_labels,
)


@pytest.mark.parametrize(
    ("teacher", "data", "label_map", "ordered", "order", "names"),
    [
        (["neg", "pos"], ["pos", "neg"], {}, False, [0, 1], ["neg", "pos"]),  # the teacher's order stands
        (["neg", "pos"], ["pos", "neg"], {}, True, [1, 0], ["pos", "neg"]),  # the data's order is asked for
        (["NEGATIVE", "POSITIVE"], ["negative", "positive"], {}, False, [0, 1], ["negative", "positive"]),
        (["card arrival", "rate"], ["rate", "card_arrival"], {}, False, [0, 1], ["card_arrival", "rate"]),
        (
            ["LABEL_0", "LABEL_1"],
            ["good", "bad"],
            {"LABEL_0": "bad", "LABEL_1": "good"},
            False,
            [0, 1],
            ["bad", "good"],
        ),
        (["us", "US", "x"], ["x", "US", "us"], {}, True, [2, 1, 0], ["x", "US", "us"]),  # to the letter first
        (["a", "b", "c"], ["c", "a"], {}, True, [2, 0, 1], ["c", "a", "b"]),  # a class the data never shows stays
    ],
)
def test_labels_are_matched_by_name(teacher, data, label_map, ordered, order, names):
    found = match_labels(teacher, data, label_map, where="t", ordered=ordered)
    assert found == order
    assert final_names(teacher, data, label_map, found) == names


@pytest.mark.parametrize(
    ("teacher", "data", "found"),
    [
        (["LABEL_0", "LABEL_1"], ["1", "0"], {"LABEL_0": "0", "LABEL_1": "1"}),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["2", "0"], {"LABEL_0": "0", "LABEL_1": "1", "LABEL_2": "2"}),
        (["LABEL_0", "LABEL_1"], ["1", "2"], {}),  # counted from 1: nobody knows which is which
        (["LABEL_1", "LABEL_0"], ["0", "1"], {}),
        (["LABEL_0", "LABEL_1"], ["no", "yes"], {}),
        (["no", "yes"], ["0", "1"], {}),
    ],
)
def test_classes_without_names_are_those_of_their_numbers(teacher, data, found):
    assert numbered(teacher, data) == found


def test_labels_that_match_nothing_say_how_to_say_it():
    with pytest.raises(TeacherError, match=r"teacher.label_map = \{ LABEL_0 = 'bad', LABEL_1 = 'good' \}"):
        match_labels(["LABEL_0", "LABEL_1"], ["bad", "good"], {}, where="t")
    with pytest.raises(TeacherError, match=r"`teacher.label_map` names no, which the teacher has not"):
        match_labels(["a", "b"], ["a", "b"], {"no": "a"}, where="t")


def test_a_head_in_another_order_gives_the_same_logits_in_that_order():
    """RoBERTa's head is two layers: the last linear one is what moves."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = RobertaForSequenceClassification(config).eval()
    ids = torch.randint(3, 50, (2, 7))
    before = model(ids).logits.detach()
    rename_labels(Checkpoint(model, None, ["a", "b", "c"], "t"), ["c", "a", "b"], [2, 0, 1])
    torch.testing.assert_close(model(ids).logits.detach(), before[:, [2, 0, 1]])
    assert model.config.id2label == {0: "c", 1: "a", 2: "b"}


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


def test_labels_that_are_alike_in_two_ways_are_not_guessed():
    with pytest.raises(TeacherError, match="labels of the data that the teacher has not: us, Us"):
        match_labels(["US", "x"], ["us", "Us", "x"], {}, where="t")


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
