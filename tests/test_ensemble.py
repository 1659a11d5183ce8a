"""Several teachers as one: the mean of their logits, and what makes them unfit for each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from distill.ensemble import EnsembleTeacher, join
from distill.errors import TeacherError
from distill.readers import image_reader
from distill.teacher import Checkpoint, LiveTeacher

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "where", "is", "my", "card"]
IDS = {"input_ids": torch.tensor([[2, 5, 6, 3], [2, 8, 3, 0]]), "attention_mask": torch.ones(2, 4).long()}


def checkpoint(seed: int, labels: list[str], words: list[str] = WORDS) -> Checkpoint:
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(vocab_size=len(tokenizer), intermediate_size=16, num_labels=len(labels), **shape)
        model = BertForSequenceClassification(config).eval()
    return Checkpoint(model, tokenizer, labels, f"teacher-{seed}")


def logits(one: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        return one.model(**IDS).logits


def test_logits_are_averaged_by_weight_and_the_rest_is_the_firsts() -> None:
    one, other = checkpoint(0, ["a", "b"]), checkpoint(1, ["a", "b"])
    members = [LiveTeacher(one.model, ["logits", "hidden.1"]), LiveTeacher(other.model, ["logits"])]
    features = EnsembleTeacher(members, [3.0, 1.0]).features(IDS)
    torch.testing.assert_close(features["logits"], 0.75 * logits(one) + 0.25 * logits(other))
    assert torch.equal(features["hidden.1"], members[0].features(IDS)["hidden.1"])
    assert not torch.equal(logits(one), logits(other))


def test_classes_are_put_into_the_first_ones_order() -> None:
    first, other = checkpoint(0, ["no", "yes", "maybe"]), checkpoint(1, ["Maybe", "NO", "yes"])
    before = logits(other)
    join(first, other, {})
    assert other.labels == ["no", "yes", "maybe"]
    torch.testing.assert_close(logits(other), before[:, [1, 2, 0]])


def test_other_names_are_matched_by_the_label_map() -> None:
    first, other = checkpoint(0, ["no", "yes"]), checkpoint(1, ["LABEL_0", "LABEL_1"])
    before = logits(other)
    join(first, other, {"LABEL_0": "yes", "LABEL_1": "no"})
    torch.testing.assert_close(logits(other), before[:, [1, 0]])


@pytest.mark.parametrize(
    "labels, message",
    [
        (["no", "yes", "maybe"], "teacher-1: its labels are no, yes, maybe; those of teacher-0 are no, yes"),
        (["no", "perhaps"], "labels of the data that the teacher has not: yes"),
    ],
)
def test_other_labels_are_refused(labels: list[str], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        join(checkpoint(0, ["no", "yes"]), checkpoint(1, labels), {})


def test_another_tokenizer_is_refused() -> None:
    other = checkpoint(1, ["no", "yes"], words=[*WORDS[:5], "something", "else"])
    with pytest.raises(TeacherError, match="must share a tokenizer"):
        join(checkpoint(0, ["no", "yes"]), other, {})


def test_a_tokenizer_with_the_same_tokens_that_splits_otherwise_is_refused() -> None:
    other = checkpoint(1, ["no", "yes"])
    other = replace(other, tokenizer=BertTokenizer(vocab=other.tokenizer.get_vocab(), do_lower_case=False))
    with pytest.raises(TeacherError, match="has the tokens of teacher-0 and splits texts otherwise"):
        join(checkpoint(0, ["no", "yes"]), other, {})


def test_readers_of_images_must_do_the_same() -> None:
    models = [checkpoint(seed, ["a", "b"]) for seed in (0, 1, 2)]
    config = {"size": {"height": 4, "width": 4}}
    readers = [image_reader({**config, **more}, (3, 4, 4), 5) for more in ({}, {}, {"resample": 3})]
    first, other, odd = (replace(one, tokenizer=reader) for one, reader in zip(models, readers, strict=True))
    join(first, other, {})
    with pytest.raises(TeacherError, match="teacher-2: its images are not read as those of teacher-0"):
        join(first, odd, {})
