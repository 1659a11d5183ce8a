"""What the numbers say, in a line each: the headline, and the verdicts that a reader would otherwise work out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distill.report.formats import NOT_MEASURED, count, in_order, megabytes, number, percent, tokens

Row = Mapping[str, Any]
NO_GAIN = 1.05
"""Below this many times as fast, a file is called not faster."""


def headline(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The four numbers a person looks for first, of the int8 file: kept metric, size, speed, agreement."""
    models = by_role(results)
    teacher, student = models.get("teacher-onnx", {}), models.get("student-int8", {})
    return [
        {"value": percent(student.get("retention")), "name": f"of the teacher's {results.get('metric', 'metric')}"},
        _size(teacher, student),
        _speed(teacher, student, results.get("bench") or {}),
        {"value": percent(student.get("agreement")), "name": "same answer as the teacher"},
    ]


def by_role(results: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of `models` by role."""
    return {row["role"]: row for row in results.get("models") or []}


def _size(teacher: Row, student: Row) -> dict[str, str]:
    if not student.get("bytes") or not teacher.get("bytes"):
        return {"value": NOT_MEASURED, "name": "size against the teacher"}
    times = teacher["bytes"] / student["bytes"]
    return {"value": f"{times:.1f}x", "name": f"smaller: {megabytes(student['bytes'])} MB"}


def _speed(teacher: Row, student: Row, bench: Mapping[str, Any]) -> dict[str, str]:
    ratios = speeds(teacher, student)
    lengths = [length for length in ratios if int(length)] or list(ratios)
    if not lengths:
        return {"value": NOT_MEASURED, "name": "speed against the teacher"}
    length = min(lengths, key=lambda name: abs(int(name) - 32))
    shape = first_shape(bench)
    where = {None: "", (1, 1): ", one thread"}.get(shape, "")
    if shape not in (None, (1, 1)):
        where = f", batch {shape[0]}, {'one thread' if shape[1] == 1 else f'{shape[1]} threads'}"
    word = "faster" if ratios[length] >= NO_GAIN else "as fast: no gain"
    return {"value": f"{ratios[length]:.1f}x", "name": f"{word} at {tokens(length)}{where}"}


def first_shape(bench: Mapping[str, Any]) -> tuple[int, int] | None:
    """Batch size and threads that tables and charts show: the first that were measured."""
    cells = bench.get("cells") or []
    return (cells[0]["batch"], cells[0]["threads"]) if cells else None


def speeds(slow: Row, fast: Row) -> dict[str, float]:
    """How many times as fast by length, shortest first, where both were measured."""
    theirs, ours = slow.get("latency_ms") or {}, fast.get("latency_ms") or {}
    return {length: theirs[length]["p50"] / ours[length]["p50"] for length in in_order(ours) if length in theirs}


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """What distillation added, what int8 cost and what either gained, in plain words; nothing that was not measured."""
    models, metric = by_role(results), results.get("metric", "metric")
    weights = results.get("weights", "int8")
    stored = f"{weights} with int4 embeddings" if results.get("embeddings") == "int4" else weights
    data = results.get("data") or {}
    found = [
        _distillation(models, metric),
        _quantisation(models, metric, stored),
        _gain(models.get("teacher-onnx", {}), models.get("student-int8", {}), "the teacher's ONNX file", weights),
        _gain(models.get("student-onnx", {}), models.get("student-int8", {}), "the student in fp32", weights),
        _chance(models, metric, data.get("test"), data.get("measured", "test")),
    ]
    return [sentence for sentence in found if sentence]


def _distillation(models: Mapping[str, Row], metric: str) -> str:
    """The student against the same student without a teacher, both in PyTorch: nothing else differs between them."""
    baseline = _metric(models.get("baseline"), metric)
    role = "student" if "student" in models else "student-int8"
    student = _metric(models.get(role), metric)
    if student is None:
        return ""
    if baseline is None:
        return "What distillation adds was not measured: no student was trained without a teacher to compare with."
    both = f"{number(student)} against {number(baseline)} for the same student, trained as long without a teacher"
    gain = points(student - baseline)
    if student <= baseline:
        lost = f"it is {gain} below" if student < baseline else "it is no better than"
        return f"Distillation did not help here: by {metric} {lost} its baseline ({both})."
    return f"Distillation adds {gain} of {metric}: {both}."


def _quantisation(models: Mapping[str, Row], metric: str, weights: str) -> str:
    full, small = models.get("student-onnx"), models.get("student-int8")
    before, after = _metric(full, metric), _metric(small, metric)
    if before is None or after is None:
        return ""
    cost = (
        f"{weights} costs {points(before - after)} of {metric}"
        if after < before
        else f"{weights} costs no {metric} here"
    )
    if full and small and full.get("bytes") and small.get("bytes"):
        cost += f" and makes the student's file {full['bytes'] / small['bytes']:.1f} times smaller"
    return f"{cost} ({number(before)} in fp32, {number(after)} in {weights})."


def _gain(slow: Row, fast: Row, name: str, weights: str) -> str:
    ratios = speeds(slow, fast)
    if not ratios:
        return ""
    least, most = min(ratios.values()), max(ratios.values())
    span = f"{least:.1f}" if f"{least:.1f}" == f"{most:.1f}" else f"{least:.1f} to {most:.1f}"
    said = f"The {weights} file is {span} times as fast as {name}"
    lost = [tokens(length) for length, ratio in ratios.items() if ratio < NO_GAIN]
    return f"{said}; no gain at {', '.join(lost)}." if lost else f"{said}."


def _chance(models: Mapping[str, Row], metric: str, rows: int | None, measured: str) -> str:
    """How large a difference of two accuracies chance alone makes: 1.96 standard errors, the models held unrelated.

    Two right and two wrong answers are added (Agresti and Coull 1998): all right of 80 still leaves room for chance.
    """
    value = _metric(models.get("teacher"), metric)
    if metric != "accuracy" or value is None or not rows:
        return ""
    share = (value * rows + 2) / (rows + 4)
    error = 1.96 * math.sqrt(2 * share * (1 - share) / (rows + 4))
    return f"On {count(rows)} {measured} rows, differences of up to {points(error)} can be chance (95%)."


def points(difference: float) -> str:
    """A difference of a metric in hundredths: 0.0123 as 1.2 points."""
    return f"{abs(100 * difference):.1f} points" if abs(difference) >= 0.0005 else f"{abs(100 * difference):.2f} points"


def _metric(row: Row | None, name: str) -> float | None:
    value = ((row or {}).get("metrics") or {}).get(name)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def latency_rows(bench: Mapping[str, Any]) -> dict[str, Any]:
    """The medians of the first batch size and thread count, a row a model: what `distill bench` wrote, as a table."""
    cells, shape = bench.get("cells") or [], first_shape(bench)
    if shape is None:
        return {"targets": [], "lengths": [], "notes": bench.get("notes") or []}
    first = [cell for cell in cells if (cell["batch"], cell["threads"]) == shape and not cell.get("step")]
    targets = [
        {**target, "p50": {cell["length"]: cell["p50"] for cell in first if cell["target"] == target["name"]}}
        for target in bench.get("targets") or []
    ]
    slow = targets[0]["p50"] if targets else {}
    for target in targets:
        target["times"] = {length: slow[length] / fast for length, fast in target["p50"].items() if slow.get(length)}
    lengths = sorted({cell["length"] for cell in first}, key=lambda length: (length == 0, length))
    more = {"cells": cells, "batch": shape[0], "threads": shape[1]}
    return {"targets": targets, "lengths": lengths, "notes": bench.get("notes") or [], **more}
