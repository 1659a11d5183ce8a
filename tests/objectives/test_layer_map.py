"""Layer maps against the published ones, and optimal transport against cases that can be checked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distill.objectives.layer_map import EarthMover, layer_rows, layer_text, resolve_layer_map, transport


@pytest.mark.parametrize(
    ("choice", "S", "T", "kind", "expected"),
    [
        # TinyBERT-4 from BERT-base: hidden g(m) = 3m with the embeddings, attention (m + 1) * 3 - 1 counted from 0.
        ("tinybert", 4, 12, "hidden", [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]),
        ("tinybert", 4, 12, "attention", [(1, 3), (2, 6), (3, 9), (4, 12)]),
        ("uniform", 4, 12, "hidden", [(0, 0), (1, 3), (2, 6), (3, 9), (4, 12)]),
        # Where S does not divide T: 1.5 and 4.5 are rounded up.
        ("uniform", 4, 6, "hidden", [(0, 0), (1, 2), (2, 3), (3, 5), (4, 6)]),
        ("uniform", 6, 6, "attention", [(k, k) for k in range(1, 7)]),
        ("uniform", 6, 4, "attention", [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (6, 4)]),  # deeper than its teacher
        # DistilBERT's initialisation from layers 0, 2, 4, 7, 9, 11.
        ("even", 6, 12, "attention", [(1, 1), (2, 3), (3, 5), (4, 8), (5, 10), (6, 12)]),
        ("even", 2, 32, "attention", [(1, 1), (2, 32)]),  # distil-whisper large: 0 and 31
        ("even", 1, 12, "attention", [(1, 12)]),
        ("even", 4, 6, "hidden", [(0, 0), (1, 1), (2, 3), (3, 4), (4, 6)]),
        ("first", 3, 6, "hidden", [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ("last", 3, 6, "attention", [(1, 4), (2, 5), (3, 6)]),
        ("last", 3, 6, "hidden", [(0, 3), (1, 4), (2, 5), (3, 6)]),  # XtremeDistil: the last S + 1 states
        # PKD-Skip, six layers from twelve: 2, 4, 6, 8, 10.
        ("skip", 6, 12, "hidden", [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),
        ("final", 4, 12, "hidden", [(4, 12)]),
        ([(2, 5), (1, 1)], 4, 12, "hidden", [(2, 5), (1, 1)]),
        ([[0, 0]], 4, 12, "hidden", [(0, 0)]),
    ],
)
def test_published_maps(choice: Any, S: int, T: int, kind: Any, expected: list[tuple[int, int]]) -> None:
    assert resolve_layer_map(choice, S, T, kind=kind) == expected


def test_emd_maps_every_layer_to_every_layer() -> None:
    pairs = resolve_layer_map("emd", 2, 3, kind="attention")
    assert pairs == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    assert len(resolve_layer_map("emd", 2, 3)) == 12


def test_inherited_is_what_the_student_was_built_from() -> None:
    built = [(1, 2), (2, 4), (3, 6)]
    assert resolve_layer_map("inherited", 3, 6, kind="attention", inherited=built) == built
    assert resolve_layer_map("inherited", 3, 6, inherited=built) == [(0, 0), *built]
    assert resolve_layer_map("inherited", 4, 6) == resolve_layer_map("even", 4, 6)


@pytest.mark.parametrize(
    ("choice", "S", "T", "kind", "said"),
    [
        ([(1, 13)], 4, 12, "hidden", r"\[1, 13\] names teacher layer 13; the teacher's are 0 to 12"),
        ([(5, 1)], 4, 12, "hidden", r"\[5, 1\] names student layer 5; the student's are 0 to 4"),
        ([(0, 0)], 4, 12, "attention", r"\[0, 0\] names student layer 0; the student's are 1 to 4"),
        ([], 4, 12, "hidden", "at least; got none"),
        ("tinybert", 5, 12, "hidden", "12 teacher layers to be a multiple of 5 .* student of 1, 2, 3, 4, 6, 12 layers"),
        ("unifrom", 4, 12, "hidden", "'unifrom' does not exist; did you mean 'uniform'"),
        ("zzz", 4, 12, "hidden", "known: uniform, tinybert, even"),
        ("last", 6, 4, "hidden", "no more student than teacher layers; got 6 and 4"),
        ("skip", 1, 4, "hidden", "leaves out the last layer"),
    ],
)
def test_what_cannot_be_mapped_says_so(choice: Any, S: int, T: int, kind: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        resolve_layer_map(choice, S, T, kind=kind)


def test_rows_for_a_table() -> None:
    assert layer_rows([(0, 0), (1, 2), (1, 3)]) == [["embeddings", "embeddings"], ["1", "2, 3"]]
    assert layer_text([(1, 2), (2, 4)]) == "1 from 2, 2 from 4"
    assert layer_text(resolve_layer_map("emd", 4, 6, kind="attention")) == "4 from each of 6"
    assert layer_text([]) == ""


def test_transport_takes_the_cheapest_way() -> None:
    costs = np.array([[0.0, 1.0, 9.0], [9.0, 1.0, 0.0]])
    flow = transport(costs, np.array([0.5, 0.5]), np.full(3, 1 / 3))
    np.testing.assert_allclose(flow, [[1 / 3, 1 / 6, 0], [0, 1 / 6, 1 / 3]], atol=1e-9)


def test_earth_mover_weighs_layers_by_how_cheap_they_are() -> None:
    mover = EarthMover([(s, t) for s in (1, 2) for t in (1, 2)])
    costs = torch.tensor([[1.0, 8.0], [8.0, 2.0]])
    first = mover(costs)
    torch.testing.assert_close(first, torch.tensor([[0.5, 0.0], [0.0, 0.5]]))
    # c = (0.5 * 1, 0.5 * 2) / 0.5 = (1, 2); sum / c = (3, 1.5); softmax(3, 1.5) = (0.8176, 0.1824), a hundredth evened.
    torch.testing.assert_close(mover.student_weights, 0.99 * torch.tensor([3.0, 1.5]).double().softmax(0) + 0.005)
    second = mover(costs)
    torch.testing.assert_close(second.sum(), torch.tensor(1.0))
    assert second[0, 0] > 0.75


def test_earth_mover_is_not_taken_over_by_a_layer_that_costs_nothing() -> None:
    """An inherited embedding layer has no cost at first: the reference then divides by it, and never looks back."""
    mover = EarthMover([(s, t) for s in (0, 1) for t in (0, 1)])
    for _ in range(5):
        flow = mover(torch.tensor([[0.0, 5.0], [5.0, 3.0]]))
    assert torch.isfinite(flow).all()
    assert flow[1, 1] > 0.004


def test_earth_mover_goes_on_from_a_checkpoint_and_stands_still_in_evaluation() -> None:
    pairs = [(s, t) for s in (1, 2) for t in (1, 2, 3)]
    costs = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 0.5]])
    one, other = EarthMover(pairs), EarthMover(pairs)
    one(costs)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(costs), other(costs), rtol=0, atol=0)
    one.eval()
    before = one.student_weights.clone()
    one(costs)
    assert torch.equal(one.student_weights, before)


def test_a_cost_that_is_not_finite_is_left_to_the_trainer_to_report() -> None:
    mover = EarthMover([(s, t) for s in (1, 2) for t in (1, 2)])
    costs = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    assert torch.isnan((mover(costs) * costs).sum())
    assert torch.isfinite(mover.student_weights).all()


def test_a_higher_temperature_keeps_the_weights_even() -> None:
    pairs = [(s, t) for s in (1, 2) for t in (1, 2)]
    costs = torch.tensor([[1.0, 8.0], [8.0, 2.0]])
    cool, warm = EarthMover(pairs), EarthMover(pairs, temperature=10.0)
    cool(costs), warm(costs)
    assert 0.5 < warm.student_weights[0] < cool.student_weights[0]
