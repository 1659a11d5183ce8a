from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from distill.errors import VerificationError
from distill.evaluation import TorchPredictor
from distill.export.parity import SHAPES, batches_of, check_parity


@dataclass
class Off:
    """A real model whose answers are tampered with."""

    model: TorchPredictor
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]

    def predict(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.change(self.model.predict(batch))


@pytest.fixture
def model(tiny: Callable[[str], Any]) -> TorchPredictor:
    return tiny("bert").reference


@pytest.fixture
def batches(tiny: Callable[[str], Any]) -> list[dict[str, np.ndarray]]:
    return tiny("bert").batches((1, 5), (3, 33))


def test_a_model_is_like_itself(model: TorchPredictor, batches: list[Any]) -> None:
    report = check_parity(
        model, model, batches, step="nothing", tolerance=0.0, agreement=1.0, metric=lambda outputs: float(len(outputs))
    )
    assert report.as_dict() == {
        "step": "nothing",
        "max_abs_diff": 0.0,
        "max_probability_diff": 0.0,
        "agreement": 1.0,
        "rows": 4,
        "batches": ((1, 5), (3, 33)),
        "metric": 2.0,
    }


def test_the_batch_that_differs_is_named(model: TorchPredictor, batches: list[Any]) -> None:
    def change(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return outputs | {"logits": outputs["logits"] + (0.5 if len(outputs["logits"]) == 3 else 0)}

    with pytest.raises(
        VerificationError, match=r"^export: logits differ by 0\.5 on a batch of 3 rows of 33 tokens.*0\.0001"
    ):
        check_parity(model, Off(model, change), batches, step="export", tolerance=1e-4)


def test_agreement_is_measured_and_asked_for(model: TorchPredictor, batches: list[Any]) -> None:
    def change(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        logits = outputs["logits"].copy()
        if len(logits) == 3:
            logits[0, logits[0].argmin()] = logits[0].max() + 1
        return outputs | {"logits": logits}

    off = Off(model, change)
    assert check_parity(model, off, batches, step="quantise", tolerance=100).agreement == 0.75
    with pytest.raises(VerificationError, match=r"quantise: only 75\.00% of 4 rows get the same answer, 99\.00%"):
        check_parity(model, off, batches, step="quantise", tolerance=100, agreement=0.99)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda outputs: {"logits": outputs["logits"]}, r"output 'probabilities' is missing, there are logits"),
        (lambda outputs: outputs | {"logits": outputs["logits"][:, :2]}, r"shape \(1, 2\) instead of \(1, 3\)"),
        (
            lambda outputs: outputs | {"logits": outputs["logits"] * np.nan},
            r"'logits' is not finite for a batch of \(1, 5\)",
        ),
    ],
)
def test_what_is_wrong_with_an_output_is_said(
    change: Any, message: str, model: TorchPredictor, batches: list[Any]
) -> None:
    with pytest.raises(VerificationError, match=message):
        check_parity(model, Off(model, change), batches, step="export", tolerance=1.0)


def test_nothing_to_compare_is_no_success(model: TorchPredictor) -> None:
    with pytest.raises(VerificationError, match="there is no batch to compare on"):
        check_parity(model, model, [], step="export", tolerance=1.0)


def test_batches_of_every_shape_are_cut_out_of_real_rows() -> None:
    rows = {
        "input_ids": np.array([[2, 5, 6, 3, 1], [2, 7, 3, 1, 1]]),
        "attention_mask": np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
        "labels": np.array([0, 1]),
    }
    batches = batches_of(rows, padding=1)
    assert tuple(batch["input_ids"].shape for batch in batches) == SHAPES
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["attention_mask"].sum(axis=1).min() >= 1
        assert np.all(batch["input_ids"][batch["attention_mask"] == 0] == 1)
        assert set(batch["input_ids"][batch["attention_mask"] == 1].tolist()) <= {2, 5, 6, 3, 7}
    assert (batches[-1]["attention_mask"].sum(axis=1) < 120).any()
