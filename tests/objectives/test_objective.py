"""The objective as the trainer uses it, and every recipe that must be refused before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.encoders import Architecture
from distill.errors import ObjectiveError
from distill.features import TappedModel, describe
from distill.objectives import Objective, build_objective
from distill.objectives.base import Loss, SumCount, Unit
from distill.objectives.losses import LOSSES
from distill.objectives.projection import make_projection
from distill.recipe import TermRecipe

STUDENT = Architecture("bert", layers=2, width=16, heads=2, labels=3, vocab=50)
TEACHER = Architecture("bert", layers=4, width=16, heads=2, labels=3, vocab=50)
WIDE = Architecture("bert", layers=4, width=24, heads=2, labels=3, vocab=50)


def term(loss: str, **fields: Any) -> TermRecipe:
    return TermRecipe.model_validate({"loss": loss, **fields})


def batch_of(rows: int = 4, length: int = 5) -> dict[str, Tensor]:
    """Rows of 5, 4, 3, ... tokens; the last row has no label."""
    lengths = torch.tensor([max(1, length - row) for row in range(rows)])
    labels = torch.arange(rows) % 3
    labels[-1] = -100
    return {
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "labels": labels,
        "scored": torch.ones(rows, dtype=torch.bool),
        "example": torch.arange(rows),
    }


def features_of(shape: Architecture, rows: int = 4, length: int = 5, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    features = {"logits": draw(rows, shape.labels)}
    features |= {f"hidden.{k}": draw(rows, length, shape.width) for k in range(shape.layers + 1)}
    for kind in ("query", "key", "value"):
        features |= {f"{kind}.{k}": draw(rows, length, shape.attention_width) for k in range(1, shape.layers + 1)}
    for k in range(1, shape.layers + 1):
        features[f"scores.{k}"] = draw(rows, shape.heads, length, length)
        features[f"attention.{k}"] = features[f"scores.{k}"].softmax(-1)
    return features


def built(
    *terms: TermRecipe, student: Architecture = STUDENT, teacher: Architecture = TEACHER, **more: Any
) -> Objective:
    return build_objective(terms, student, teacher, **more)


def test_terms_say_what_they_read_and_are_divided_by() -> None:
    objective = built(term("soft_labels"), term("hard_labels"), term("hidden_mse"))
    assert objective.student_taps == {"logits", "hidden.0", "hidden.1", "hidden.2"}
    assert objective.teacher_taps == {"logits", "hidden.0", "hidden.1", "hidden.4"}
    assert objective.units == {
        "soft_labels": Unit.SCORED,
        "hard_labels": Unit.LABELLED,
        "hidden_mse": Unit.TOKENS,
    }
    counts = objective.counts(batch_of())
    assert {unit: float(counts[unit]) for unit in (Unit.SCORED, Unit.LABELLED, Unit.TOKENS)} == {
        Unit.SCORED: 4.0,
        Unit.LABELLED: 3.0,
        Unit.TOKENS: 14.0,
    }


def test_the_counts_of_the_batch_are_the_counts_of_the_terms() -> None:
    """The trainer divides by the first before it has seen the second."""
    objective, batch = built(term("soft_labels"), term("hard_labels"), term("hidden_mse")), batch_of()
    counts = objective.counts(batch)
    for name, (_, count) in objective(features_of(STUDENT), features_of(TEACHER, seed=1), batch).items():
        torch.testing.assert_close(count, counts[objective.units[name]])


def test_labels_alone_need_no_teacher() -> None:
    objective = built(term("hard_labels"))
    assert objective.teacher_taps == frozenset()
    student, batch = features_of(STUDENT), batch_of()
    total, count = objective(student, {}, batch)["hard_labels"]
    expected = torch.nn.functional.cross_entropy(student["logits"][:3], batch["labels"][:3], reduction="sum")
    torch.testing.assert_close(total, expected)
    assert count == 3


def test_a_term_over_layers_is_their_mean() -> None:
    student, teacher, batch = features_of(STUDENT), features_of(TEACHER, seed=1), batch_of()
    total, count = built(term("hidden_mse", layers=[[1, 1], [2, 4]]))(student, teacher, batch)["hidden_mse"]
    mask = batch["attention_mask"].unsqueeze(-1)
    by_hand = [
        ((student[f"hidden.{s}"] - teacher[f"hidden.{t}"]).square() * mask).sum() / 16 for s, t in ((1, 1), (2, 4))
    ]
    torch.testing.assert_close(total, (by_hand[0] + by_hand[1]) / 2)
    assert count == 14


def test_temperatures_and_weights_follow_their_schedules() -> None:
    cooling = {"schedule": "linear", "start": 8.0, "end": 2.0}
    fading = {"schedule": "linear", "start": 1.0, "end": 0.5, "until": 0.5}
    objective = built(term("soft_labels", temperature=cooling, weight=fading))
    assert objective.weights(0.0) == {"soft_labels": 1.0}
    assert objective.weights(0.75) == {"soft_labels": 0.5}
    student, teacher, batch = features_of(STUDENT), features_of(TEACHER, seed=1), batch_of()
    for progress, temperature in ((0.0, 8.0), (0.5, 5.0), (1.0, 2.0)):
        total, _ = objective(student, teacher, batch, progress)["soft_labels"]
        expected, _ = built(term("soft_labels", temperature=temperature))(student, teacher, batch)["soft_labels"]
        torch.testing.assert_close(total, expected)


def test_terms_of_another_stage_are_not_computed() -> None:
    early = {"schedule": "stages", "until": 0.5}
    late = {"schedule": "stages", "from": 0.5}
    objective = built(term("hidden_mse", weight=early), term("soft_labels", weight=late))
    student, teacher, batch = features_of(STUDENT), features_of(TEACHER, seed=1), batch_of()
    assert set(objective(student, teacher, batch, 0.2)) == {"hidden_mse"}
    assert set(objective(student, teacher, batch, 0.5)) == {"soft_labels"}
    assert objective.weights(0.2) == {"hidden_mse": 1.0, "soft_labels": 0.0}


def test_two_terms_of_one_loss_have_two_names() -> None:
    objective = built(term("hidden_mse", layers="final"), term("hidden_mse", layers=[[0, 0]]), teacher=WIDE)
    assert list(objective.units) == ["hidden_mse", "hidden_mse_2"]
    assert objective.layer_maps == {"hidden_mse": [(2, 4)], "hidden_mse_2": [(0, 0)]}
    assert set(objective(features_of(STUDENT), features_of(WIDE), batch_of())) == {"hidden_mse", "hidden_mse_2"}


def test_projections_stand_only_where_widths_differ() -> None:
    assert list(built(term("hidden_mse")).parameters()) == []
    apart = built(term("hidden_mse"), teacher=WIDE)
    shapes = {name: tuple(parameter.shape) for name, parameter in apart.named_parameters()}
    assert shapes == {
        f"projections.hidden_mse.maps.{layer}.{kind}": size
        for layer in (0, 1, 2)
        for kind, size in (("weight", (24, 16)), ("bias", (24,)))
    }
    shared = built(term("hidden_mse", options={"projection": "shared", "projection_init": "xavier"}), teacher=WIDE)
    assert [tuple(parameter.shape) for parameter in shared.parameters()] == [(24, 16)]


def test_projections_learn_and_so_does_the_student_but_never_the_teacher() -> None:
    objective, batch = built(term("soft_labels"), term("hidden_mse"), teacher=WIDE), batch_of()
    student = {name: value.requires_grad_() for name, value in features_of(STUDENT).items()}
    teacher = {name: value.requires_grad_() for name, value in features_of(WIDE, seed=1).items()}
    sum(total for total, _ in objective(student, teacher, batch).values()).backward()
    assert all(value.grad is not None for name, value in student.items() if name in objective.student_taps)
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert all(value.grad is None for value in teacher.values())


def test_projections_start_from_the_seed_and_leave_the_global_generator_alone() -> None:
    """Else adding a term would change the student's dropout, and a resumed run would start from other projections."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, same, other = (built(term("hidden_mse"), teacher=WIDE, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [objective.state_dict()["projections.hidden_mse.maps.1.weight"] for objective in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    first, second = (one.state_dict()[f"projections.hidden_mse.maps.{k}.weight"] for k in (0, 1))
    assert not torch.equal(first, second)
    both = built(term("hidden_mse", layers="final"), term("hidden_mse", layers="final"), teacher=WIDE)
    apart = [both.state_dict()[f"projections.{name}.maps.2.weight"] for name in ("hidden_mse", "hidden_mse_2")]
    assert not torch.equal(*apart)


