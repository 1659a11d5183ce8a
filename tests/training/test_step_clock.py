"""The parts of a step add up to the time that passed, and nested parts are counted once."""

import time

import pytest
import torch
from torch import nn

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


def test_facts_count_products_and_padding():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    clock = StepClock()
    assert clock.facts(model, bf16=False) == {}
    assert speed_lines({}) == []
    clock.on_train_begin(None, None, None)
    clock.count(torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]))
    clock.seconds |= {"student": 0.5, "measuring": 3.0}
    facts = clock.facts(model, bf16=False)
    assert facts["flops_per_token"] == 6 * (32 + 16)
    assert facts["padding"] == pytest.approx(3 / 8)
    assert facts["samples_per_second"] == 4.0  # measuring is left out
    assert set(facts["seconds"]) == set(PARTS)
    assert "samples/s" in speed_lines(facts)[0]


def test_the_peak_is_that_of_a_product():
    assert peak_flops(torch.device("cpu"), bf16=False) > 1e8
