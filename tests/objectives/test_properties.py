"""What holds for every listed loss at once. A new loss enters by being listed."""

import pytest
import torch

from distill.objectives.base import count_units
from distill.objectives.losses import LOSSES

B, L, H, A, C = 4, 7, 16, 4, 5
LENGTHS = torch.tensor([7, 3, 5, 1])
SHAPES = {"logits": (B, C), "scores": (B, A, L, L)}
TOKEN_AXES = {"logits": (), "scores": (2, 3)}
ENTROPY = {"attention_ce"}
"""Cross-entropies: least at equality, where they are the teacher's entropy and not 0."""


@pytest.fixture(params=sorted(LOSSES))
def loss(request):
    return LOSSES[request.param]


REAL = {"regression_labels": torch.randn(B), "multilabel_labels": torch.randint(0, 2, (B, C)).float()}
"""Labels of the losses that read real-valued ones."""
SHAPES_BY_NAME = {"regression_labels": (B, 1), "soft_spans": (B, L, 2), "span_labels": (B, L, 2)}
SPANS = ("soft_spans", "span_labels")
SHAPES_BY_NAME |= {name: (B, 2 * H) for name, loss in LOSSES.items() if loss.paired}


def a_batch(loss=None):
    mask = (torch.arange(L) < LENGTHS[:, None]).long()
    labels = torch.tensor([2, -100, 0, 4])
    if loss is not None and loss.name in REAL:
        labels = REAL[loss.name].clone()
        labels[1] = torch.nan
    scored = torch.tensor([True, True, False, True])
    if labels.dim() > 1:
        scored[:] = True  # a unit of several labels a row knows of no row that is not scored
    batch = {"attention_mask": mask, "scored": scored, "labels": labels}
    if loss is not None and loss.name in SPANS:
        inside = mask.bool()
        inside[0, 1:3] = False  # the question
        spans = {"labels": torch.tensor([[3, 5], [-100, -100], [1, 2], [0, 0]]), "inside": inside}
        batch |= {**spans, "scored": scored[:, None].expand(-1, 2)}
    return batch


