"""How a student starts: copied where shapes agree, fitted where something was cut, trimmed last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from distill.cards import StudentCard
from distill.errors import StudentError
from distill.student.build import build_student
from distill.student.start import start_student


def tiny(**changes: Any) -> Any:
    shape = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("bert", intermediate_size=24, max_position_embeddings=24, **(shape | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def card(**changes: Any) -> StudentCard:
    return StudentCard.model_validate({"name": "mine", "description": "A shape.", "layers": 2} | changes)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(5, 60, (16, 9), generator=generator), "attention_mask": torch.ones(16, 9).long()}
        for _ in range(8)
    ]


def never() -> list[dict[str, Tensor]]:
    raise AssertionError("nothing is to be measured here")


def distance(student: Any, teacher: Any) -> float:
    ids = torch.randint(5, 60, (64, 9), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        mine, theirs = student.eval()(input_ids=ids)[0], teacher(input_ids=ids)[0]
    return float((mine - mine.mean(0) - theirs + theirs.mean(0)).square().mean() / (theirs - theirs.mean(0)).var())


def test_whole_layers_are_copied_and_nothing_is_measured() -> None:
    teacher = tiny()
    student = start_student(teacher, card(), never)
    plain = build_student(teacher, card())
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name]), name


@pytest.mark.parametrize("shape", [{"intermediate_size": 12}, {"hidden_size": 8, "attention_heads": 4}])
def test_what_was_cut_is_fitted_and_answers_more_like_its_teacher(shape: dict[str, Any]) -> None:
    teacher = tiny()
    fitted = start_student(teacher, card(layers=3, **shape), batches)
    copied = start_student(teacher, card(layers=3, **shape), never, init="copy")
    assert fitted.remarks == ("every part fitted to the teacher on 128 texts",)
    assert fitted.fresh == ()
    assert distance(fitted.model, teacher) < 0.8 * distance(copied.model, teacher)


def test_random_takes_nothing() -> None:
    student = start_student(tiny(), card(intermediate_size=12), never, init="random")
    assert student.inherited == ()


def test_a_student_that_wants_only_the_embeddings_gets_only_those() -> None:
    wanted = card(intermediate_size=12, inherits={"parts": ["embeddings"]})
    student = start_student(tiny(), wanted, never)
    assert all("embeddings" in name for name in student.inherited)


def test_layers_can_be_named_or_measured() -> None:
    teacher = tiny()
    with torch.no_grad():  # the second layer does nothing that a norm would not do
        for name, parameter in teacher.bert.encoder.layer[1].named_parameters():
            parameter.copy_(torch.ones_like(parameter) if name.endswith("LayerNorm.weight") else 0 * parameter)
    assert start_student(teacher, card(), never, layers="last").layer_map == [(1, 2), (2, 3)]
    assert start_student(teacher, card(), never, layers=[1, 2]).layer_map == [(1, 1), (2, 2)]
    assert start_student(teacher, card(), batches, layers="important").layer_map == [(1, 1), (2, 3)]


def test_layers_are_ranked_on_batches_of_the_whole_set(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def rank(teacher: Any, batches: Any, *_: Any, **__: Any) -> list[int]:
        seen.extend(batches)
        return [1, 3]

    monkeypatch.setattr("distill.student.start.rank_layers", rank)
    made = batches()
    start_student(tiny(), card(), lambda: made, layers="important")
    assert [next(place for place, one in enumerate(made) if one is batch) for batch in seen] == [0, 2, 4, 7]


def test_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(StudentError, match="Name 2 layers between 1 and 3"):
        start_student(tiny(), card(), never, layers=[2, 7])


def test_tokens_are_trimmed_after_fitting() -> None:
    teacher, kept = tiny(), [0, 5, 6, 7, 30]
    shape = card(layers=3, intermediate_size=12)
    whole, student = (start_student(teacher, shape, batches, kept_ids=ids) for ids in (None, kept))
    table = whole.model.get_input_embeddings().weight
    assert torch.equal(student.model.get_input_embeddings().weight, table[kept])
    assert student.model.config.vocab_size == 5
    assert student.parameters == whole.parameters - 55 * 16
    assert student.model.training