@torch.no_grad()
def test_projection_starts() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = make_projection(200, 300, "normal", generator)
    assert float(normal.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert not normal.bias.any()
    xavier = make_projection(200, 300, "xavier", generator)
    assert xavier.bias is None
    assert float(xavier.weight.abs().max()) <= (6 / 500) ** 0.5
    orthogonal = make_projection(200, 300, "orthogonal", generator)
    torch.testing.assert_close(orthogonal.weight.T @ orthogonal.weight, torch.eye(200), atol=1e-5, rtol=0)


def test_splitting_a_batch_changes_no_gradient() -> None:
    """Micro-batches with unequal numbers of tokens and labels, as the trainer adds them up."""
    objective, batch = built(term("soft_labels"), term("hard_labels"), term("hidden_mse"), teacher=WIDE), batch_of()
    student, teacher = features_of(STUDENT), features_of(WIDE, seed=1)

    def gradients(parts: list[slice]) -> list[Tensor]:
        objective.zero_grad()
        leaves = {name: value.clone().requires_grad_() for name, value in student.items()}
        counts = objective.counts(batch)
        for part in parts:
            rows = [{name: value[part] for name, value in each.items()} for each in (leaves, teacher, batch)]
            for name, (total, _) in objective(*rows).items():
                (total / counts[objective.units[name]]).backward(retain_graph=True)
        read = [leaves[name].grad for name in sorted(objective.student_taps)]
        return [value.clone() for value in [*read, *(p.grad for p in objective.parameters())] if value is not None]

    whole, split = gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])
    assert len(whole) == 10
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_weighed_by_transport() -> None:
    """With costs that favour the diagonal, the flow is on the diagonal."""
    student, teacher, batch = features_of(STUDENT), features_of(STUDENT), batch_of()
    objective = built(term("hidden_mse", layers="emd"), teacher=STUDENT)
    total, _ = objective(student, teacher, batch)["hidden_mse"]
    assert total == 0  # every student layer is one of the teacher's, and all of its weight goes there
    shifted = {**teacher, "hidden.0": teacher["hidden.1"], "hidden.1": teacher["hidden.0"]}
    assert objective(student, shifted, batch)["hidden_mse"][0] < 1e-6
    assert "movers.hidden_mse.student_weights" in objective.state_dict()


