"""One metric code path for PyTorch and ONNX: anything with `predict(batch)` is measured the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from distill import processes
from distill.errors import DataError, VerificationError
from distill.features import evaluating
from distill.heads.generation import Rules
from distill.progress import SILENT, Progress
from distill.tasks import Encoded, Padding, Task
from distill.tasks.base import Predictor
from distill.tasks.encoded import SOURCE, Array


class TorchPredictor:
    """A PyTorch model as a `Predictor`, with the outputs its exported graph will have.

    Args:
        model: A transformers model.
        task: Says what the graph adds to the model's outputs.
        bf16: Run under bf16 autocast: faster for choosing checkpoints, off for reported numbers.
    """

    def __init__(self, model: Any, task: Task, *, bf16: bool = False) -> None:
        self._model, self._task, self._bf16 = task.shipped(model), task, bf16

    def write(self, batch: Mapping[str, Array], rules: Rules) -> list[list[int]]:
        """By row the token ids that an encoder with a decoder writes, by transformers' own search."""
        device = next(self._model.parameters()).device
        read = ("input_ids", "attention_mask") if "input_ids" in batch else ("pixel_values",)
        given = {name: torch.from_numpy(batch[name]).to(device) for name in read}
        with torch.inference_mode():
            found = self._model.generate(
                **given, do_sample=False, num_beams=rules.beams, max_new_tokens=rules.max_new_tokens, max_length=None
            )
        rows = [row.tolist()[1:] for row in found]
        ends = [next((at for at, token in enumerate(row) if token in rules.ends), len(row)) for row in rows]
        return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The task's graph outputs in fp32."""
        parameter = next(self._model.parameters())
        inputs = {
            name: torch.from_numpy(np.ascontiguousarray(batch[name])).to(parameter.device)
            for name in self._task.feeds
            if name in batch
        }
        lower = torch.autocast(parameter.device.type, torch.bfloat16, enabled=self._bf16)
        with evaluating(self._model), torch.inference_mode(), lower:
            found = self._task.ask(self._model, inputs)
        values = {name: value.float().cpu().numpy() for name, value in found.items()}
        return self._task.postprocess({**values, "attention_mask": batch["attention_mask"]})


class MeanPredictor:
    """Several models as one `Predictor`: the weighted mean of their logits, and what the task makes of it.

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
        said = [member.predict(batch) for member in self._members]
        mean = {name: sum(share * one[name] for share, one in zip(self._shares, said, strict=True)) for name in said[0]}
        return self._task.postprocess(mean)


@dataclass(frozen=True)
class Evaluation:
    """What a model said and how good it was.

    Attributes:
        metrics: The task's measures, in [0, 1].
        outputs: Every output of the graph in the order of the rows: an entry a row or, where the graph has a value for
            each token, an entry a token.
        encoded: The rows, as this model reads them.
        settings: What the task chose for this model on validation data.
    """

    metrics: dict[str, float]
    outputs: dict[str, Array]
    encoded: Encoded
    settings: Mapping[str, Any] | None = None


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

    Of outputs with a value for each token, padding is left out and rows stand end to end, as in `encoded.ragged`.
    Processes that work together share the batches, which are those of one process, and all get all outputs.

    Raises:
        VerificationError: An output is not finite.
    """
    order = np.argsort(encoded.lengths, kind="stable")
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    own = batches[processes.part()]
    collected: dict[str, list[Array]] = {}
    by_token = task.by_token
    with progress.stage(name, total=sum(map(len, own)), unit="sentences") if name else SILENT.stage("") as stage:
        for numbers in own:
            rows = [encoded[int(row)] for row in numbers]
            batch = task.collate(rows, padding)
            tokens = task.tokens(batch) if by_token else ()
            said = predictor.predict(batch)
            for key, value in {**said, **task.digest(said, batch)}.items():
                if key in task.unmeasured:
                    continue
                parts = [row[:count] for row, count in zip(value, tokens, strict=True)] if key in by_token else value
                collected.setdefault(key, []).extend(parts)
            stage.advance(len(rows))
    outputs = {}
    for key, ordered in _by_row(collected, own, len(encoded)).items():
        broken = [row for row, value in enumerate(ordered) if not np.isfinite(value).all()]
        if broken:
            raise VerificationError(
                f"{key} that are not finite for {len(broken)} of {len(encoded)} rows",
                where=f"row {broken[0]}",
                fix="Give weights without NaN or overflow: train again with a lower rate or precision = 'fp32'.",
            )
        outputs[key] = np.concatenate(ordered) if key in by_token else np.stack(ordered)
    return outputs


