"""Which charts a report has, and what goes into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.report.formats import in_order, tokens
from distill.report.svg import bar_chart, line_chart, shares

SERIES = {"teacher": "teacher", "baseline": "same student without a teacher", "student": "student"}
"""Curves by role, in the order of the colours: grey is the teacher's, blue the student's."""

HALF = 380
"""Width of a chart that stands beside another on a desk and alone on a phone."""
LATENCY, MILLISECONDS = "median latency by length", "median ms a call, lower is better"


def charts(results: Mapping[str, Any]) -> dict[str, str]:
    """Metric and loss by epoch, latency by length, bytes and seconds by part; empty where nothing is known."""
    metric = results.get("metric", "metric")
    found = results.get("curves") or {}
    curves = {name: found.get(role) or [] for role, name in SERIES.items()}
    rows = [row for row in results.get("models") or [] if row.get("latency_ms")]
    timed = {f"{row['name']}, {row['format']}": row["latency_ms"] for row in rows}
    latency = {
        tokens(length): {name: cells[length]["p50"] for name, cells in timed.items() if length in cells}
        for length in in_order(length for cells in timed.values() for length in cells)
    }
    return {
        "metric": line_chart(
            {name: _points(points, metric) for name, points in curves.items()},
            title=f"{metric} on validation data by epoch",
            x_label="epoch",
            y_label=f"{metric} on the validation data",
            width=HALF,
        ),
        "loss": line_chart(
            {name: _points(points, "loss") for name, points in curves.items()},
            title="training loss by epoch",
            x_label="epoch",
            y_label="training loss; each has its own objective, compare shapes and not heights",
            width=HALF,
        ),
        "latency": bar_chart(latency, title=LATENCY, y_label=MILLISECONDS),
        "latency_narrow": bar_chart(latency, title=LATENCY, y_label=MILLISECONDS, width=HALF),
        "bytes": shares(_bytes_by_part(results), unit="MB", digits=2),
        "time": shares({stage["name"]: stage["seconds"] for stage in results.get("stages") or []}, unit="s"),
    }


def _points(curve: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the points that have both."""
    return [(p["epoch"], p[key]) for p in curve if p.get(key) is not None and p.get("epoch") is not None]


def _bytes_by_part(results: Mapping[str, Any]) -> dict[str, float]:
    """Megabytes of the shipped file by part of the model."""
    steps = [step["components"] for step in results.get("verification") or [] if step.get("components")]
    return {part["name"]: part["bytes"] / 1e6 for part in steps[-1]} if steps else {}
