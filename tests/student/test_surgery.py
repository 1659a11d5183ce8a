"""Surgery: importance finds what matters, and a fitted student answers like its teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from distill.cards import StudentCard
from distill.errors import StudentError
from distill.student import surgery
from distill.student.build import build_student
from distill.student.reduction import carries, carry_over, choose_units
from distill.student.start import start_student
from distill.student.surgery import Importance, layers_of, layout_of, rank_layers, rank_units

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
DISTILBERT = {"vocab_size": 60, "dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 24}
FAMILIES = {"bert": SHAPE, "roberta": SHAPE, "distilbert": DISTILBERT, "mpnet": SHAPE | {"pad_token_id": 1}}


def tiny(family: str = "bert", auto: Any = AutoModelForSequenceClassification, **changes: Any) -> Any:
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def batches(count: int = 6, rows: int = 16) -> list[dict[str, Tensor]]:
    """Rows of 5 to 12 tokens, padded with 1."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        ids = torch.randint(5, 60, (rows, 12), generator=generator)
        lengths = torch.randint(5, 13, (rows, 1), generator=generator)
        mask = (torch.arange(12)[None] < lengths).long()
        made.append({"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "labels": ids[:, 0] % 2})
    return made


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]


def distance(student: Any, teacher: Any, held_out: list[dict[str, Tensor]]) -> float:
    """Mean square of the difference of centred logits, against that of the teacher's own."""
    mine = torch.cat([logits(student, batch) for batch in held_out])
    theirs = torch.cat([logits(teacher, batch) for batch in held_out])
    theirs = theirs - theirs.mean(0)
    return float((mine - mine.mean(0) - theirs).square().mean() / theirs.square().mean())


def card(**values: Any) -> StudentCard:
    return StudentCard(**({"name": "mine", "description": "for a test", "layers": 3} | values))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_that_feeds_nothing_has_no_importance(family):
    model = tiny(family)
    layout = layout_of(model)
    with torch.no_grad():
        layer = layers_of(model)[1]
        layer.get_submodule(layout.out).weight[:, 4:8] = 0  # the second head's columns
        layer.get_submodule(layout.down).weight[:, 7] = 0
    found = rank_units(model, batches(2))
    assert found.heads.shape == (3, 4)
    assert found.neurons.shape == (3, 24)
    assert found.heads[1, 1] == 0
    assert found.neurons[1, 7] == 0
    assert (found.heads.flatten() > 0).sum() == 11
    assert (found.neurons.flatten() > 0).sum() == 71


def test_head_importance_is_the_derivative_by_a_mask():
    """Against a finite difference: scaling one head's columns by 1 - e changes the loss by e times its importance."""
    model = tiny().double()
    (batch,) = batches(1, rows=1)
    found = rank_units(model, [batch])
    layer = layers_of(model)[2]
    labels, step = batch["labels"], 1e-6

    def loss() -> float:
        return float(torch.nn.functional.cross_entropy(logits(model, batch), labels))

    for head in range(4):
        before = loss()
        with torch.no_grad():
            layer.get_submodule("attention.output.dense").weight[:, head * 4 : head * 4 + 4] *= 1 - step
            after = loss()
            layer.get_submodule("attention.output.dense").weight[:, head * 4 : head * 4 + 4] /= 1 - step
        assert abs(before - after) / step == pytest.approx(float(found.heads[2, head]), rel=1e-3, abs=1e-7)


def test_ranking_leaves_the_model_as_it_was():
    model = tiny().train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    rank_units(model, batches(1))
    rank_layers(model, batches(1), 2)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_importance_without_labels_and_for_a_regression():
    unlabelled = [{name: values for name, values in batch.items() if name != "labels"} for batch in batches(1)]
    assert (rank_units(tiny(), unlabelled).heads > 0).all()
    scored = [batch | {"labels": torch.rand(16)} for batch in unlabelled]
    assert (rank_units(tiny(num_labels=1), scored).heads > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_that_does_nothing_goes_first(family):
    model = tiny(family)
    layout = layout_of(model)
    with torch.no_grad():
        for name in (layout.out, layout.down):
            for parameter in layers_of(model)[1].get_submodule(name).parameters():
                parameter.zero_()
        for name in (layout.attention_norm, layout.norm):  # what comes in is normal already, nearly
            layers_of(model)[1].get_submodule(name).weight.fill_(1)
            layers_of(model)[1].get_submodule(name).bias.fill_(0)
            layers_of(model)[0].get_submodule(layout.norm).weight.fill_(1)
            layers_of(model)[0].get_submodule(layout.norm).bias.fill_(0)
    assert rank_layers(model, batches(2), 2) == [1, 3]
    assert rank_layers(model, batches(2), 3) == [1, 2, 3]
    assert len(rank_layers(model, batches(2), 1)) == 1


def test_what_cannot_be_ranked_is_refused():
    with pytest.raises(StudentError, match=r"4 of 3 layers cannot be kept"):
        rank_layers(tiny(), batches(1), 4)
    with pytest.raises(StudentError, match=r"there are no batches to measure on\. Give a few hundred texts\."):
        rank_units(tiny(), [])
    albert = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("albert", **(SHAPE | {"embedding_size": 8}))
    )
    with pytest.raises(StudentError, match="share their weights"):
        rank_layers(albert, batches(1), 1)
    with pytest.raises(StudentError, match=r"surgery does not know the family 'albert' .*layers-6"):
        rank_units(albert, batches(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_fitting_a_student_of_the_teachers_shape_changes_nothing(family):
    teacher = tiny(family)
    student = carry_over(teacher, build_student(teacher, card()), batches())
    for batch in batches(1):
        torch.testing.assert_close(logits(student.model, batch), logits(teacher, batch), atol=2e-4, rtol=1e-3)


SHAPES = [
    {"hidden_size": 12, "attention_heads": 3, "intermediate_size": 20},  # heads of 4: one of the four goes
    {"hidden_size": 12, "attention_heads": 4, "intermediate_size": 20},  # thinner heads
    {"head_size": 8, "intermediate_size": 16, "activation": "relu"},  # wider ones, at the teacher's width
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fitted_student_is_nearer_to_its_teacher_than_an_unfitted_one(family, shape):
    teacher = tiny(family)
    plain = build_student(teacher, card(**shape), seed=1)
    fitted = carry_over(teacher, plain, batches(12))
    held_out = batches(14)[12:]
    assert distance(fitted.model, teacher, held_out) < min(0.75, 0.8 * distance(plain.model, teacher, held_out))
    assert fitted.size == plain.size
    assert fitted.model is not plain.model
    if family == "mpnet" and fitted.model.config.num_attention_heads != teacher.config.num_attention_heads:
        assert fitted.fresh == ("mpnet.encoder.relative_attention_bias.weight",)  # a column a head
        said = ("random start: mpnet.encoder.relative_attention_bias", "all other parts fitted")
    else:
        assert fitted.fresh == ()
        said = ("every part fitted",)
    assert fitted.remarks == (*said[:-1], f"{said[-1]} to the teacher on 192 texts")


@pytest.mark.parametrize(("family", "more"), [("deberta-v2", {}), ("electra", {"embedding_size": 8})])
def test_what_cannot_be_fitted_is_copied_or_refused(family, more):
    with torch.random.fork_rng(devices=[]):
        config = AutoConfig.for_model(family, **(SHAPE | more))
        teacher = AutoModelForSequenceClassification.from_config(config).eval()
    assert not carries(teacher.config)
    shape = {"intermediate_size": 16}
    started = start_student(teacher, card(**shape), lambda: batches(2))
    assert "cut to the 16 strongest neurons" in " ".join(started.remarks)
    with pytest.raises(StudentError, match="has products that cannot be fitted one after the other"):
        carry_over(teacher, started, batches(2))


def test_dead_units_of_a_teacher_cost_a_fitted_student_nothing():
    """One dead head, eight dead neurons and four unused directions: a student without them can answer the same."""
    teacher = tiny(num_hidden_layers=2)
    with torch.no_grad():
        for layer in layers_of(teacher):
            layer.get_submodule("attention.output.dense").weight[:, 8:12] = 0
            layer.get_submodule("output.dense").weight[:, 16:] = 0
    student = build_student(teacher, card(layers=2, intermediate_size=16))
    fitted = carry_over(teacher, student, batches(12))
    assert distance(fitted.model, teacher, batches(14)[12:]) < 1e-5


def test_a_tagger_is_fitted_too():
    teacher = tiny(auto=AutoModelForTokenClassification, num_labels=5)
    tokens = [{name: values for name, values in batch.items() if name != "labels"} for batch in batches(12)]
    plain = build_student(teacher, card(hidden_size=12, attention_heads=3, intermediate_size=20))
    fitted = carry_over(teacher, plain, tokens)
    assert distance(fitted.model, teacher, tokens[:1]) < 0.5 * distance(plain.model, teacher, tokens[:1])


def test_one_seed_gives_one_fit():
    teacher = tiny()
    plain = build_student(teacher, card(hidden_size=12, attention_heads=3))
    first, again = (carry_over(teacher, plain, batches(3), seed=4).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_given_importance_decides_which_neurons_stay():
    teacher = tiny()
    neurons = torch.zeros(3, 24)
    neurons[:, 10:14] = 1
    ranks = Importance(torch.ones(3, 4), neurons)
    student = carry_over(teacher, build_student(teacher, card(intermediate_size=4)), batches(12), importance=ranks)
    up = student.model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight")
    torch.testing.assert_close(up, teacher.bert.encoder.layer[0].intermediate.dense.weight[10:14], atol=0.02, rtol=0.1)


def test_shapes_that_cannot_be_fitted_are_refused():
    teacher = tiny()
    with pytest.raises(StudentError, match="a distilbert student cannot be fitted to a bert teacher"):
        carry_over(teacher, build_student(teacher, card(family="distilbert")), batches(1))
    with pytest.raises(StudentError, match="intermediate_size 30 is wider than the teacher's 24"):
        carry_over(teacher, build_student(teacher, card(intermediate_size=30)), batches(1))


def test_padding_and_what_is_not_scored_move_nothing():
    """The same texts, padded further or with other tokens unscored, give the same order and the same importance."""
    model = tiny(auto=AutoModelForTokenClassification, num_labels=5)
    plain = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches(3)]
    wide = [
        {name: torch.nn.functional.pad(value, (0, 9), value=int(name == "input_ids")) for name, value in b.items()}
        for b in plain
    ]
    wide = [batch | {"scored": batch["attention_mask"].bool()} for batch in wide]
    torch.testing.assert_close(rank_units(model, plain).neurons, rank_units(model, wide).neurons, atol=1e-4, rtol=1e-3)
    skipped = layers_of(model)[:1]
    with torch.no_grad():
        moves = [
            surgery._move(model, rows, [surgery._log_probabilities(model, batch) for batch in rows], skipped)
            for rows in (plain, wide)
        ]
    assert moves[0] == pytest.approx(moves[1], rel=1e-3)


def test_both_ends_of_a_span_count_and_only_where_it_may_be():
    model = tiny(auto=AutoModelForQuestionAnswering)
    batch = {name: value for name, value in batches(1)[0].items() if name != "labels"}
    inside = batch["attention_mask"].bool() & (torch.arange(12) > 3)
    found = surgery._log_probabilities(model, batch | {"inside": inside})
    assert found.shape == (2 * 16, 12)
    assert (found[0][~inside[0]] < -1e3).all()
    with torch.no_grad():
        ends = model(**surgery.inputs_of(model, batch))["end_logits"][0]
    torch.testing.assert_close(found[1][inside[0]], ends[inside[0]].log_softmax(-1))


def test_labels_beside_each_other_are_asked_one_by_one():
    model = tiny(num_labels=3, problem_type="multi_label_classification")
    batch = batches(1)[0] | {"labels": torch.full((16, 3), float("nan"))}
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    own = torch.nn.functional.softplus(-output[0].abs()).sum()  # -log of the probability of each one's likelier side
    torch.testing.assert_close(surgery.own_loss(model, output, batch), own)
    batch["labels"][0] = torch.tensor([1.0, 0.0, 1.0])
    given = torch.nn.functional.binary_cross_entropy_with_logits(output[0][0], batch["labels"][0], reduction="sum")
    rest = torch.nn.functional.softplus(-output[0][1:].abs()).sum()
    torch.testing.assert_close(surgery.own_loss(model, output, batch), given + rest)


@pytest.mark.parametrize(("hidden", "heads"), [(24, 6), (24, 2)])
def test_heads_that_stand_for_none_of_the_teachers_can_learn(hidden, heads):
    teacher = tiny(hidden_size=32)
    student = carry_over(
        teacher, build_student(teacher, card(hidden_size=hidden, attention_heads=heads)), batches(6)
    ).model
    batch = batches(1)[0]
    student.eval()(**batch)[1].sum().backward()
    for layer in layers_of(student):
        for name in ("query", "key", "value"):
            product = layer.get_submodule(f"attention.self.{name}")
            assert ((product.weight != 0).any(dim=1) | (product.weight.grad != 0).any(dim=1)).all(), name


def test_one_wider_head_keeps_the_scale_of_its_scores():
    """Two heads of 8 in the place of two of 4: the same attention, though the root they divide by is another."""
    query, key, value = (torch.randn(50, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    ranks = Importance(torch.ones(1, 2), torch.ones(1, 4))
    units = choose_units(ranks, 0, (query, key, value), heads=2, width=12, neurons=4)
    wide = (query @ units.query).reshape(50, 2, 6), (key @ units.key).reshape(50, 2, 6)
    thin = query.reshape(50, 2, 4), key.reshape(50, 2, 4)
    found, wanted = (torch.einsum("iad,jad->aij", q, k) / q.shape[-1] ** 0.5 for q, k in (wide, thin))
    torch.testing.assert_close(found, wanted)


def test_a_masked_language_model_keeps_the_table_it_was_fitted_with():
    teacher = tiny(auto=AutoModelForMaskedLM)
    tokens = [{name: values for name, values in batch.items() if name != "labels"} for batch in batches(8)]
    fitted = carry_over(teacher, build_student(teacher, card(intermediate_size=12)), tokens).model
    assert torch.equal(fitted.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert fitted.get_output_embeddings().weight is fitted.get_input_embeddings().weight
