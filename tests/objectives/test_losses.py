"""Each loss against numbers worked out apart from it, in NumPy loops, and against its published convention."""

import math

import numpy as np
import pytest
import torch

from distill.errors import ObjectiveError
from distill.objectives import attention, hidden, soft_labels
from distill.objectives.losses import LOSSES

RANDOM = np.random.default_rng(0)
S, T = RANDOM.normal(size=(3, 4)), RANDOM.normal(size=(3, 4))
SCORED = np.array([True, False, True])
HS, HT = RANDOM.normal(size=(2, 5, 8)), RANDOM.normal(size=(2, 5, 8))
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
AS, AT = RANDOM.normal(size=(2, 2, 5, 5)), RANDOM.normal(size=(2, 2, 5, 5))


def softmax(values):
    e = np.exp(values - values.max())
    return e / e.sum()


def divided(pair):
    return (pair[0] / pair[1]).item()


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_labels(temperature):
    rows = [row for row in range(3) if SCORED[row]]
    kl = ce = 0.0
    for row in rows:
        p, q = softmax(T[row] / temperature), softmax(S[row] / temperature)
        kl += temperature**2 * sum(p[c] * (math.log(p[c]) - math.log(q[c])) for c in range(4))
        ce += -sum(p[c] * math.log(q[c]) for c in range(4))
    student, teacher, scored = tensors(S, T, SCORED)
    options = {"scored": scored, "temperature": temperature}
    assert divided(soft_labels.soft_labels(student, teacher, **options)) == pytest.approx(kl / 2, abs=1e-5)
    for convention, expected in (("textbrewer", ce / 2), ("tinybert", ce / 2 / 4)):
        found = soft_labels.soft_labels(student, teacher, convention=convention, **options)
        assert divided(found) == pytest.approx(expected, abs=1e-5)


def test_a_very_hot_teacher_is_matched_in_its_logits():
    """As T grows the loss becomes the squared difference of centred logits over 2 C (Hinton et al., section 2.1)."""
    expected = sum(((S[r] - S[r].mean() - T[r] + T[r].mean()) ** 2).sum() / (2 * 4) for r in range(3)) / 3
    student, teacher = tensors(S, T)
    found = soft_labels.soft_labels(student, teacher, scored=torch.ones(3, dtype=torch.bool), temperature=200.0)
    assert divided(found) == pytest.approx(expected, rel=0.02)


def test_each_row_may_have_its_own_temperature():
    student, teacher = tensors(S, T)
    scored = torch.ones(3, dtype=torch.bool)
    apart = sum(
        soft_labels.soft_labels(student[r : r + 1], teacher[r : r + 1], scored=scored[:1], temperature=t)[0]
        for r, t in enumerate((1.0, 2.0, 3.0))
    )
    together = soft_labels.soft_labels(student, teacher, scored=scored, temperature=torch.tensor([1.0, 2.0, 3.0]))[0]
    assert together.item() == pytest.approx(apart.item(), abs=1e-6)


def test_standardised_logits_ignore_shift_and_scale():
    student, teacher = tensors(S, T)
    options = {"scored": torch.ones(3, dtype=torch.bool), "standardise": True}
    one = soft_labels.soft_labels(student, teacher, **options)[0]
    other = soft_labels.soft_labels(3.0 * student + 5.0, teacher, **options)[0]
    assert one.item() == pytest.approx(other.item(), abs=1e-5)
    assert one.item() > 0.1


def test_multilabel_and_regression():
    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    bernoulli = square = 0.0
    for row in (0, 2):
        for c in range(4):
            p, q = sigmoid(T[row, c] / 2), sigmoid(S[row, c] / 2)
            bernoulli += 4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 4
            square += (S[row, c] - T[row, c]) ** 2 / 4
    student, teacher, scored = tensors(S, T, SCORED)
    found = soft_labels.soft_labels_multilabel(student, teacher, scored=scored, temperature=2.0)
    assert divided(found) == pytest.approx(bernoulli / 2, abs=1e-5)
    assert divided(soft_labels.regression(student, teacher, scored=scored)) == pytest.approx(square / 2, abs=1e-5)


