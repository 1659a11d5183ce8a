"""What is no text is refused by its number among the texts, whatever a head makes of one."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from distill.errors import DataError
from distill.heads import HEADS
from distill.heads.images import Preprocessing

IMAGE = np.zeros((4, 4, 3), np.uint8)
READS = {"do_resize": True, "size": {"height": 4, "width": 4}}


@pytest.mark.parametrize(
    ("task", "texts", "wrong"),
    [
        ("sentence-embedding", [("a", "b"), ("c", "d"), 5], r"text 2: 5"),
        ("sentence-embedding", [("a", "b"), ("c", 5)], r"text 1: \('c', 5\)"),
        ("seq2seq", ["a", ("c", 5)], r"text 1: \('c', 5\)"),
        ("seq2seq", [("a", "b"), ("c",)], r"text 1: \('c',\)"),
        ("image-captioning", [IMAGE, (IMAGE, "a"), (IMAGE, 5)], r"text 2: 5"),
        ("image-text", ["a", (IMAGE, "a"), (IMAGE, 5)], r"text 2: 5"),
    ],
)
def test_what_is_no_text_is_refused_by_its_number(task, texts, wrong):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate("abcd")}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    head = HEADS[task]
    reader = (tokenizer, Preprocessing.of(READS)) if "image" in head.reads else tokenizer
    head.windows(reader, texts[:-1])
    with pytest.raises(DataError, match=rf"^{wrong} is no text\. Give "):
        head.windows(reader, texts)