def _by_row(collected: Mapping[str, Sequence[Array]], batches: Sequence[Array], count: int) -> dict[str, list[Array]]:
    """By output a value for each of `count` rows, from all processes.

    Args:
        collected: By output what this process found, in the order of its `batches`.
        batches: Numbers of the rows that it ran.
        count: Rows in all.
    """
    ordered: dict[str, list[Array]] = {}
    for numbers, found in processes.gather(([int(row) for batch in batches for row in batch], dict(collected))):
        for key, values in found.items():
            rows = ordered.setdefault(key, [np.empty(0)] * count)
            for row, value in zip(numbers, values, strict=True):
                rows[row] = value
    return ordered


def evaluate(
    predictor: Predictor,
    encoded: Encoded,
    task: Task,
    padding: Padding,
    *,
    batch_size: int = 32,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
    name: str = "",
) -> Evaluation:
    """Measures `predictor` on labelled rows, with the task's `settings` where it has some.

    Raises:
        DataError: No row has a label.
    """
    if not task.labelled(encoded):
        raise DataError("no row has a label to compare with", where="evaluation", fix="Give labelled validation data.")
    outputs = predict_rows(predictor, encoded, task, padding, batch_size=batch_size, progress=progress, name=name)
    metrics = processes.agree(lambda: _plain(task.metrics(outputs, encoded, settings)))
    return Evaluation(metrics, outputs, encoded, settings)


def _plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def by_group(found: Evaluation, groups: Sequence[str], task: Task) -> dict[str, dict[str, float]]:
    """The measures of the rows of each group alone; a group without a label is left out.

    Args:
        found: On all rows.
        groups: By row of the data, such as its language.
        task: What was measured.
    """
    measured = {}
    ends = np.cumsum([0, *task.counts(found.encoded)])
    for name in sorted(set(groups)):
        chosen = np.flatnonzero([group == name for group in groups])
        rows = np.flatnonzero(np.isin(found.encoded.sources, chosen))
        encoded = _of_rows(found.encoded, rows, chosen, len(groups))
        tokens = np.concatenate([np.arange(ends[row], ends[row + 1]) for row in rows])
        outputs = {key: value[tokens if key in task.by_token else rows] for key, value in found.outputs.items()}
        if task.labelled(encoded):
            measured[name] = task.metrics(outputs, encoded, found.settings)
    return measured


def _of_rows(encoded: Encoded, rows: Array, chosen: Array, most: int) -> Encoded:
    """Some rows, which come of `chosen` rows of the data out of `most`."""
    part = encoded.select(rows.tolist())
    flat = dict(part.flat)
    if SOURCE in flat:
        flat[SOURCE] = np.searchsorted(chosen, flat[SOURCE])
    given = {
        name: [column[row] for row in chosen] if len(column) == most else column
        for name, column in encoded.given.items()
    }
    return replace(part, flat=flat, given=given)


def agreement(one: Evaluation, other: Evaluation, task: Task) -> float:
    """Share of scored items on which both choose the same, in [0, 1]."""
    mine, theirs = (task.answers(each.outputs, each.encoded, each.settings) for each in (one, other))
    return task.agreement(mine, theirs)


def disagreements(
    teacher: Evaluation, student: Evaluation, texts: list[str], task: Task, *, most: int = 20
) -> list[dict[str, Any]]:
    """Rows on which the two say different things, the surest disagreements first."""
    theirs, ours = (task.told(one.outputs, one.encoded, one.settings) for one in (teacher, student))
    apart = [task.apart(one, other) for one, other in zip(theirs, ours, strict=True)]
    rows = sorted((row for row, much in enumerate(apart) if much > 0), key=lambda row: -apart[row])
    gold = task.gold(student.encoded)
    return [
        {
            "text": texts[row],
            "label": gold[row],
            "teacher": theirs[row][0],
            "teacher_probability": theirs[row][1],
            "student": ours[row][0],
            "student_probability": ours[row][1],
        }
        for row in rows[:most]
    ]