def test_transport_through_projections_has_gradients() -> None:
    objective, batch = built(term("hidden_mse", layers="emd"), teacher=WIDE), batch_of()
    total, count = objective(features_of(STUDENT), features_of(WIDE), batch)["hidden_mse"]
    (total / count).backward()
    assert sum(p.grad.abs().sum() for p in objective.parameters() if p.grad is not None) > 0


def test_a_dynamic_temperature_softens_rows_that_are_close() -> None:
    """By hand: each row at its own temperature, scaled by the square of it."""
    from distill.objectives.schedule import dynamic_temperature

    student, teacher, batch = features_of(STUDENT), features_of(TEACHER, seed=1), batch_of()
    options = {"dynamic": "flsw", "beta": 0.5, "gamma": 2.0}
    total, _ = built(term("soft_labels", temperature=4.0, options=options))(student, teacher, batch)["soft_labels"]
    tau = dynamic_temperature(student["logits"], teacher["logits"], "flsw", 4.0, beta=0.5, gamma=2.0)
    p, q = (teacher["logits"] / tau).log_softmax(-1), (student["logits"] / tau).log_softmax(-1)
    torch.testing.assert_close(total, (tau.square() * p.exp() * (p - q)).sum())
    plain, _ = built(term("soft_labels", temperature=4.0))(student, teacher, batch)["soft_labels"]
    assert not torch.isclose(total, plain)


