"""A regression learns the same of numbers in any unit, and is saved in the unit of its data."""

import copy

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from distill.evaluation import TorchPredictor
from distill.features import describe
from distill.objectives import build_objective
from distill.recipe import TermRecipe, TrainingRecipe
from distill.tasks import TASKS, Padding
from distill.tasks.encoded import pack
from distill.teacher import LiveTeacher
from distill.training.fit import fit
from distill.training.target_unit import TargetUnit

TASK = TASKS["regression"]
SIZES = {"vocab_size": 60, "num_labels": 1, "problem_type": "regression", "pad_token_id": 0}


def make_model(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"max_position_embeddings": 32, "initializer_range": 0.2, "hidden_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**SIZES, **sizes)).eval()


def make_rows(scale=1.0, middle=0.0):
    """32 rows whose number is how often token 7 stands in them; every fourth has none."""
    random = np.random.default_rng(0)
    ids = [random.choice([7, 8, 9, 10], 8).tolist() for _ in range(32)]
    labels = np.array([scale * row.count(7) + middle for row in ids], np.float32)
    labels[::4] = np.nan
    return pack({"input_ids": ids}, {"labels": labels})


def said(model, rows):
    batch = TASK.collate([rows[row] for row in range(len(rows))], Padding())
    return TorchPredictor(model, TASK).predict(batch)["value"]


def in_unit(model, scale, middle):
    """The same model in another unit."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight.mul_(scale)
        other.classifier.bias.mul_(scale).add_(middle)
    return other


def trained(folder, model, rows, teacher):
    """What a model says after 45 steps, as it is saved."""
    terms = [TermRecipe(loss="regression_labels"), *([TermRecipe(loss="regression")] if teacher else [])]
    objective = build_objective(terms, describe(model), describe(model))
    unit = TargetUnit.of(TASK, rows, model)
    live = LiveTeacher(teacher, objective.teacher_taps) if teacher else None
    settings = TrainingRecipe(epochs=15, batch_size=11, learning_rate=1e-2, precision="fp32")
    measured = []

    def measure(model):
        encoded = unit.standard(rows)
        measured.append(TASK.metrics({"value": said(model, rows)}, encoded)["spearman"])
        return {"spearman": measured[-1]}

    def save(path):
        with unit.original():
            model.save_pretrained(path)

    with unit.learnt():
        fit(
            model,
            objective,
            unit.taught_by(live),
            unit.standard(rows),
            TASK,
            Padding(),
            settings,
            folder,
            measure,
            save=save,
            logs=folder / "logs",
        )
    best = BertForSequenceClassification.from_pretrained(folder / "best")
    return said(best, rows), max(measured)


@pytest.mark.parametrize("taught", [False, True])
def test_what_is_learnt_does_not_depend_on_the_unit(taught, tmp_path):
    """Numbers in the thousands made the loss explode, small ones stood still."""
    plain, rows = make_model(), make_rows()
    with torch.no_grad():
        plain.classifier.bias.fill_(0.5)  # a head that was trained before
    teacher = in_unit(make_model(1), 3.0, 2.0) if taught else None
    expected, reached = trained(tmp_path / "plain", copy.deepcopy(plain), rows, teacher)
    assert reached > 0.7
    assert np.abs(expected - 2).max() > 0.5
    for number, (scale, middle) in enumerate([(1000.0, 5000.0), (0.001, 0.0), (1.0, -300.0)]):
        other = in_unit(teacher, scale, middle) if taught else None
        own = in_unit(plain, scale, middle)
        found, same = trained(tmp_path / str(number), own, make_rows(scale, middle), other)
        np.testing.assert_allclose((found - middle) / scale, expected, atol=0.05)
        assert same == pytest.approx(reached, abs=0.02)


def test_a_new_head_begins_in_the_standard_unit():
    rows = make_rows(1000.0, 5000.0)
    model = make_model()
    before = said(model, rows)
    unit = TargetUnit.of(TASK, rows, model)
    with unit.learnt():
        np.testing.assert_array_equal(said(model, rows), before)
    np.testing.assert_allclose(said(model, rows), unit.deviation * before + unit.mean, rtol=1e-5)
    assert unit.mean == pytest.approx(np.nanmean(rows.flat["labels"]))
    assert unit.deviation == pytest.approx(np.nanstd(rows.flat["labels"]))


def test_saving_leaves_the_head_bit_for_bit():
    rows, model = make_rows(1000.0, 5000.0), make_model()
    kept = copy.deepcopy(model.state_dict())
    with TargetUnit.of(TASK, rows, model).original():
        assert not torch.equal(model.classifier.weight, kept["classifier.weight"])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_head_without_a_bias_holds_no_mean():
    """GPT-2's: numbers are divided by their root mean square."""
    model = GPT2ForSequenceClassification(GPT2Config(**SIZES, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    rows = make_rows(2.0, 10.0)
    unit = TargetUnit.of(TASK, rows, model)
    labels = rows.flat["labels"]
    assert (unit.mean, unit.deviation) == (0.0, pytest.approx(np.sqrt(np.nanmean(labels.astype(float) ** 2))))
    before = said(model, rows)
    with unit.learnt():
        np.testing.assert_allclose(said(model, rows), before / unit.deviation, rtol=1e-5)
    np.testing.assert_allclose(said(model, rows), before, rtol=1e-5)


def test_classes_have_no_unit():
    rows = pack({"input_ids": [[1]]}, {"labels": np.array([0])})
    unit = TargetUnit.of(TASKS["text-classification"], rows, make_model())
    assert unit.standard(rows) is rows
    assert unit.taught_by(None) is None
