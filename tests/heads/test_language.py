"""What a language model's bundle reads of a text: parts that fit, the whole of it to write on from."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from distill.errors import DataError
from distill.heads import HEADS, Asked

HEAD = HEADS["causal-lm"]
WORDS = ["<s>", *"abcdefgh"]


def reader(begin, most=4):
    """A word a token, cut at `most`; a beginning before each text where it has one."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="h"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    HEAD.limit(tokenizer, most)
    return tokenizer


def test_a_long_text_is_written_on_from_as_one():
    """Its parts begin with a beginning each, which no text has in its middle."""
    tokenizer, text, prompts = reader(True), "a b c d e f g", []
    (windows,) = HEAD.windows(tokenizer, [text])
    assert [list(one.ids) for one in windows] == [[0, 1, 2, 3], [0, 4, 5, 6], [0, 7]]
    said = [HEAD.digest(one, {"logits": np.eye(9)[list(one.ids)] * 9}) for one in windows]

    def write(ids):
        prompts.append(list(ids))
        return [8]

    told = HEAD.decode(Asked(text, windows, said, write), [], {})
    assert prompts == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert told.text == "h"


def test_an_empty_text_is_named_where_nothing_stands_before_it():
    with pytest.raises(DataError, match="text 1: it has no token to go on from"):
        HEAD.windows(reader(False), ["a", ""])
    ((one,),) = HEAD.windows(reader(True), [""])
    assert list(one.ids) == [0]