def test_answers_in_a_text_have_no_temperature_by_example() -> None:
    """It would be one of rows, and a row has two distributions, over its tokens."""
    with pytest.raises(ObjectiveError, match="soft_spans has no option 'dynamic'"):
        built(term("soft_spans", options={"dynamic": "flsw"}))


@pytest.mark.parametrize(
    ("loss", "convention", "reads"),
    [
        ("hidden_mse", "tinybert", True),
        ("hidden_mse", "distill", False),
        ("attention_mse", "textbrewer", False),
        ("attention_ce", "mobilebert", True),
        ("key_relation", "paddle", True),
        ("soft_labels", "tinybert", False),  # rows, of which none is padding
        ("soft_spans", "distilbert", True),
    ],
)
def test_conventions_that_read_padding_are_known(loss: str, convention: str, reads: bool) -> None:
    (plan,) = built(term(loss, options={"convention": convention})).plans
    assert plan.reads_padding is reads


def test_a_convention_that_counts_padding_is_divided_by_it() -> None:
    """TinyBERT's code averages over every position. The trainer divides by tokens, whatever the convention."""
    student, teacher, batch = features_of(STUDENT), features_of(TEACHER, seed=1), batch_of()
    objective = built(term("hidden_mse", layers=[[1, 1]], options={"convention": "tinybert"}))
    total, count = objective(student, teacher, batch)["hidden_mse"]
    torch.testing.assert_close(count, objective.counts(batch)[Unit.TOKENS])
    torch.testing.assert_close(total / count, torch.nn.functional.mse_loss(student["hidden.1"], teacher["hidden.1"]))


def pair_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], *, mask: Tensor) -> SumCount:
    """Reads two layers at a time, as NST and FSP do."""
    (low, high), (teacher_low, teacher_high) = student, teacher
    return ((high - low).sum() - (teacher_high - teacher_low).sum()).square(), mask.sum().float()


PAIRS = Loss("pairs", pair_loss, "hidden", Unit.TOKENS, ("mask",), layers_per_item=2)


def test_a_loss_of_your_own_over_neighbouring_layers() -> None:
    student, teacher, batch = features_of(STUDENT), features_of(TEACHER, seed=1), batch_of()
    objective = built(term("pairs", layers="first"), losses={"pairs": PAIRS})
    total, _ = objective(student, teacher, batch)["pairs"]
    s, t = ([each[f"hidden.{k}"].sum() for k in range(3)] for each in (student, teacher))
    expected = sum(((s[k + 1] - s[k]) - (t[k + 1] - t[k])).square() for k in range(2)) / 2
    torch.testing.assert_close(total, expected)


def test_rows_and_description() -> None:
    objective = built(
        term("soft_labels", temperature=8, weight={"schedule": "linear", "start": 0.0, "end": 1.0}),
        term("hidden_mse", layers="even"),
        teacher=WIDE,
    )
    assert objective.rows() == [
        ["soft_labels", "0 to 1, linear, from 0% to 100%", "logits, temperature 8", ""],
        ["hidden_mse", "1", "hidden, projected 16 to 24", "embeddings from embeddings, 1 from 1, 2 from 4"],
    ]
    described = objective.describe()
    assert [entry["term"] for entry in described] == ["soft_labels", "hidden_mse"]
    assert described[1]["layers"] == [[0, 0], [1, 1], [2, 4]]


@pytest.mark.parametrize(
    ("option", "one", "other", "more"),
    [
        ("projection_init", "normal", "orthogonal", {}),
        ("projection", "layer", "shared", {}),
        ("emd_temperature", 1.0, 2.0, {"layers": "emd"}),
    ],
)
def test_what_changes_the_result_changes_the_description(option: str, one: Any, other: Any, more: Any) -> None:
    """A finished run is taken up again by its description: an option left out of it would be ignored from then on."""
    first, second = (
        built(term("hidden_mse", options={option: value}, **more), teacher=WIDE).describe() for value in (one, other)
    )
    assert first != second


