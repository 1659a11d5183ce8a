"""Thin layers between two products: built, fitted to their teacher, tapped, trimmed, shipped at the promised size."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from distill.cards import StudentCard, load_student_card
from distill.encoders import describe
from distill.errors import StudentError
from distill.export.graph import export_graph
from distill.export.quantize import quantize_dynamic_int8
from distill.features import record
from distill.student.build import build_student, plan_student
from distill.student.start import start_student
from distill.tasks import TASKS

SHAPE = {"embedding_size": 12, "bottleneck_size": 8, "intermediate_size": 16, "attention_heads": 2, "layers": 2}


def card(**changes: Any) -> StudentCard:
    return load_student_card("bottleneck-6").model_copy(update={**SHAPE, "declared": None, **changes})


def tiny(family: str = "bert", **changes: Any) -> Any:
    shape = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        family, intermediate_size=48, max_position_embeddings=24, num_labels=3, pad_token_id=1, **(shape | changes)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(5, 60, (16, 9), generator=generator), "attention_mask": torch.ones(16, 9).long()}
        for _ in range(8)
    ]


def distance(student: Any, teacher: Any) -> float:
    """Squared error of the logits over their variance, on texts that were not fitted on."""
    ids = torch.randint(5, 60, (64, 9), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        mine, theirs = student.eval()(input_ids=ids)[0], teacher(input_ids=ids)[0]
    return float((mine - mine.mean(0) - theirs + theirs.mean(0)).square().mean() / (theirs - theirs.mean(0)).var())


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_fitted_student_answers_more_like_its_teacher_than_one_that_says_nothing(family: str) -> None:
    teacher = tiny(family)
    fitted = start_student(teacher, card(layers=3), batches)
    copied = start_student(teacher, card(layers=3), batches, init="copy")
    assert fitted.remarks == ("every part fitted to the teacher on 128 texts",)
    assert fitted.fresh == ()
    assert distance(fitted.model, teacher) < 0.8
    assert distance(fitted.model, teacher) < 0.8 * distance(copied.model, teacher)


def test_more_room_inside_fits_better() -> None:
    teacher = tiny()
    wide = {"embedding_size": 20, "bottleneck_size": 24, "intermediate_size": 48, "attention_heads": 4}
    small, large = (start_student(teacher, card(layers=3, **shape), batches).model for shape in ({}, wide))
    assert distance(large, teacher) < distance(small, teacher)


def test_stacked_feed_forwards_share_the_neurons() -> None:
    teacher = tiny()
    one, three = (
        start_student(teacher, card(layers=3, feed_forwards=n, intermediate_size=4), batches).model for n in (1, 3)
    )
    assert not hasattr(one.mobilebert.encoder.layer[0], "ffn")
    assert len(three.mobilebert.encoder.layer[0].ffn) == 2
    assert distance(three, teacher) < distance(one, teacher)


def test_the_teacher_and_the_generator_stay_as_they_were() -> None:
    teacher = tiny()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    state = torch.random.get_rng_state()
    start_student(teacher, card(), batches)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_its_states_and_heads_can_be_compared_with_a_teachers() -> None:
    student = build_student(tiny(), card()).model.eval()
    shape = describe(student)
    assert (shape.layers, shape.width, shape.heads, shape.attention_width) == (2, 24, 2, 8)
    with record(student, ["hidden.0", "hidden.2", "query.1", "attention.2"]) as tapped:
        found = tapped(batches()[0])
    assert [tuple(found[tap].shape) for tap in tapped.taps] == [(16, 9, 24), (16, 9, 24), (16, 9, 8), (16, 2, 9, 9)]
    theirs = student(**batches()[0], output_hidden_states=True).hidden_states
    torch.testing.assert_close(found["hidden.2"], theirs[2])


def test_fewer_tokens_answer_the_same() -> None:
    teacher = tiny()
    whole = start_student(teacher, card(), batches).model.eval()
    kept = [0, 1, 2, 3, 4, *range(10, 60)]
    trimmed = start_student(teacher, card(), batches, kept_ids=kept).model.eval()
    ids = torch.randint(5, 55, (4, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(trimmed(input_ids=ids)[0], whole(input_ids=torch.tensor(kept)[ids])[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bottleneck_size": None}, "bottleneck_size must be given for the family mobilebert"),
        ({"bottleneck_size": 32}, "bottleneck_size must be at most the teacher's hidden_size 24"),
        ({"hidden_size": 16}, "hidden_size 16, which the student keeps"),
        ({"attention_heads": 3}, "3 attention_heads do not divide"),
        ({"family": "teacher", "embedding_size": "teacher"}, "are for the family mobilebert"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StudentError, match=said):
        plan_student(tiny().config, card(**changes))


def test_the_file_answers_alike_and_weighs_what_was_expected(tmp_path: Any) -> None:
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(
        BertConfig(vocab_size=8_000, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    )
    wide = {"embedding_size": 64, "bottleneck_size": 64, "intermediate_size": 256, "attention_heads": 4}
    student = build_student(teacher, card(**wide))
    spec = TASKS["text-classification"].graph(("input_ids", "attention_mask"))
    export_graph(student.model.eval(), spec, tmp_path / "model.onnx")
    quantize_dynamic_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert student.int8_bytes == pytest.approx((tmp_path / "int8.onnx").stat().st_size, rel=0.02)
    ids = torch.randint(5, 8_000, (4, 11))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    given = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad():
        wanted = student.model(input_ids=ids, attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(given, wanted, atol=1e-4)


def test_where_neurons_run_out_those_there_are_are_fitted_and_the_others_told() -> None:
    teacher, wide = tiny(), card(layers=3, feed_forwards=4)  # 4 x 16 of the teacher's 48
    plain = build_student(teacher, wide).model
    fitted = start_student(teacher, wide, batches)
    assert fitted.remarks[0] == "random start: 16 neurons of each layer, which has more than the teacher's"
    for name, before in plain.named_parameters():
        if name.endswith("intermediate.dense.weight"):
            same = (fitted.model.get_parameter(name) == before).all(dim=1)
            assert same.tolist() == [False] * 12 + [True] * 4, name
