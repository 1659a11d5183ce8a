"""One code path measures everything: order, agreement, disagreement, and refusing what is not finite."""

from dataclasses import replace

import numpy as np
import pytest

from distill.errors import DataError, VerificationError
from distill.evaluation import agreement, disagreements, evaluate, predict_rows
from distill.learning import result_line
from distill.tasks import TASKS, Padding
from distill.tasks.encoded import pack

TASK = TASKS["text-classification"]


class SaysItsLength:
    """Logits that give away which row they belong to: (tokens, first id)."""

    def __init__(self):
        self.widths = []

    def predict(self, batch):
        self.widths.append(batch["input_ids"].shape[1])
        return TASK.postprocess(
            {"logits": np.stack([batch["attention_mask"].sum(1), batch["input_ids"][:, 0]], 1).astype(np.float32)}
        )


class Says:
    def __init__(self, probabilities):
        self.logits = np.log(np.asarray(probabilities, np.float32))

    def predict(self, batch):
        return TASK.postprocess({"logits": self.logits[batch["example"]]})


def rows_of(lengths, labels=None):
    ids = [[10 + row] * length for row, length in enumerate(lengths)]
    return pack({"input_ids": ids}, {"labels": np.array(labels or [0] * len(lengths))})


def test_rows_of_like_length_share_a_batch_and_come_back_in_order():
    lengths = [9, 1, 5, 7, 3, 2, 8, 4, 6]
    model = SaysItsLength()
    outputs = predict_rows(model, rows_of(lengths), TASK, Padding(), batch_size=3)
    assert outputs["logits"].tolist() == [[length, 10 + row] for row, length in enumerate(lengths)]
    assert model.widths == [3, 6, 9]


def test_metrics_agreement_and_disagreements_by_hand():
    encoded = replace(rows_of([1, 1, 1, 1], [0, 1, 1, -100]), names=["no", "yes"])
    teacher = evaluate(Says([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]]), encoded, TASK, Padding())
    student = evaluate(Says([[0.8, 0.2], [0.4, 0.6], [0.1, 0.9], [0.45, 0.55]]), encoded, TASK, Padding())
    assert teacher.metrics["accuracy"] == pytest.approx(2 / 3)
    assert student.metrics["accuracy"] == 1.0
    assert agreement(teacher, student, TASK) == 0.5
    found = disagreements(teacher, student, ["a", "b", "c", "d"], TASK)
    assert [(row["text"], row["label"], row["teacher"], row["student"]) for row in found] == [
        ("c", "yes", "no", "yes"),  # 0.6 + 0.9 sure: before d with 0.7 + 0.55
        ("d", None, "no", "yes"),
    ]
    assert found[0]["teacher_probability"] == pytest.approx(0.6)


def test_what_is_not_finite_is_refused_with_its_row():
    with pytest.raises(VerificationError, match=r"row 1: logits that are not finite for 1 of 2 rows"):
        predict_rows(Says([[0.5, 0.5], [np.nan, 0.5]]), rows_of([1, 2]), TASK, Padding())


def test_rows_without_any_label_cannot_be_measured():
    with pytest.raises(DataError, match="no row has a label"):
        evaluate(SaysItsLength(), rows_of([2, 3], [-100, -100]), TASK, Padding())


def test_a_share_of_nothing_is_not_said():
    facts = {"metrics": {"f1": 0.0}, "retention": None}
    assert result_line("student", facts, "f1", 1200) == "student: f1 0.0000 on 1,200 test rows"
    kept = result_line("student", {"metrics": {"f1": 0.45}, "retention": 0.9}, "f1", 9)
    assert kept == "student: f1 0.4500 on 9 test rows, 90.0% of the teacher's"