def test_the_students_own_layers_are_the_map_where_it_inherits() -> None:
    objective = built(term("hidden_mse", layers="inherited"), layer_map=[(1, 2), (2, 3)])
    assert objective.layer_maps == {"hidden_mse": [(0, 0), (1, 2), (2, 3)]}


@pytest.mark.parametrize(
    ("terms", "student", "teacher", "said"),
    [
        ([], STUDENT, TEACHER, "objective: the objective has no terms; give one at least"),
        ([term("hiden_mse")], STUDENT, TEACHER, "loss 'hiden_mse' does not exist; did you mean hidden_mse"),
        ([term("zzzzzz")], STUDENT, TEACHER, "loss 'zzzzzz' does not exist; known: .*soft_labels"),
        (
            [term("hidden_mse", options={"projektion": "shared"})],
            STUDENT,
            TEACHER,
            "hidden_mse has no option 'projektion'; did you mean projection",
        ),
        (
            [term("hidden_mse", options={"projection": "none"})],
            STUDENT,
            TEACHER,
            "hidden_mse: option projection must be one of 'layer', 'shared'; got 'none'",
        ),
        (
            [term("soft_labels", options={"convention": "textbrewr"})],
            STUDENT,
            TEACHER,
            "option convention must be one of 'distill', 'textbrewer', 'tinybert', 'modelopt'; got 'textbrewr'",
        ),
        (
            [term("soft_labels", options={"beta": "much"})],
            STUDENT,
            TEACHER,
            r"soft_labels: option beta must be like 1\.0; got 'much'",
        ),
        (
            [term("soft_labels", options={"temperature": 4})],
            STUDENT,
            TEACHER,
            "soft_labels: temperature stands beside `options`, not in it",
        ),
        # An option of projections on a loss that has none to make.
        (
            [term("hard_labels", options={"projection": "shared"})],
            STUDENT,
            TEACHER,
            "hard_labels has no option 'projection'",
        ),
        (
            [term("hidden_mse", temperature=2.0)],
            STUDENT,
            TEACHER,
            r"hidden_mse has no temperature; take it away \(these have",
        ),
        (
            [term("soft_labels", temperature=0.0)],
            STUDENT,
            TEACHER,
            "temperature of soft_labels must stay above 0; got 0",
        ),
        ([term("soft_labels", weight=-1.0)], STUDENT, TEACHER, "weight of soft_labels must not be negative; got -1"),
        ([term("soft_labels", weight=0.0)], STUDENT, TEACHER, "every weight is 0 from 0% to 100% of training"),
        ([term("soft_labels", layers="last")], STUDENT, TEACHER, "soft_labels reads logits, which have no layers"),
        (
            [term("hidden_mse", layers=[[1, 9]])],
            STUDENT,
            TEACHER,
            "hidden_mse: layer map .* teacher layer 9; the teacher's are 0 to 4",
        ),
        (
            [term("hidden_mse", layers="tinybert")],
            STUDENT,
            Architecture("bert", 5, 16, 2, 3, 50),
            "5 teacher layers to be a multiple of 2",
        ),
        (
            [term("soft_labels")],
            STUDENT,
            Architecture("bert", 4, 16, 2, 7, 50),
            "the student has 3 labels, the teacher 7; give both",
        ),
    ],
)
def test_refused_before_the_first_step(terms: list[TermRecipe], student: Any, teacher: Any, said: str) -> None:
    with pytest.raises(ObjectiveError, match=said):
        build_objective(terms, student, teacher)


def test_features_that_a_family_does_not_give_are_missed_at_once() -> None:
    unlisted = Architecture("ernie", 4, 16, 2, 3, 50)

    def on_queries(student: Tensor, teacher: Tensor) -> SumCount:
        raise AssertionError("never called")

    losses = {"on_queries": Loss("on_queries", on_queries, "query", Unit.TOKENS)}
    with pytest.raises(ObjectiveError, match=r"reads query, which is not known for teacher 'ernie' \(known: bert"):
        build_objective([term("on_queries")], STUDENT, unlisted, losses=losses)