def test_hidden_states():
    mse = cosine = every = mobile = 0.0
    for b in range(2):
        for i in range(5):
            s, t = HS[b, i], HT[b, i]
            every += ((s - t) ** 2).mean()
            if MASK[b, i]:
                mse += ((s - t) ** 2).mean()
                cosine += 1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t)
                ns, nt = [(x - x.mean()) / np.sqrt(x.var() + 1e-5) for x in (s, t)]
                mobile += ((ns - nt) ** 2).mean() + 5 * ((s.mean() - t.mean()) ** 2 + abs(s.var() - t.var()))
    student, teacher, mask = tensors(HS, HT, MASK)
    assert divided(hidden.hidden_mse(student, teacher, mask=mask)) == pytest.approx(mse / 8, abs=1e-5)
    assert divided(hidden.hidden_cosine(student, teacher, mask=mask)) == pytest.approx(cosine / 8, abs=1e-5)
    assert divided(hidden.feature_map(student, teacher, mask=mask, means=5.0, variances=5.0)) == pytest.approx(
        mobile / 8, abs=1e-5
    )
    found = hidden.hidden_mse(student, teacher, mask=mask, convention="tinybert")
    assert divided(found) == pytest.approx(every / 10, abs=1e-5)
    first = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (HS[:, 0], HT[:, 0])]
    expected = ((first[0] - first[1]) ** 2).sum() / 2
    assert divided(hidden.pkd(student, teacher, mask=mask)) == pytest.approx(expected, abs=1e-5)


def kl_rows(scores_s, scores_t, valid):
    p, q = softmax(scores_t[:valid]), softmax(scores_s[:valid])
    return sum(p[j] * (math.log(p[j]) - math.log(q[j])) for j in range(valid)), -sum(
        p[j] * math.log(q[j]) for j in range(valid)
    )


def test_attention():
    mse = kl = ce = tiny = 0.0
    for b, valid in enumerate((5, 3)):
        for a in range(2):
            for i in range(5):
                tiny += ((AS[b, a, i, :valid] - AT[b, a, i, :valid]) ** 2).sum()
                if i < valid:
                    mse += ((AS[b, a, i, :valid] - AT[b, a, i, :valid]) ** 2).mean() / 2
                    one, other = kl_rows(AS[b, a, i], AT[b, a, i], valid)
                    kl, ce = kl + one / 2, ce + other / 2
    student, teacher, mask = tensors(AS, AT, MASK)
    assert divided(attention.attention_mse(student, teacher, mask=mask)) == pytest.approx(mse / 8, abs=1e-5)
    assert divided(attention.attention_kl(student, teacher, mask=mask)) == pytest.approx(kl / 8, abs=1e-5)
    assert divided(attention.attention_ce(student, teacher, mask=mask)) == pytest.approx(ce / 8, abs=1e-5)
    found = attention.attention_mse(student, teacher, mask=mask, convention="tinybert")
    assert divided(found) == pytest.approx(tiny / (2 * 2 * 5 * 5), abs=1e-5)


