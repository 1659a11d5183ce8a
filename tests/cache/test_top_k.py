"""The likeliest classes alone: what KL loses by it, to the last digit, and what comes back from a cache."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distill.cache.cached_teacher import build_cache
from distill.cache.storage import measure_need
from distill.cache.top_k import IDS, LEAST, TOP, TopKTeacher, keep_top, reduce_both
from distill.errors import ObjectiveError, TeacherError
from distill.features import describe
from distill.ledger import Ledger
from distill.objectives import build_objective
from distill.objectives.generation import reverse_kl
from distill.objectives.objective import check_top_k
from distill.objectives.soft_labels import soft_labels
from distill.progress import SILENT
from distill.recipe import Recipe, TermRecipe
from distill.run import Run
from distill.teacher import Checkpoint, LiveTeacher

CLASSES = 300


@pytest.fixture
def logits():
    """(4, 7, 300) of a student and a teacher, and which rows count."""
    torch.manual_seed(3)
    teacher = 3 * torch.randn(4, 7, CLASSES, dtype=torch.float64)
    student = teacher + torch.randn(4, 7, CLASSES, dtype=torch.float64)
    return student, teacher, torch.rand(4, 7) > 0.3


def divergence(p, q):
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("k", [1, 5, 64, 299])
def test_the_loss_is_the_full_kl_less_what_is_said_of_the_rest(logits, k):
    student, teacher, scored = logits
    reduced, top = reduce_both(student, keep_top(teacher, k), scored)
    found, count = soft_labels(reduced, top, scored=scored, temperature=1.0)
    p, q = teacher[scored].softmax(-1), student[scored].softmax(-1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(k).indices, True)
    p_rest, q_rest = p.masked_fill(kept, 0), q.masked_fill(kept, 0)
    share = p_rest.sum(-1, keepdim=True)
    inside = p_rest / share * ((p_rest / share).clamp(min=1e-300).log() - (q_rest / q_rest.sum(-1, keepdim=True))
                               .clamp(min=1e-300).log())  # fmt: skip
    lost = (share.squeeze(-1) * inside.sum(-1)).sum()
    full = divergence(p, q).sum()
    assert float(found) == pytest.approx(float(full - lost), rel=1e-5)
    assert lost > 1e-9 or k == 299
    assert count == scored.sum()


@pytest.mark.parametrize("k", [CLASSES, 2 * CLASSES])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("loss", [soft_labels, reverse_kl])
def test_all_classes_kept_is_the_full_loss_with_its_gradient(logits, k, temperature, loss):
    student, teacher, scored = logits
    values, slopes = [], []
    for reduced in (False, True):
        mine = student.clone().requires_grad_(True)
        pair = reduce_both(mine, keep_top(teacher, k), scored) if reduced else (mine, teacher)
        total, _ = loss(*pair, scored=scored, temperature=temperature)
        total.backward()
        values.append(total.item())
        slopes.append(mine.grad)
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-6)


def test_more_classes_never_lose_more(logits):
    student, teacher, scored = logits
    found = [
        float(soft_labels(*reduce_both(student, keep_top(teacher, k), scored), scored=scored, temperature=1.0)[0])
        for k in (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)
    ]
    assert found == sorted(found)
    assert found[0] > 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_like_its_teacher_has_no_loss(logits, temperature):
    _, teacher, scored = logits
    total, _ = soft_labels(
        *reduce_both(teacher, keep_top(teacher, 9), scored), scored=scored, temperature=temperature
    )  # fmt: skip
    assert float(total) == pytest.approx(0, abs=1e-5)


def test_the_gradient_is_finite_where_classes_are_ruled_out(logits):
    """Of -inf logits a softmax has no share: neither among the kept nor as the whole rest."""
    student, teacher, scored = logits
    teacher[..., 5:] = -torch.inf
    mine = student.clone()
    mine[..., 5:] = -torch.inf
    for k in (3, 5, 20):
        leaf = mine.clone().requires_grad_(True)
        total, _ = soft_labels(*reduce_both(leaf, keep_top(teacher, k), scored), scored=scored, temperature=1.0)
        total.backward()
        assert total.isfinite()
        assert leaf.grad.isfinite().all()


def test_many_rows_are_worked_on_in_parts(logits, monkeypatch):
    _, teacher, _ = logits
    whole = keep_top(teacher, 4)
    monkeypatch.setattr("distill.cache.top_k._AT_ONCE", 1000)
    parts = keep_top(teacher, 4)
    assert torch.equal(whole[IDS], parts[IDS])
    assert torch.equal(whole[TOP], parts[TOP])


def test_another_vocabulary_is_refused(logits):
    student, teacher, scored = logits
    with pytest.raises(ObjectiveError, match=r"the teacher kept the answer 29\d, the student has 100 classes"):
        reduce_both(student[..., :100], keep_top(teacher, CLASSES), scored)


# In the cache


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=70_000, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()


@pytest.fixture(scope="module")
def rows():
    random = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(70_000, (4 + row % 9,), generator=random).numpy(),
            "length": 4 + row % 9,
            "example": row,
        }
        for row in range(20)
    ]


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row["input_ids"])] = torch.from_numpy(row["input_ids"])
        mask[number, : len(row["input_ids"])] = 1
    example = torch.tensor([row["example"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "scored": mask.bool(), "example": example}


def test_a_cache_gives_back_what_was_kept(model, rows, tmp_path):
    live = TopKTeacher(LiveTeacher(model, ["logits", "hidden.1"]), 16)
    cached = build_cache(live, rows, collate, tmp_path / "cache", key="a")
    assert cached.taps == live.taps == {IDS, TOP, "hidden.1"}
    batch = collate([rows[7], rows[2], rows[19]])
    mask = batch["scored"]
    there, here = cached.features(batch), live.features(batch)
    assert there[IDS].dtype == torch.int64
    assert torch.equal(there[IDS][mask], here[IDS][mask])
    assert int(there[IDS].max()) >= 1 << 16  # more than two bytes hold
    torch.testing.assert_close(there[TOP][mask], here[TOP][mask], rtol=2**-11, atol=1e-6)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert cached.nbytes < tokens * (16 * 6 + 2 + 16 * 2) + 2000  # all logits would be 280,000 bytes a token


def test_numbers_of_many_classes_are_counted_at_four_bytes(model, rows, tmp_path):
    live = LiveTeacher(model, ["logits"])
    need = measure_need(live, rows, collate, 16)
    cached = build_cache(TopKTeacher(live, 16), rows, collate, tmp_path / "cache", key="a")
    assert need.logits <= cached.nbytes <= need.logits + 600  # its header and the lengths


def test_a_step_on_the_kept_classes_moves_as_one_on_all(model, rows, tmp_path):
    objective = build_objective([TermRecipe(loss="soft_labels", temperature=1.0)], *(describe_of(model),) * 2)
    live = LiveTeacher(model, objective.teacher_taps)
    batch = collate(rows[:8])
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    torch.manual_seed(5)
    student = {"logits": (live.features(batch)["logits"] + torch.randn(8, 11, 70_000)).requires_grad_(True)}
    slopes = []
    for teacher in (live, build_cache(TopKTeacher(live, 70_000), rows, collate, tmp_path / "all", key="a")):
        total, _ = objective(student, teacher.features(batch), batch)["soft_labels"]
        slopes.append(torch.autograd.grad(total, student["logits"])[0])
    assert slopes[0].abs().max() > 1e-5
    torch.testing.assert_close(slopes[1], slopes[0], rtol=0.02, atol=1e-6)  # 11 bits of a logarithm near -11


def describe_of(model):
    from distill.features import describe

    return describe(model)


@pytest.mark.parametrize(
    ("term", "named"),
    [
        ({"loss": "soft_labels", "options": {"shift": True}}, "soft_labels"),
        ({"loss": "soft_labels", "options": {"convention": "tinybert"}}, "soft_labels"),
        ({"loss": "soft_labels", "options": {"dynamic": "flsw"}}, "soft_labels"),
        ({"loss": "dist"}, "dist"),
    ],
)
def test_what_needs_all_logits_is_refused(model, term, named):
    objective = build_objective([TermRecipe(**term)], *(describe_of(model),) * 2)
    with pytest.raises(ObjectiveError, match=rf"{named} needs all logits.*Set cache.top_k = 0"):
        check_top_k(objective.plans)
    check_top_k(build_objective([TermRecipe(loss="hard_labels")], *(describe_of(model),) * 2).plans)


def test_an_answer_that_is_not_finite_is_named(model, rows, tmp_path):
    class Broken(LiveTeacher):
        def features(self, batch):
            features = super().features(batch)
            features["logits"][batch["example"] == 7] = torch.nan
            return features

    with pytest.raises(TeacherError, match=r"its logits.top are not finite \(NaN or infinite\) for row 8"):
        build_cache(TopKTeacher(Broken(model, ["logits"]), 4), rows, collate, tmp_path / "cache", key="a")


def test_nothing_is_left_out_of_what_was_least(logits):
    _, teacher, _ = logits
    kept = keep_top(teacher, CLASSES)[TOP]
    assert (kept[..., -1] == LEAST).all()
    torch.testing.assert_close(kept[..., :-1].exp().sum(-1), torch.ones(4, 7), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("vocabulary", "wanted", "loss", "kept"),
    [
        (5000, "auto", "soft_labels", 64),
        (5000, "auto", "jsd", 64),
        (5000, "auto", "dist", 0),  # needs every logit
        (5000, 0, "soft_labels", 0),
        (5000, 7, "soft_labels", 7),
        (4000, "auto", "soft_labels", 0),
    ],
)
def test_a_large_vocabulary_is_cut_where_the_objective_can_read_it(tmp_path, vocabulary, wanted, loss, kept):
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes))
    recipe = Recipe.parse(
        {
            "task": "causal-lm",
            "teacher": {"checkpoint": "somewhere"},
            "data": {"train": "rows.txt"},
            "cache": {"top_k": wanted},
        }
    )
    run = Run(recipe, Ledger(tmp_path), SILENT)
    run.teacher = Checkpoint(model, None, [], "somewhere")
    shape = describe(model)
    assert run.top_k(build_objective([TermRecipe(loss=loss)], shape, shape)) == kept
