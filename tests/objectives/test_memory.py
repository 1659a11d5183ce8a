"""Rows of earlier batches: kept in order, bounded, and part of what a resume goes on from."""

import pytest
import torch

from distill.encoders import Architecture
from distill.errors import ObjectiveError
from distill.objectives.memory import Memory
from distill.objectives.objective import build_objective
from distill.recipe import TermRecipe
from distill.training.fit import DistillationModule

SMALL, LARGE = (Architecture("bert", layers=2, width=width, heads=2, labels=3, vocab=9) for width in (8, 12))


def rows(*numbers):
    return torch.tensor(numbers, dtype=torch.float32).unsqueeze(1).expand(-1, 2)


def test_the_newest_rows_stay_and_a_batch_does_not_meet_itself():
    memory = Memory(3, 2)
    assert len(memory(rows(1, 2))) == 0
    assert torch.equal(memory(rows(3, 4)), rows(1, 2))
    assert set(memory(rows(5))[:, 0].tolist()) == {2.0, 3.0, 4.0}
    assert set(memory(rows(6, 7, 8, 9, 10))[:, 0].tolist()) == {3.0, 4.0, 5.0}  # a batch larger than the ring
    assert set(memory.eval()(rows(11))[:, 0].tolist()) == {8.0, 9.0, 10.0}
    assert set(memory(rows(12))[:, 0].tolist()) == {8.0, 9.0, 10.0}  # evaluation adds nothing


def objective_of(memory):
    options = {"memory": memory, "targets": "hard"}
    return build_objective(
        [TermRecipe.model_validate({"loss": "contrastive", "layers": "final", "options": options})], SMALL, LARGE
    )


def features(seed):
    generator = torch.Generator().manual_seed(seed)
    student = {"hidden.2": torch.randn(2, 3, 8, generator=generator)}
    teacher = {"hidden.2": torch.randn(2, 3, 12, generator=generator)}
    return student, teacher, {"attention_mask": torch.ones(2, 3, dtype=torch.long), "scored": torch.ones(2).bool()}


def loss(objective, seed):
    return objective(*features(seed))["contrastive"][0]


def test_more_negatives_make_it_harder_and_a_resume_goes_on_from_them():
    objective, without = objective_of(5), objective_of(0)
    assert loss(objective, 0) == loss(without, 0)
    assert loss(objective, 1) > loss(without, 1)
    resumed = objective_of(5)
    resumed.load_state_dict(objective.state_dict())
    assert loss(resumed, 2) == loss(objective, 2)
    loss(objective, 3).backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert objective.describe()[0]["options"]["memory"] == 5


def test_rows_are_checkpointed_beside_the_student_and_not_in_it():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    student = BertForSequenceClassification(config)
    names = set(student.state_dict())
    saved = DistillationModule(student, objective_of(5)).state_dict()
    assert {name for name in saved if "rows" in name} == {"objective.memories.contrastive.2-2.rows"}
    assert set(student.state_dict()) == names


@pytest.mark.parametrize("memory", [-1, 0.5])
def test_a_memory_of_no_whole_number_of_rows_is_refused(memory):
    with pytest.raises(ObjectiveError, match=f"memory must be a whole number of rows up to 1,000,000; got {memory}"):
        objective_of(memory)
