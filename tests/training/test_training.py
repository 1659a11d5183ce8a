"""The step divides once: gradients through the real Trainer do not depend on how rows are split into batches."""

import shutil

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from distill.cache import build_cache
from distill.errors import TrainingError
from distill.features import describe
from distill.files import write_json
from distill.objectives import build_objective
from distill.recipe import TermRecipe
from distill.tasks import TASKS, Padding
from distill.tasks.encoded import pack
from distill.teacher import LiveTeacher
from distill.training.failure import Failure
from distill.training.fit import DistillationModule, DistillationTrainer, tensor_collate
from distill.training.rhythm import COMPLETE, latest_checkpoint

TASK = TASKS["text-classification"]
TERMS = [
    TermRecipe(loss="soft_labels", temperature=2.0),
    TermRecipe(loss="hard_labels", weight=0.5),
    TermRecipe(loss="hidden_mse", weight=2.0),
]


def model(layers, width=16, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def rows():
    """Eight rows of 3 to 20 tokens; three of them have no label."""
    random = np.random.default_rng(0)
    ids = [random.integers(5, 60, length).tolist() for length in (3, 20, 5, 17, 8, 4, 11, 14)]
    return pack({"input_ids": ids}, {"labels": np.array([0, 1, -100, 2, -100, 1, 0, -100])})


def trained_one_step(tmp_path, rows, batch_size, *, width=16, student=None):
    """The parameters after one step of plain SGD at rate 1: what is missing from the start is the gradient."""
    teacher, student = model(4, seed=1), student or model(2, width, seed=2)
    torch.manual_seed(3)
    objective = build_objective(TERMS, describe(student), describe(teacher))
    args = TrainingArguments(
        output_dir=str(tmp_path / str(batch_size)),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    live = LiveTeacher(teacher, objective.teacher_taps)
    trainer = DistillationTrainer(student, objective, live, rows, tensor_collate(TASK, Padding()), args)
    trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}, teacher


@pytest.mark.parametrize("width", [16, 8])
def test_accumulation_and_padding_change_no_gradient(tmp_path, rows, width):
    whole, _ = trained_one_step(tmp_path, rows, 8, width=width)
    for batch_size in (1, 2, 4):
        split, _ = trained_one_step(tmp_path, rows, batch_size, width=width)
        for name, value in whole.items():
            torch.testing.assert_close(
                split[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_the_step_moves_the_student_and_never_the_teacher(tmp_path, rows):
    after, teacher = trained_one_step(tmp_path, rows, 8)
    before = {f"student.{name}": value for name, value in model(2, seed=2).named_parameters()}
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert len(moved) > 30
    for name, value in model(4, seed=1).named_parameters():
        assert torch.equal(dict(teacher.named_parameters())[name], value)


def test_projections_are_trained_and_do_not_ship(rows):
    teacher, student = model(4, seed=1), model(2, 8, seed=2)
    objective = build_objective(TERMS, describe(student), describe(teacher))
    module = DistillationModule(student, objective)
    trained = {name for name, _ in module.named_parameters()}
    assert any(name.startswith("objective.") for name in trained)
    assert not any("objective" in name for name in student.state_dict())


def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path, rows):
    student = model(2, seed=2)
    with torch.no_grad():
        student.classifier.bias[0] = float("inf")
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 0 .*Lower training.learning_rate"):
        trained_one_step(tmp_path, rows, 8, student=student)


def test_only_complete_checkpoints_are_resumed_from(tmp_path):
    for step, complete in ((2, True), (10, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            write_json(tmp_path / f"checkpoint-{step}" / COMPLETE, {"step": step})
    assert latest_checkpoint(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()
    assert latest_checkpoint(tmp_path / "none") is None


def test_logged_terms_add_up_to_the_loss_after_a_resume(tmp_path, rows):
    """The terms' sums begin anew with a resume, and so must the steps that they are divided by."""
    teacher = model(4, seed=1)

    def run(resume):
        student = model(2, seed=2)
        objective = build_objective(TERMS, describe(student), describe(teacher))
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, logging_steps=2, use_cpu=True,
            report_to=[], disable_tqdm=True, remove_unused_columns=False, save_steps=3,
        )  # fmt: skip
        live = LiveTeacher(teacher, objective.teacher_taps)
        trainer = DistillationTrainer(student, objective, live, rows, tensor_collate(TASK, Padding()), args)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.log_history

    run(None)
    line = next(line for line in run(str(tmp_path / "checkpoint-3")) if line["step"] == 4 and "loss" in line)
    terms = {name: line[name] for name in line if name.startswith("loss/")}
    weights = dict(zip(sorted(terms), (0.5, 2.0, 1.0), strict=True))  # hard_labels, hidden_mse, soft_labels
    assert sum(weights[name] * value for name, value in terms.items()) == pytest.approx(line["loss"], rel=1e-4)


def test_batches_by_tokens_are_resumed_exactly(tmp_path, rows):
    """In the middle of an epoch: the weights are those of the undisturbed run, bit for bit."""
    teacher = model(4, seed=1)

    def run(name, steps, resume=None):
        student = model(2, seed=2)
        objective = build_objective(TERMS, describe(student), describe(teacher))
        args = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=steps, use_cpu=True, report_to=[], disable_tqdm=True,
            remove_unused_columns=False, save_steps=5, learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        live = LiveTeacher(teacher, objective.teacher_taps)
        collate = tensor_collate(TASK, Padding())
        trainer = DistillationTrainer(student, objective, live, rows, collate, args, batch_tokens=40)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.epoch, student.state_dict()

    epochs, whole = run("whole", 9)
    assert epochs == pytest.approx(9 / 3)  # rows of 3, 4, 5, 8 | 11, 14 | 17, 20 tokens, whatever the batch size says
    _, again = run("again", 9, str(tmp_path / "whole" / "checkpoint-5"))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_cache_that_is_read_before_the_batch_moves_trains_the_same_weights(tmp_path, rows):
    """As on a card: what the teacher said comes with the batch, and a bad loss is found before anything is saved."""
    teacher = model(4, seed=1)
    collate = tensor_collate(TASK, Padding())

    def run(ahead, spoilt=False):
        student = model(2, seed=2)
        objective = build_objective(TERMS, describe(student), describe(teacher))
        live = LiveTeacher(teacher, objective.teacher_taps)
        cache = build_cache(live, rows, collate, tmp_path / "cache", key="k")
        args = TrainingArguments(
            output_dir=str(tmp_path / f"{ahead}"), max_steps=4, per_device_train_batch_size=4, use_cpu=True,
            report_to=[], disable_tqdm=True, remove_unused_columns=False, save_steps=4, logging_steps=3,
        )  # fmt: skip
        trainer = DistillationTrainer(student, objective, cache, rows, collate, args)
        trainer._reads_ahead, trainer._failure = ahead, Failure(late=ahead)
        if spoilt:
            with torch.no_grad():
                student.classifier.bias[0] = float("inf")
        trainer.train()
        return student.state_dict()

    plain, ahead = run(False), run(True)
    assert all(torch.equal(ahead[name], value) for name, value in plain.items())
    shutil.rmtree(tmp_path / "True")
    with pytest.raises(TrainingError, match="the loss is not finite at step 0"):
        run(True, spoilt=True)
    assert not list((tmp_path / "True").glob("checkpoint-*"))
