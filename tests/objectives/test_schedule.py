"""Schedules by their values, and what would silently train towards nothing."""

from __future__ import annotations

import math

import pytest
import torch

from distill.objectives.schedule import (
    Schedule,
    dynamic_temperature,
    schedule_of,
    schedule_problems,
    silent_stretch,
)
from distill.recipe import ScheduleRecipe, TermRecipe


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Schedule("constant", 3.0), {0.0: 3.0, 0.5: 3.0, 1.0: 3.0}),
        (Schedule("linear", 1.0, 0.0), {0.0: 1.0, 0.25: 0.75, 1.0: 0.0}),
        (Schedule("linear", 4.0, 1.0, 0.2, 0.6), {0.0: 4.0, 0.2: 4.0, 0.4: 2.5, 0.6: 1.0, 0.9: 1.0}),
        (Schedule("cosine", 0.0, 1.0), {0.0: 0.0, 0.25: (1 - math.sqrt(0.5)) / 2, 0.5: 0.5, 1.0: 1.0}),
        (Schedule("stages", 2.0, 9.0, 0.0, 0.5), {0.0: 2.0, 0.49: 2.0, 0.5: 0.0, 1.0: 0.0}),
        # The last step of training is inside a window that reaches the end.
        (Schedule("stages", 2.0, 9.0, 0.5, 1.0), {0.0: 0.0, 0.49: 0.0, 0.5: 2.0, 1.0: 2.0}),
    ],
)
def test_values(schedule: Schedule, values: dict[float, float]) -> None:
    for progress, value in values.items():
        assert schedule(progress) == pytest.approx(value), progress


def test_a_recipe_reads_as_a_schedule() -> None:
    assert schedule_of(0.5) == Schedule("constant", 0.5)
    recipe = ScheduleRecipe.model_validate({"schedule": "cosine", "start": 8, "end": 2, "from": 0.1, "until": 0.7})
    assert schedule_of(recipe) == Schedule("cosine", 8.0, 2.0, 0.1, 0.7)
    assert schedule_of(TermRecipe(loss="x", weight=2).weight) == Schedule("constant", 2.0)
    assert str(schedule_of(recipe)) == "8 to 2, cosine, from 10% to 70%"
    assert str(Schedule("stages", 1.0, begin=0.5)) == "1 from 50% to 100%"


def test_schedules_that_differ_read_otherwise() -> None:
    """What a student was trained with is told by it: a run that is told the same goes on with the old student."""
    made = [Schedule("stages", 1.0, begin=begin, until=until) for begin in (0.1, 0.104) for until in (0.12, 0.125)]
    made += [Schedule("constant", 0.1234567), Schedule("constant", 0.1234568)]
    assert len({str(one) for one in made}) == len(made)


@pytest.mark.parametrize(
    ("schedule", "positive", "said"),
    [
        (Schedule("constant", -1.0), False, "weight of x must not be negative; got -1"),
        (Schedule("linear", 1.0, -1.0), False, "weight of x must not be negative; got 1 to -1, linear"),
        (Schedule("constant", float("nan")), False, "weight of x must be finite; got nan"),
        (
            Schedule("linear", 1.0, 2.0, 0.6, 0.6),
            False,
            "weight of x must begin before it ends; got from = 0.6, until = 0.6",
        ),
        (Schedule("linear", 4.0, 0.0), True, "weight of x must stay above 0; got 4 to 0"),
        # Outside its window a stage is 0, which no temperature can be.
        (Schedule("stages", 4.0, 4.0, 0.0, 0.5), True, "weight of x must stay above 0"),
    ],
)
def test_problems(schedule: Schedule, positive: bool, said: str) -> None:
    assert schedule_problems(schedule, "weight of x", positive=positive)[0].startswith(said)
    assert not schedule_problems(Schedule("cosine", 1.0, 2.0), "weight of x", positive=True)


def test_a_gap_between_stages_is_found() -> None:
    """The optimiser would go on with weight decay and momentum alone."""
    early, late = Schedule("stages", 1.0, until=0.4), Schedule("stages", 1.0, begin=0.6)
    assert silent_stretch([early, late]) == (0.4, 0.6)
    assert silent_stretch([early, Schedule("stages", 1.0, begin=0.4)]) is None
    assert silent_stretch([Schedule("linear", 0.0, 1.0, 0.5, 1.0)]) == (0.0, 0.5)
    assert silent_stretch([Schedule("linear", 1.0, 0.0)]) is None
    assert silent_stretch([Schedule("constant", 0.0)]) == (0.0, 1.0)


def test_flsw_by_hand() -> None:
    """Cosines 1, 0 and -1 give w = 0, 1 and 4 with gamma 2; their mean is 5/3."""
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    tau = dynamic_temperature(student, teacher, "flsw", 4.0, beta=0.5, gamma=2.0)
    torch.testing.assert_close(tau, torch.tensor([[4.0 + 5 / 6], [4.0 + 1 / 3], [4.0 - 7 / 6]]))
    assert not tau.requires_grad


def test_cwsm_by_hand() -> None:
    """Rows that are sure (0.9) and unsure (0.5): w = 1 / 0.901 and 1 / 0.501."""
    student = torch.tensor([[math.log(9.0), 0.0], [0.0, 0.0]])
    tau = dynamic_temperature(student, torch.zeros(2, 2), "cwsm", 4.0, beta=1.0)
    w = [1 / 0.901, 1 / 0.501]
    mean = sum(w) / 2
    torch.testing.assert_close(tau, torch.tensor([[4.0 + mean - w[0]], [4.0 + mean - w[1]]]))


def test_a_dynamic_temperature_never_turns_negative() -> None:
    """With a large beta the formula falls below 0, where the softmax would reward being wrong."""
    student, teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert dynamic_temperature(student, teacher, "flsw", 2.0, beta=100.0).min() == pytest.approx(0.2)
