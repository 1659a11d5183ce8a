"""Does the file still answer like the model it was made from? Asked after every step, on real text, at many shapes.

check_parity(TorchPredictor(model, task), OnnxModel("model.onnx"), batches, step="export", tolerance=1e-4)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from distill.errors import VerificationError

Array = np.ndarray
Batch = Mapping[str, Array]

SHAPES = ((1, 1), (1, 5), (2, 17), (3, 33), (4, 120))
"""(rows, length) that every exported graph is tried at: an axis that was baked in breaks at one of them."""


class Predictor(Protocol):
    """Whatever answers a batch."""

    def predict(self, batch: Batch) -> dict[str, Array]:
        """Named outputs for a batch; of its columns, those that the model reads are used."""


@dataclass(frozen=True)
class ParityReport:
    """How far a candidate's answers are from the reference's.

    Attributes:
        step: What was done to the candidate, such as `export` or `quantise`.
        max_abs_diff: Largest absolute difference of an output that is no probability.
        max_probability_diff: Largest absolute difference of a probability; 0 where the graph returns none.
        agreement: Share of rows (of tokens, where each has its own) whose first output is largest at the same place.
        rows: How many rows were compared.
        batches: (rows, length) of each batch.
        metric: What the candidate reached where a metric was handed over.
    """

    step: str
    max_abs_diff: float
    max_probability_diff: float
    agreement: float
    rows: int
    batches: tuple[tuple[int, int], ...]
    metric: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For results.json and manifests."""
        return asdict(self)


def check_parity(
    reference: Predictor,
    candidate: Predictor,
    batches: Iterable[Batch],
    *,
    step: str,
    tolerance: float,
    agreement: float = 0.0,
    metric: Callable[[Sequence[Mapping[str, Array]]], float] | None = None,
) -> ParityReport:
    """Compares two predictors batch by batch.

    Args:
        reference: Says what is right.
        candidate: Is measured.
        batches: What both are asked; nothing is compared where there is none, which is an error.
        step: Names the candidate in errors and reports.
        tolerance: Largest absolute difference of an output that is let pass.
        agreement: Smallest share of rows with the same answer that is let pass.
        metric: Measures the candidate's outputs, one mapping a batch.

    Raises:
        VerificationError: Naming the batch, the output and the difference.
    """
    pairs = []
    for batch in batches:
        expected, got = reference.predict(batch), candidate.predict(batch)
        _same_form(expected, got, batch, step)
        pairs.append((batch, expected, got))
    if not pairs:
        raise VerificationError("there is no batch to compare on", where=step, fix="Give at least one sentence.")
    raw = [name for name in pairs[0][1] if name != "probabilities"]
    worst = max(pairs, key=lambda pair: _largest(pair, raw))
    same = [pair[1][raw[0]].argmax(-1) == pair[2][raw[0]].argmax(-1) for pair in pairs]
    report = ParityReport(
        step=step,
        max_abs_diff=_largest(worst, raw),
        max_probability_diff=max(_difference(pair, "probabilities") for pair in pairs),
        agreement=float(np.concatenate([answers.reshape(-1) for answers in same]).mean()),
        rows=sum(shape_of(batch)[0] for batch, _, _ in pairs),
        batches=tuple(shape_of(batch) for batch, _, _ in pairs),
        metric=metric([got for _, _, got in pairs]) if metric is not None else None,
    )
    if not report.max_abs_diff <= tolerance:  # also where it is not a number
        rows, length = shape_of(worst[0])
        raise VerificationError(
            f"{' and '.join(raw)} differ by {report.max_abs_diff:.3g} on a batch of {rows} rows of {length} tokens, "
            f"which is more than {tolerance:g}",
            where=step,
            fix="The file was not kept. Please report this with the model's config.json.",
        )
    if report.agreement < agreement:
        raise VerificationError(
            f"only {report.agreement:.2%} of {report.rows} rows get the same answer, {agreement:.2%} are asked for",
            where=step,
            fix="Leave the most sensitive products in fp32, or allow a larger drop.",
        )
    return report


def _same_form(expected: Mapping[str, Array], got: Mapping[str, Array], batch: Batch, step: str) -> None:
    """Every output that the reference has, of the same shape, and finite."""
    shape = shape_of(batch)
    for name, wanted in expected.items():
        if name not in got:
            raise VerificationError(
                f"output {name!r} is missing, there are {', '.join(got)}", where=step, fix="Export the model again."
            )
        if got[name].shape != wanted.shape:
            raise VerificationError(
                f"output {name!r} has shape {got[name].shape} instead of {wanted.shape} for a batch of {shape}",
                where=step,
                fix="An axis was fixed while exporting. Please report this with the model's config.json.",
            )
        if not np.isfinite(got[name]).all():
            raise VerificationError(
                f"output {name!r} is not finite for a batch of {shape}",
                where=step,
                fix="Look for NaN in the weights, or for a row without any token.",
            )


def shape_of(batch: Batch) -> tuple[int, int]:
    """(rows, tokens of the longest)."""
    rows, length = batch["attention_mask"].shape
    return int(rows), int(length)


def _largest(pair: tuple[Batch, Mapping[str, Array], Mapping[str, Array]], names: Sequence[str]) -> float:
    return float(np.max([_difference(pair, name) for name in names]))  # NaN where one is


def _difference(pair: tuple[Batch, Mapping[str, Array], Mapping[str, Array]], name: str) -> float:
    _, expected, got = pair
    if name not in expected:
        return 0.0
    return float(np.abs(expected[name].astype(np.float64) - got[name]).max(initial=0.0))


def batches_of(rows: Batch, *, shapes: Sequence[tuple[int, int]] = SHAPES, padding: int = 0) -> list[dict[str, Array]]:
    """Cuts batches of fixed shapes out of a longer one: row i keeps its first `length - i` tokens, so that rows differ.

    Args:
        rows: `input_ids` and further int64 columns (B, L) of real text; used again from the top where rows are short.
        shapes: (rows, length) of each batch.
        padding: Id that fills up `input_ids`; every other column is filled with 0.
    """
    ids, mask = rows["input_ids"], rows["attention_mask"].astype(bool)
    stream = {name: column[mask] for name, column in rows.items() if column.shape == ids.shape}
    batches = []
    for count, length in shapes:
        lengths = np.maximum(length - np.arange(count) * max(1, length // (count + 1)), 1)
        kept = np.arange(length) < lengths[:, None]
        batch = {}
        for name, values in stream.items():
            fill = padding if name == "input_ids" else 0
            batch[name] = np.where(kept, np.resize(values, (count, length)), fill).astype(np.int64)
        batch["attention_mask"] = kept.astype(np.int64)
        if "decoder_input_ids" in rows:  # a decoder's own axis
            shown = rows["decoder_input_ids"]
            batch["decoder_input_ids"] = np.resize(shown, (count, shown.shape[1]))[:, : length // 2 + 1]
        batches.append(batch)
    return batches
