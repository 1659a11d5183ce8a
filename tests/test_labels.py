"""Classes matched by name, heads put in order."""

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from distill.errors import TeacherError
from distill.labels import final_names, match_labels, numbered, rename_labels
from distill.teacher import Checkpoint


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


def test_labels_that_are_alike_in_two_ways_are_not_guessed():
    with pytest.raises(TeacherError, match="labels of the data that the teacher has not: us, Us"):
        match_labels(["US", "x"], ["us", "Us", "x"], {}, where="t")
