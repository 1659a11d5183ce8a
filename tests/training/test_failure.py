"""A loss that is no number is told with its step, at once or at the next check."""

import pytest
import torch

from distill.errors import TrainingError
from distill.training.failure import Failure


def terms(value):
    return {"soft_labels": torch.tensor(value), "hidden_mse": torch.tensor(0.5)}


def test_it_is_told_at_once_where_nothing_is_waited_for():
    failure = Failure(late=False)
    failure.look(torch.tensor(1.5), terms(1.0), 3)
    with pytest.raises(TrainingError, match=r"not finite at step 4 \(soft_labels nan, hidden_mse 0.5\)"):
        failure.look(torch.tensor(float("nan")), terms(float("nan")), 4)


def test_on_a_card_the_first_step_is_told_at_the_next_check():
    failure = Failure(late=True)
    failure.check()
    for step, value in enumerate((1.0, float("inf"), 2.0, float("nan"))):
        failure.look(torch.tensor(value), terms(value), step)
    with pytest.raises(TrainingError, match=r"not finite at step 1 \(soft_labels inf, hidden_mse 0.5\)"):
        failure.check()


def test_terms_that_come_and_go_lose_no_failure():
    failure = Failure(late=True)
    failure.look(torch.tensor(float("nan")), terms(float("nan")), 7)
    with pytest.raises(TrainingError, match="at step 7"):
        failure.look(torch.tensor(1.0), {"soft_labels": torch.tensor(1.0)}, 8)