def on_heads(student: Tensor, teacher: Tensor, *, heads: str = "each", relation_heads: int = 0) -> SumCount:
    """Keeps the options it was called with in its value."""
    return torch.tensor(float(relation_heads)), torch.ones(())


HEADS = {
    "scores": Loss("scores", on_heads, "scores", Unit.TOKEN_PAIRS, options={"heads": "each"}),
    "relation": Loss("relation", on_heads, "query", Unit.TOKENS, options={"relation_heads": 0}),
}


def test_heads_that_do_not_go_together() -> None:
    """Broadcasting would compare one head with all of the other's and train on."""
    six = Architecture("bert", layers=4, width=24, heads=6, labels=3, vocab=50)
    with pytest.raises(
        ObjectiveError, match="the student has 2, the teacher 6; set heads = 'mean', give the student 6"
    ):
        built(term("scores"), teacher=six, losses=HEADS)
    built(term("scores", options={"heads": "mean"}), teacher=six, losses=HEADS)
    with pytest.raises(ObjectiveError, match="relation_heads = 6 must divide 16 and 24; 1, 2, 4, 8 would do"):
        built(term("relation", options={"relation_heads": 6}), teacher=six, losses=HEADS)


@pytest.mark.parametrize(
    ("mine", "theirs", "heads"), [(768, 768, 48), (384, 768, 48), (312, 768, 24), (16, 24, 2), (13, 24, 1)]
)
def test_relation_heads_are_chosen_to_divide_both_widths(mine: int, theirs: int, heads: int) -> None:
    student, teacher = (Architecture("bert", 4, width, 2, 3, 50) for width in (mine, theirs))
    objective = built(term("relation"), student=student, teacher=teacher, losses=HEADS)
    tiny = {f"query.{k}": torch.zeros(1) for k in range(1, 5)}
    assert objective(tiny, tiny, batch_of())["relation"][0] == heads
    assert objective.describe()[0]["options"]["relation_heads"] == heads


def test_neighbouring_layers_need_two() -> None:
    with pytest.raises(ObjectiveError, match="pairs compares 2 neighbouring layers; layer map 'final' has none"):
        build_objective([term("pairs", layers="final")], STUDENT, TEACHER, losses={"pairs": PAIRS})


def test_all_problems_are_told_at_once() -> None:
    terms = [term("soft_labls"), term("hidden_mse", layers="lst", weight=-2.0), term("hard_labels", temperature=1.0)]
    with pytest.raises(ObjectiveError) as caught:
        build_objective(terms, STUDENT, TEACHER)
    for said in ("soft_labls", "layer map 'lst'", "got -2", "hard_labels has no temperature"):
        assert said in str(caught.value)


def test_every_listed_loss_runs_on_a_real_student_and_teacher() -> None:
    """A tiny BERT of 2 layers, 32 wide, learns from one of 4 layers, 48 wide: gradients reach it from every loss."""
    import transformers

    def model(layers: int, width: int) -> Any:
        torch.manual_seed(layers)
        config = transformers.BertConfig(
            vocab_size=60, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=16, num_labels=3,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()

    student, teacher = model(2, 32), model(4, 48)
    batch = batch_of()
    batch["input_ids"] = torch.randint(5, 60, (4, 5), generator=torch.Generator().manual_seed(0))
    real = {"multilabel_labels": torch.tensor([[0.0, 1.0, 1.0]] * 4)}
    classes = batch["labels"]
    others = {"regression_labels", "soft_spans", "span_labels", *(name for name in LOSSES if LOSSES[name].paired)}
    for name in sorted(LOSSES.keys() - others):  # those are for other heads
        batch["labels"] = real.get(name, classes)
        objective = build_objective([term(name)], describe(student), describe(teacher))
        student.zero_grad()
        with torch.no_grad():
            target = TappedModel(teacher, objective.teacher_taps)(batch)
        total, count = objective(TappedModel(student, objective.student_taps)(batch), target, batch)[name]
        assert torch.isfinite(total), name
        torch.testing.assert_close(count, objective.counts(batch)[objective.units[name]], msg=name)
        total.backward()
        assert student.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0, name
        assert all(p.grad is not None for p in objective.parameters()), name
