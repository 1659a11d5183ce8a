"""Batches that the student writes itself: what is drawn, what is scored, and that an interruption changes nothing."""

import copy

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distill.checks import check_columns
from distill.errors import RecipeError
from distill.features import describe
from distill.objectives import build_objective
from distill.recipe import OnPolicyRecipe, Recipe, TermRecipe, TrainingRecipe
from distill.tasks import TASKS, Padding
from distill.tasks.encoded import pack
from distill.teacher import LiveTeacher
from distill.training.fit import fit, tensor_collate
from distill.training.on_policy import OnPolicy

TASK = TASKS["causal-lm"]


def model(layers, seed, vocabulary=40):
    torch.manual_seed(seed)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": layers, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes))


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    ids = [random.integers(1, 40, length).tolist() for length in (12, 20, 9, 17, 8, 14, 11, 16)]
    labels = [[*row[1:], -100] for row in ids]
    return pack({"input_ids": ids, "labels": labels}, {})


@pytest.fixture(scope="module")
def batch(rows):
    return tensor_collate(TASK, Padding())([rows[row] for row in range(4)])


def writer(ends=(), **settings):
    return OnPolicy(OnPolicyRecipe(**{"share": 1.0, **settings}), ends=ends, padding=0, seed=5)


def test_the_beginning_stays_and_the_rest_is_scored(batch):
    student = model(1, 0)
    new = writer(prompt=0.5)(student, batch, 3, 0, 0)
    assert torch.equal(new["input_ids"][:, :4], batch["input_ids"][:, :4])  # half of the shortest row of 9
    assert not torch.equal(new["input_ids"][:, 4:9], batch["input_ids"][:, 4:9])
    assert new["attention_mask"].all()
    assert new["scored"].sum(1).tolist() == [16] * 4  # 20 tokens, 16 of them drawn
    assert new["scored"][:, 3:-1].all()
    assert (new["labels"] == -100).all()
    assert student.training


def test_the_same_place_draws_the_same_and_another_does_not(batch):
    student = model(1, 0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, again, later = (writer()(student, batch, step, 0, 0)["input_ids"] for step in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, later)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cold_student_writes_what_it_finds_most_probable(batch):
    student = model(1, 0).eval()
    new = writer(temperature=1e-4, prompt=1.0)(student, batch, 0, 0, 0)["input_ids"]
    prompt = batch["input_ids"][:, :9]
    known = {"do_sample": False, "max_new_tokens": 11, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(new, student.generate(prompt, attention_mask=torch.ones_like(prompt), **known))


def test_draws_follow_the_students_distribution():
    student = model(1, 0, vocabulary=4).eval()
    ids = torch.full((4000, 2), 3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "scored": ids > 0}
    with torch.no_grad():
        wanted = (student(ids[:1, :1]).logits[0, 0] / 0.1).softmax(-1)
    drawn = writer(temperature=0.1, prompt=0.0)(student, batch, 0, 0, 0)["input_ids"][:, 1]
    found = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.0)


def test_nothing_is_scored_behind_an_end(batch):
    ends = list(range(1, 20))  # half of all tokens: every row soon meets one
    new = writer(ends=ends)(model(1, 0), batch, 0, 0, 0)
    for ids, mask, scored in zip(new["input_ids"], new["attention_mask"], new["scored"], strict=True):
        drawn = ids[2:].tolist()
        last = 2 + next(place for place, one in enumerate(drawn) if one in ends)
        assert mask.tolist() == [1] * (last + 1) + [0] * (len(ids) - last - 1)
        assert scored.nonzero().flatten().tolist() == list(range(1, last))
        assert not ids[last + 1 :].any()


def test_share_is_the_share_of_batches(batch):
    student = model(1, 0)
    written = [bool((writer(share=0.3)(student, batch, step, 0, 0)["labels"] == -100).all()) for step in range(200)]
    assert 0.2 < np.mean(written) < 0.4


class InterruptedRunError(Exception):
    pass


def trained(folder, rows, interrupt):
    """The student's weights after 4 epochs; cut off in the third and begun again where `interrupt`."""
    teacher = model(2, 1).eval()

    def go(measure):
        student = model(1, 2)
        objective = build_objective([TermRecipe(loss="jsd")], describe(student), describe(teacher))
        settings = TrainingRecipe(epochs=4, batch_size=2, learning_rate=1e-2, checkpoint_seconds=1e-6, precision="fp32")
        live = LiveTeacher(teacher, objective.teacher_taps)
        policy = writer(share=0.5)
        said = {"save": lambda _: None, "logs": folder / "logs", "on_policy": policy}
        fit(student, objective, live, rows, TASK, Padding(), settings, folder, measure, **said)
        return copy.deepcopy(student.state_dict())

    measured = []

    def cut_off(_):
        measured.append(1)
        if len(measured) == 3:
            raise InterruptedRunError
        return {"likelihood": 0.5}

    if interrupt:
        with pytest.raises(InterruptedRunError):
            go(cut_off)
        assert list(folder.glob("checkpoint-*"))
    return go(lambda _: {"likelihood": 0.5})


def test_an_interruption_changes_no_bit(tmp_path, rows):
    whole = trained(tmp_path / "whole", rows, interrupt=False)
    again = trained(tmp_path / "again", rows, interrupt=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_tasks_that_write_nothing_refuse_it():
    recipe = Recipe.parse(
        {
            "teacher": {"checkpoint": "somewhere"},
            "data": {"train": "rows.csv"},
            "objective": {"on_policy": {"share": 0.5}},
        }
    )
    with pytest.raises(RecipeError, match=r"`objective.on_policy.share` must be 0 for text-classification.* got 0.5"):
        check_columns(TASKS["text-classification"], recipe)
