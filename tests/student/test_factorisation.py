"""A narrower embedding says nearly what the teacher's says, weighs what was promised, and is told of."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from distill.cards import load_student_card
from distill.errors import StudentError
from distill.export.graph import export_graph
from distill.export.quantize import quantize_dynamic_int8
from distill.features import record
from distill.student.build import build_student, plan_student
from distill.tasks import TASKS

CARD = load_student_card("factorised-4")
SHAPE = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 24, "num_labels": 3,
}  # fmt: skip


def teacher_of(family="bert", inner_rank=32, **changes):
    """Word rows of the given rank, beside small positions, and a LayerNorm with a gain and a shift."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **(SHAPE | changes))).eval()
    tables = model.base_model.embeddings
    with torch.no_grad():
        width = tables.word_embeddings.weight.shape[1]
        strengths = torch.linspace(1.0, 0.3, inner_rank)
        tables.word_embeddings.weight.copy_(
            torch.randn(200, inner_rank) * strengths @ torch.randn(inner_rank, width) / inner_rank**0.5
        )
        for table in (tables.position_embeddings, tables.token_type_embeddings):
            table.weight.mul_(2.0)
        tables.LayerNorm.weight.add_(0.2 * torch.randn(width))
        tables.LayerNorm.bias.add_(0.2 * torch.randn(width))
    return model


def entering(model):
    """What the first layer gets for every token."""
    ids = torch.arange(5, 197).view(12, 16)
    with torch.no_grad(), record(model.eval(), ["hidden.0"]) as tapped:
        return tapped({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["hidden.0"]


def error(teacher, rank):
    """Squared error of what enters the first layer, over its variance."""
    student = build_student(teacher, CARD, overrides={"embedding_size": rank})
    theirs, mine = entering(teacher), entering(student.model)
    return ((mine - theirs).square().sum() / (theirs - theirs.mean((0, 1))).square().sum()).item()


def test_tokens_of_few_directions_come_through():
    assert error(teacher_of(inner_rank=6), 12) < 0.05


def test_more_numbers_a_token_lose_less():
    errors = [error(teacher_of(), rank) for rank in (4, 12, 24)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1.0  # better than one vector for all
    assert errors[2] < 0.15


@pytest.mark.parametrize("family", ["electra", "albert"])
def test_a_table_that_is_narrow_already_becomes_narrower(family):
    teacher = teacher_of(family, embedding_size=24, inner_rank=6)
    card = CARD.model_copy(update={"family": "teacher"})
    student = build_student(teacher, card, overrides={"embedding_size": 12})
    assert student.fresh == ()
    theirs, mine = entering(teacher), entering(student.model)
    assert (mine - theirs).square().sum() < 0.05 * (theirs - theirs.mean((0, 1))).square().sum()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_everything_starts_from_the_teacher_and_is_told(family):
    teacher = teacher_of(family)
    student = build_student(teacher, CARD, overrides={"embedding_size": 8})
    assert student.fresh == ()
    assert student.model.config.model_type == "electra"
    assert any("embedding factorised: 200 x 8 and 8 x 32 for 200 x 32; it keeps" in said for said in student.remarks)
    mine, theirs = dict(student.model.named_parameters()), dict(teacher.named_parameters())
    name = "encoder.layer.3.output.dense.weight"
    assert torch.equal(mine[f"electra.{name}"], theirs[f"{teacher.base_model_prefix}.{name}"])


def test_a_family_without_a_narrow_table_and_a_table_that_is_not_narrow():
    config = BertConfig(**SHAPE)
    with pytest.raises(StudentError, match=r"embedding_size is 8, and the family 'bert' .* set family to electra"):
        plan_student(config, CARD, overrides={"family": "teacher", "embedding_size": 8})
    with pytest.raises(StudentError, match="embedding_size must be less than hidden_size 32; got 32"):
        plan_student(config, CARD, overrides={"embedding_size": 32})


def test_the_int8_file_weighs_what_was_expected(tmp_path):
    torch.manual_seed(0)
    teacher = BertForSequenceClassification(
        BertConfig(vocab_size=8_000, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    )
    student = build_student(teacher, CARD, overrides={"layers": 2, "embedding_size": 64})
    spec = TASKS["text-classification"].graph(("input_ids", "attention_mask", "token_type_ids"))
    export_graph(student.model.eval(), spec, tmp_path / "model.onnx")
    quantize_dynamic_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert student.int8_bytes == pytest.approx((tmp_path / "int8.onnx").stat().st_size, rel=0.02)
