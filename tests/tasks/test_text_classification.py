"""Encoding, collation and metrics of text classification, on a real tokenizer."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from distill.errors import TeacherError
from distill.tasks import TASKS, Padding, concatenate, find_task

TASK = TASKS["text-classification"]
PADDING = Padding({"input_ids": 7, "token_type_ids": 0})


@pytest.fixture(scope="module")
def tokenizer(minilm_folder):
    return AutoTokenizer.from_pretrained(minilm_folder)


def test_rows_survive_packing(tokenizer):
    texts = ["a fine film", "dull", "one that nobody asked for , and that nobody needs"]
    encoded = TASK.encode({"text": texts, "label": [1, None, 0]}, tokenizer, 128)
    for row, text in enumerate(texts):
        assert encoded[row]["input_ids"].tolist() == tokenizer(text)["input_ids"]
    assert encoded.flat["labels"].tolist() == [1, -100, 0]
    assert encoded.lengths.tolist() == [len(tokenizer(text)["input_ids"]) for text in texts]
    assert (encoded.cut, [encoded[row]["example"] for row in range(3)]) == (0, [0, 1, 2])
    with pytest.raises(IndexError, match="3"):
        encoded[3]


def test_pairs_keep_their_token_types_and_long_rows_are_counted(tokenizer):
    columns = {"text": ["a b c", "x " * 40], "text_pair": ["d e", "y " * 40], "label": [0, 1]}
    encoded = TASK.encode(columns, tokenizer, 16)
    assert encoded[0]["token_type_ids"].tolist() == tokenizer("a b c", "d e")["token_type_ids"]
    assert (encoded.cut, encoded.lengths.max()) == (1, 16)


def test_a_batch_is_padded_to_its_longest_row(tokenizer):
    encoded = TASK.encode({"text": ["dull", "a very fine film"], "label": [0, 1]}, tokenizer, 128)
    batch = TASK.collate([encoded[0], encoded[1]], PADDING)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 6)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert batch["input_ids"][0, 3:].tolist() == [7, 7, 7]
    assert {name: value.dtype for name, value in batch.items() if name != "scored"} == dict.fromkeys(
        ("input_ids", "token_type_ids", "attention_mask", "labels", "example"), np.dtype(np.int64)
    )
    assert batch["scored"].tolist() == [True, True]


def test_selecting_and_joining_keep_rows_apart(tokenizer):
    encoded = TASK.encode({"text": ["a", "b b", "c c c"], "label": [0, 1, 0]}, tokenizer, 128)
    both = concatenate([encoded.select([2, 0]), encoded])
    assert [both[row]["input_ids"].tolist() for row in (0, 1, 4)] == [
        encoded[row]["input_ids"].tolist() for row in (2, 0, 2)
    ]
    assert [both[row]["example"] for row in range(5)] == [0, 1, 2, 3, 4]
    assert both.flat["labels"].tolist() == [0, 0, 0, 1, 0]


def test_metrics_by_hand_leave_unlabelled_rows_out(tokenizer):
    encoded = TASK.encode({"text": ["a"] * 4, "label": [0, 1, 1, None]}, tokenizer, 8)
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 9.0]])
    found = TASK.metrics({"logits": logits}, encoded)
    # class 0: precision 1/2, recall 1, F1 2/3; class 1: precision 1, recall 1/2, F1 2/3
    assert found == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(2 / 3)}


def test_probabilities_are_the_softmax_even_of_large_logits():
    outputs = TASK.postprocess({"logits": np.array([[1000.0, 1000.0], [0.0, np.log(3.0)]])})
    np.testing.assert_allclose(outputs["probabilities"], [[0.5, 0.5], [0.25, 0.75]], rtol=1e-6)


def test_the_task_is_read_from_the_architecture():
    assert find_task("auto", ["BertForSequenceClassification"]) is TASK
    assert find_task("text-classification", ["BertModel"]) is TASK
    with pytest.raises(TeacherError, match=r"architecture \['BertForPreTraining'\] belongs to no known task"):
        find_task("auto", ["BertForPreTraining"])
