"""The parts of a step add up to the time that passed, and nested parts are counted once."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from distill.training.products import count_products
from distill.training.step_clock import PARTS, StepClock, peak_flops, speed_lines


def test_parts_add_up_to_what_passed():
    clock = StepClock()
    clock.on_train_begin(None, None, None)
    begin = time.perf_counter()
    with clock.part("backward"):
        time.sleep(0.02)
        with clock.part("student"):
            time.sleep(0.03)
        time.sleep(0.01)
    clock.on_train_end(None, None, None)
    passed = time.perf_counter() - begin
    assert sum(clock.seconds.values()) == pytest.approx(passed, abs=0.5)
    assert clock.seconds["student"] >= 0.03
    assert clock.seconds["backward"] >= 0.03


def test_a_part_ends_with_its_error():
    clock = StepClock()
    with pytest.raises(ValueError, match="inside"), clock.part("losses"):
        raise ValueError("inside")
    time.sleep(0.01)
    clock.on_train_end(None, None, None)
    assert clock.seconds["rest"] >= 0.01


def bert(**more):
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**shape, intermediate_size=40, num_labels=5, **more))


def test_facts_count_products_and_padding():
    model = bert()
    clock = StepClock()
    assert clock.facts(model, bf16=False) == {}
    assert speed_lines({}) == []
    clock.on_train_begin(None, None, None)
    clock.count(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]))
    clock.seconds |= {"student": 0.5, "measuring": 3.0}
    facts = clock.facts(model, bf16=False)
    layer = 4 * 16 * 16 + 2 * 16 * 40
    forward = 2 * (5 * 3 * layer + 2 * (16 * 16 + 16 * 5) + 3 * 2 * 16 * (9 + 4))
    assert facts["flops_per_token"] == round(3 * forward / 5)
    assert facts["padding"] == pytest.approx(3 / 8)
    assert facts["samples_per_second"] == 4.0  # measuring is left out
    assert set(facts["seconds"]) == set(PARTS)
    assert "samples/s" in speed_lines(facts)[0]


@pytest.mark.parametrize("family", ["bert", "albert", "gpt2"])
def test_products_are_those_that_torch_counts(family):
    """Poolers and classifiers read one vector a row, a shared layer runs several times, attention multiplies too."""
    if family == "bert":
        model = bert(attn_implementation="eager")
    elif family == "albert":
        shape = {"vocab_size": 50, "embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2}
        config = AlbertConfig(**shape, num_hidden_layers=3, intermediate_size=40, attn_implementation="eager")
        model = AlbertForSequenceClassification(config)
    else:
        shape = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
        model = GPT2LMHeadModel(GPT2Config(**shape, attn_implementation="eager"))
    rows, length = 3, 7
    ids = torch.randint(5, 50, (rows, length))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    mine = count_products(model).forward(rows, rows * length, rows * length**2)
    assert mine == counter.get_total_flops()


def test_the_peak_is_that_of_a_product():
    assert peak_flops(torch.device("cpu"), bf16=False) > 1e8


def test_tokens_on_a_card_are_summed_there():
    """A sum that is read in every step makes the processor wait for the card."""
    clock = StepClock()
    clock.count(torch.ones(2, 5, dtype=torch.long, device="meta"))
    clock.count(torch.ones(3, 5, dtype=torch.long, device="meta"))
    assert (clock.rows, clock.padded, clock.tokens) == (5, 25, 0)
    clock._on_card = torch.tensor([25, 125])  # what a card would have
    clock.seconds |= {"student": 1.0}
    assert clock.facts(bert(), bf16=False)["padding"] == 0.0
    assert (clock.tokens, clock.pairs) == (25, 125)
