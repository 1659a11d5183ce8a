"""One metric code path for PyTorch and ONNX: anything with `predict(batch)` is measured the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from distill.errors import DataError, VerificationError
from distill.progress import SILENT, Progress
from distill.tasks import Encoded, Padding, Task
from distill.tasks.base import NO_LABEL, Array


class Predictor(Protocol):
    """A model of any kind: NumPy batch in, named NumPy outputs out."""

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs for `input_ids`, `attention_mask` and, where used, `token_type_ids`: (B, L) int64 each."""


class TorchPredictor:
    """A PyTorch model as a `Predictor`, with the outputs its exported graph will have.

    Args:
        model: A transformers model.
        task: Says what the graph adds to the model's outputs.
        bf16: Run under bf16 autocast: faster for choosing checkpoints, off for reported numbers.
    """

    def __init__(self, model: Any, task: Task, *, bf16: bool = False) -> None:
        self._model, self._task, self._bf16 = model, task, bf16

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The task's graph outputs in fp32."""
        parameter = next(self._model.parameters())
        inputs = {
            name: torch.from_numpy(np.ascontiguousarray(batch[name])).to(parameter.device)
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in batch
        }
        training = self._model.training
        self._model.eval()
        with torch.inference_mode(), torch.autocast(parameter.device.type, torch.bfloat16, enabled=self._bf16):
            output = self._model(**inputs)
        self._model.train(training)
        return self._task.postprocess({"logits": output.logits.float().cpu().numpy()})


class MeanPredictor:
    """Several models as one `Predictor`: the weighted mean of their logits.

    Args:
        members: Predictors of the same task and classes.
        weights: One a member; they are divided by their sum.
        task: Says what the graph adds to the logits.
    """

    def __init__(self, members: Sequence[Predictor], weights: Sequence[float], task: Task) -> None:
        self._members, self._task = list(members), task
        self._shares = [weight / sum(weights) for weight in weights]

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The task's graph outputs in fp32."""
        said = [member.predict(batch)["logits"] for member in self._members]
        mean = sum(share * one for share, one in zip(self._shares, said, strict=True))
        return self._task.postprocess({"logits": mean})


@dataclass(frozen=True)
class Evaluation:
    """What a model said and how good it was.

    Attributes:
        metrics: The task's measures, in [0, 1].
        outputs: Every output of the graph, one entry a row, in the order of the rows.
    """

    metrics: dict[str, float]
    outputs: dict[str, Array]


def predict_rows(
    predictor: Predictor,
    encoded: Encoded,
    task: Task,
    padding: Padding,
    *,
    batch_size: int = 32,
    progress: Progress = SILENT,
    name: str = "",
) -> dict[str, Array]:
    """Runs every row, rows of like length together, and gives the outputs in the order of the rows.

    Raises:
        VerificationError: An output is not finite.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    collected: dict[str, list[Array]] = {}
    with progress.stage(name, total=len(encoded), unit="sentences") if name else SILENT.stage("") as stage:
        for begin in range(0, len(order), batch_size):
            rows = [encoded[int(row)] for row in order[begin : begin + batch_size]]
            for key, value in predictor.predict(task.collate(rows, padding)).items():
                collected.setdefault(key, []).append(value)
            stage.advance(len(rows))
    back = np.argsort(order, kind="stable")
    outputs = {key: np.concatenate(values)[back] for key, values in collected.items()}
    broken = ~np.isfinite(outputs["logits"]).reshape(len(encoded), -1).all(axis=1)
    if broken.any():
        raise VerificationError(
            f"logits that are not finite for {int(broken.sum())} of {len(encoded)} rows",
            where=f"row {int(broken.argmax())}",
            fix="Give weights without NaN or overflow: train again with a lower rate or precision = 'fp32'.",
        )
    return outputs


def evaluate(
    predictor: Predictor,
    encoded: Encoded,
    task: Task,
    padding: Padding,
    *,
    batch_size: int = 32,
    progress: Progress = SILENT,
    name: str = "",
) -> Evaluation:
    """Measures `predictor` on labelled rows.

    Raises:
        DataError: No row has a label.
    """
    if not (encoded.flat["labels"] != NO_LABEL).any():
        raise DataError("no row has a label to compare with", where="evaluation", fix="Give labelled validation data.")
    outputs = predict_rows(predictor, encoded, task, padding, batch_size=batch_size, progress=progress, name=name)
    return Evaluation(task.metrics(outputs, encoded), outputs)


def agreement(one: Evaluation, other: Evaluation) -> float:
    """Share of rows on which both choose the same class, in [0, 1]."""
    return float((one.outputs["logits"].argmax(-1) == other.outputs["logits"].argmax(-1)).mean())


def disagreements(
    teacher: Evaluation, student: Evaluation, texts: list[str], encoded: Encoded, labels: list[str], *, most: int = 20
) -> list[dict[str, Any]]:
    """Rows on which the two choose differently, the surest disagreements first."""
    theirs, ours = teacher.outputs["probabilities"], student.outputs["probabilities"]
    chosen, other = theirs.argmax(-1), ours.argmax(-1)
    rows = np.flatnonzero(chosen != other)
    sure = theirs[rows, chosen[rows]] + ours[rows, other[rows]]
    gold = encoded.flat["labels"]
    return [
        {
            "text": texts[row],
            "label": labels[gold[row]] if gold[row] != NO_LABEL else None,
            "teacher": labels[chosen[row]],
            "teacher_probability": float(theirs[row, chosen[row]]),
            "student": labels[other[row]],
            "student_probability": float(ours[row, other[row]]),
        }
        for row in rows[np.argsort(-sure, kind="stable")][:most]
    ]