def features(loss, seed, dtype=torch.float64):
    """What one side gives; both layers of a loss on two stand in one tensor, (B, 2, L, H)."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES_BY_NAME.get(loss.name) or SHAPES.get(
        loss.feature or "logits", (B, L, H) if loss.layers_per_item == 1 else (B, 2, L, H)
    )
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def compute(loss, student, teacher, batch):
    named = {"mask": "attention_mask"}
    inputs = {name: batch[named.get(name, name)] for name in loss.inputs}
    if loss.layers_per_item == 2:
        student, teacher = student.unbind(1), teacher.unbind(1)
    return loss.function(student, teacher, **inputs)


def needs_teacher(loss):
    if not loss.feature:
        pytest.skip("reads no teacher")


def test_zero_with_zero_gradient_where_student_is_teacher(loss):
    needs_teacher(loss)
    student = features(loss, 0).requires_grad_()
    total, _ = compute(loss, student, features(loss, 0), a_batch(loss))
    total.backward()
    if loss.name not in ENTROPY:
        assert total.item() == pytest.approx(0.0, abs=1e-5)
    assert student.grad.abs().max() < 1e-5


def test_positive_and_pulling_towards_the_teacher_elsewhere(loss):
    """A step against the gradient brings the loss down: a wrong sign or a swapped pair would not."""
    student, teacher = features(loss, 1).requires_grad_(), features(loss, 2)
    total, _ = compute(loss, student, teacher, a_batch(loss))
    total.backward()
    assert total.item() > 0
    less, _ = compute(loss, student.detach() - 0.01 * student.grad / student.grad.norm(), teacher, a_batch(loss))
    assert less < total


def test_no_gradient_reaches_the_teacher(loss):
    needs_teacher(loss)
    teacher = features(loss, 2).requires_grad_()
    total, _ = compute(loss, features(loss, 1).requires_grad_(), teacher, a_batch(loss))
    total.backward()
    assert teacher.grad is None or not teacher.grad.any()


def padded(values, loss, more):
    """The same rows with `more` positions of garbage behind each."""
    axes = (1,) if loss.name in SPANS else TOKEN_AXES.get(loss.feature or "logits", (loss.layers_per_item,))
    sizes = [size + more if axis in axes else size for axis, size in enumerate(values.shape)]
    wide = 50.0 * torch.randn(sizes, generator=torch.Generator().manual_seed(9), dtype=values.dtype)
    wide[tuple(slice(size) for size in values.shape)] = values
    return wide


@pytest.mark.parametrize("more", [1, 6])
def test_padding_changes_neither_value_nor_gradient(loss, more):
    batch, student, teacher = a_batch(loss), features(loss, 1), features(loss, 2)
    tokens = {name: batch[name] for name in ("attention_mask", "inside") if name in batch}
    wide = batch | {name: torch.nn.functional.pad(value, (0, more)) for name, value in tokens.items()}
    short, long = student.clone().requires_grad_(), padded(student, loss, more).requires_grad_()
    one, one_count = compute(loss, short, teacher, batch)
    other, other_count = compute(loss, long, padded(teacher, loss, more), wide)
    one.backward()
    other.backward()
    assert one_count == other_count
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    inner = long.grad[tuple(slice(size) for size in short.shape)]
    torch.testing.assert_close(inner, short.grad, rtol=1e-4, atol=1e-6)
    assert long.grad.abs().sum() == pytest.approx(short.grad.abs().sum().item(), rel=1e-4)


@pytest.mark.parametrize("split", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_splitting_the_batch_changes_no_gradient(loss, split):
    if loss.in_batch:
        pytest.skip("compares the rows of a batch with each other")
    batch, teacher = a_batch(loss), features(loss, 2)
    whole, parts = features(loss, 1).requires_grad_(), features(loss, 1).requires_grad_()
    total, count = compute(loss, whole, teacher, batch)
    (total / count).backward()
    counts, begin = torch.zeros(()), 0
    for size in split:
        rows = slice(begin, begin + size)
        piece = {name: value[rows] for name, value in batch.items()}
        part, counted = compute(loss, parts[rows], teacher[rows], piece)
        (part / count).backward()
        counts, begin = counts + counted, begin + size
    assert counts == count
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-7)


def test_the_count_is_known_from_the_batch_alone(loss):
    batch = a_batch(loss)
    _, count = compute(loss, features(loss, 1), features(loss, 2), batch)
    assert count == count_units(batch)[loss.unit]
    assert count.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_finite_fp32(loss, dtype):
    student = (30 * features(loss, 1, dtype)).requires_grad_()
    total, count = compute(loss, student, 30 * features(loss, 2, dtype), a_batch(loss))
    total.backward()
    assert total.dtype == count.dtype == torch.float32
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()


IN_BATCH = [name for name, loss in LOSSES.items() if loss.in_batch]


@pytest.mark.parametrize("name", IN_BATCH)
def test_what_compares_rows_says_so(name):
    """Marked `in_batch`, a loss is excused from the test above: only those that need it may be."""
    loss, batch = LOSSES[name], a_batch()
    student, teacher = features(loss, 1), features(loss, 2)
    whole, _ = compute(loss, student, teacher, batch)
    alone = sum(
        compute(loss, student[row : row + 1], teacher[row : row + 1], {k: v[row : row + 1] for k, v in batch.items()})[
            0
        ]
        for row in range(B)
    )
    assert not torch.isclose(whole, alone, rtol=1e-3)


@pytest.mark.parametrize("name", IN_BATCH)
@pytest.mark.parametrize("rows", [[0], [0, 0], [2]], ids=["one row", "one row twice", "an unscored row"])
def test_rows_that_give_nothing_to_compare_are_finite(name, rows):
    """Distances of 0 have roots of infinite slope, and a class of one row has no deviation."""
    loss = LOSSES[name]
    batch = {key: value[rows] for key, value in a_batch().items()}
    student, teacher = features(loss, 1)[rows].requires_grad_(), features(loss, 2)[rows]
    total, count = compute(loss, student, teacher, batch)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 10.0
    assert count == count_units(batch)[loss.unit]


@pytest.mark.parametrize("name", ["soft_labels", "soft_labels_multilabel", "reverse_kl"])
def test_temperature_squared_keeps_the_size_of_gradients(name):
    """At large T the gradient no longer depends on T; without the factor it would fall as 1 / T^2."""
    norms = []
    for temperature in (50.0, 100.0):
        student = features(LOSSES[name], 1).requires_grad_()
        total, _ = LOSSES[name].function(
            student, features(LOSSES[name], 2), scored=torch.ones(B, dtype=torch.bool), temperature=temperature
        )
        total.backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