@pytest.mark.parametrize("width", [8, 12])
def test_relations_of_any_width(width):
    wide = RANDOM.normal(size=(2, 5, width))
    ours = paddle = 0.0
    for b, valid in enumerate((5, 3)):
        for r in range(4):
            s, t = [x[b][:, r * x.shape[-1] // 4 : (r + 1) * x.shape[-1] // 4] for x in (HS, wide)]
            scores = [x @ x.T / math.sqrt(x.shape[-1]) for x in (s, t)]
            for i in range(5):
                each, _ = kl_rows(scores[0][i], scores[1][i], valid)
                paddle += each / 4
                ours += each / 4 if i < valid else 0.0
    student, teacher, mask = tensors(HS, wide, MASK)
    found = attention.relation(student, teacher, mask=mask, relation_heads=4)
    assert divided(found) == pytest.approx(ours / 8, abs=1e-5)
    found = attention.relation(student, teacher, mask=mask, relation_heads=4, convention="paddle")
    assert divided(found) == pytest.approx(paddle / 10, abs=1e-5)


@pytest.mark.parametrize(("student", "teacher", "heads"), [(384, 768, 48), (312, 768, 24), (384, 384, 48), (8, 12, 1)])
def test_relation_heads_that_both_widths_share(student, teacher, heads):
    assert attention.shared_heads(student, teacher) == heads


def test_published_conventions_that_count_padding_do_so():
    """The reason why they are not the default."""
    student, teacher, mask = tensors(HS, HT, MASK)
    garbage = student.clone()
    garbage[1, 4] = 100.0
    for convention, moves in (("distill", False), ("tinybert", True)):
        one, other = [hidden.hidden_mse(x, teacher, mask=mask, convention=convention)[0] for x in (student, garbage)]
        assert bool(one != other) is moves


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_labels.soft_labels(torch.ones(2, 3), torch.ones(2, 1), scored=torch.ones(2, dtype=torch.bool)),
         r"shape \(2, 3\), the teacher's \(2, 1\)"),
        (lambda: soft_labels.soft_labels(
            torch.ones(1, 3), torch.ones(1, 3), scored=torch.ones(1, dtype=torch.bool), temperature=-1.0),
         r"temperature must be above 0; got -1"),
        (lambda: attention.attention_kl(torch.ones(1, 2, 3, 3), torch.ones(1, 4, 3, 3), mask=torch.ones(1, 3)),
         r"the student has 2 heads, the teacher 4"),
        (lambda: attention.relation(torch.ones(1, 3, 8), torch.ones(1, 3, 8), mask=torch.ones(1, 3), relation_heads=3),
         r"3 relation heads do not divide a width of 8. Set relation_heads to one of 1, 2, 4, 8"),
    ],
)  # fmt: skip
def test_what_would_train_and_be_wrong_is_refused(call, message):
    """Broadcasting shapes and negative temperatures train happily towards nonsense."""
    with pytest.raises(ObjectiveError, match=message):
        call()


def test_every_listed_loss_is_documented():
    from pathlib import Path

    text = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    missing = [name for name in LOSSES if f"`{name}`" not in text]
    missing += [
        f"{name}.{option}" for name, loss in LOSSES.items() for option in loss.options if f"`{option}`" not in text
    ]
    assert missing == []


@pytest.mark.parametrize("convention", ["distill", "tinybert"])
def test_hidden_mse_has_the_value_and_gradient_of_its_formula(convention):
    """Its way back is written by hand."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    total, count = hidden.hidden_mse(student, teacher, mask=mask, convention=convention)
    (total / count).backward()
    given, student.grad = student.grad, None
    weights = mask if convention == "distill" else torch.ones_like(mask)
    plain = ((student - teacher).square().mean(-1) * weights).sum() / weights.sum()
    plain.backward()
    torch.testing.assert_close(total / count, plain)
    torch.testing.assert_close(given, student.grad)
    assert count == weights.sum()


def test_what_causal_models_never_look_at_counts_nothing():
    """Scores of keys behind a query may be anything; those before it count as if they were all there is."""
    student, teacher, mask = tensors(AS, AT, MASK)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for loss in (attention.attention_mse, attention.attention_kl, attention.attention_ce):
        found = loss(student, teacher, mask=mask, causal=True)
        other = loss(student.masked_fill(later, 3.0), teacher.masked_fill(later, -2.0), mask=mask, causal=True)
        torch.testing.assert_close(found, other)
    whole = attention.attention_kl(student[:, :, :1, :1], teacher[:, :, :1, :1], mask=mask[:, :1])
    assert float(whole[0]) == 0.0  # a first token has itself alone
    by_hand = sum(
        kl_rows(AS[b, a, i], AT[b, a, i], i + 1)[0] / 2
        for b, valid in enumerate((5, 3))
        for a in range(2)
        for i in range(valid)
    )
    assert divided(attention.attention_kl(student, teacher, mask=mask, causal=True)) == pytest.approx(
        by_hand / 8, abs=1e-5
    )
