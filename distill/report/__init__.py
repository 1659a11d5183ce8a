"""The report of a run, from what was measured: `report.md` for a repository, `report.html` for everyone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from distill.files import write_text
from distill.report.svg import bar_chart, line_chart, shares

__all__ = ["write_report"]

NOT_MEASURED = "not measured"


def write_report(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes `report.md` and `report.html` into `folder`, from nothing but `results`.

    Args:
        results: As `results.json` has them. Parts that are missing are said to be not measured.
        folder: Where the files go.

    Returns:
        The paths of the two files.
    """
    values = {
        **results,
        "bench": latency_rows(results.get("bench") or {}),
        "charts": charts(results),
        "headline": headline(results),
        "roles": [row["role"] for row in results.get("models", [])],
    }
    paths = []
    for name in ("report.md", "report.html"):
        template = _environment(html=name.endswith("html")).get_template(f"{name}.j2")
        paths.append(folder / name)
        write_text(paths[-1], template.render(values))
    return paths


def latency_rows(bench: Mapping[str, Any]) -> dict[str, Any]:
    """The medians of the first batch size and thread count, a row a model: what `distill bench` wrote, as a table."""
    cells = bench.get("cells", [])
    first = [cell for cell in cells if (cell["batch"], cell["threads"]) == (cells[0]["batch"], cells[0]["threads"])]
    targets = [
        {**target, "p50": {cell["length"]: cell["p50"] for cell in first if cell["target"] == target["name"]}}
        for target in bench.get("targets", [])
    ]
    for target in targets:
        slow = targets[0]["p50"]
        target["times"] = {length: slow[length] / fast for length, fast in target["p50"].items() if slow.get(length)}
    shape = {"batch": cells[0]["batch"], "threads": cells[0]["threads"]} if cells else {}
    lengths = sorted({cell["length"] for cell in first})
    return {"targets": targets, "lengths": lengths, "notes": bench.get("notes", []), **shape}


def headline(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """The four numbers a person looks for first, of the int8 file: kept metric, size, speed, agreement."""
    models = {row["role"]: row for row in results.get("models", [])}
    teacher, student = models.get("teacher-onnx", {}), models.get("student-int8", {})
    facts = [
        {"value": percent(student.get("retention")), "name": f"of the teacher's {results.get('metric', 'metric')}"}
    ]
    if student.get("bytes") and teacher.get("bytes"):
        times = teacher["bytes"] / student["bytes"]
        facts.append({"value": f"{times:.1f}x", "name": f"smaller: {megabytes(student['bytes'])} MB"})
    length, speed = _speed(teacher, student)
    if speed:
        facts.append({"value": f"{speed:.1f}x", "name": f"faster at {length} tokens, one thread"})
    facts.append({"value": percent(student.get("agreement")), "name": "same answer as the teacher"})
    return facts


def _speed(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> tuple[str, float | None]:
    slow, fast = teacher.get("latency_ms") or {}, student.get("latency_ms") or {}
    lengths = [length for length in fast if length in slow]
    if not lengths:
        return "", None
    length = min(lengths, key=lambda name: abs(int(name) - 32))
    return length, slow[length]["p50"] / fast[length]["p50"]


SERIES = {"teacher": "teacher", "baseline": "same student without a teacher", "student": "student"}
"""Curves by role, in the order of the colours: grey is the teacher's, blue the student's."""


def charts(results: Mapping[str, Any]) -> dict[str, str]:
    """Metric and loss by epoch, latency by length, bytes and seconds by part; empty where nothing is known."""
    metric = results.get("metric", "metric")
    found = results.get("curves", {})
    curves = {name: found.get(role, []) for role, name in SERIES.items()}
    latency: dict[str, dict[str, float]] = {}
    for row in results.get("models", []):
        for length, cell in (row.get("latency_ms") or {}).items():
            latency.setdefault(f"{length} tokens", {})[f"{row['name']}, {row['format']}"] = cell["p50"]
    return {
        "metric": line_chart(
            {name: [(p["epoch"], p[metric]) for p in points if metric in p] for name, points in curves.items()},
            title=f"{metric} on validation data by epoch",
            x_label="epoch",
            y_label=f"{metric} on the validation data",
        ),
        "loss": line_chart(
            {name: [(p["epoch"], p["loss"]) for p in points if "loss" in p] for name, points in curves.items()},
            title="training loss by epoch",
            x_label="epoch",
            y_label="training loss; each has its own objective, compare shapes and not heights",
        ),
        "latency": bar_chart(latency, title="median latency by length", y_label="median ms a call, lower is better"),
        "bytes": shares(_bytes_by_part(results), unit="MB", digits=2),
        "time": shares({stage["name"]: stage["seconds"] for stage in results.get("stages", [])}, unit="s"),
    }


def _bytes_by_part(results: Mapping[str, Any]) -> dict[str, float]:
    """Megabytes of the int8 file by part of the model."""
    steps = [step["components"] for step in results.get("verification", []) if step.get("components")]
    return {part["name"]: part["bytes"] / 1e6 for part in steps[-1]} if steps else {}


def _environment(*, html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.report"),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    environment.filters.update(
        percent=percent, megabytes=megabytes, number=number, difference=difference, count=count, day=day, cell=cell
    )
    return environment


def percent(value: float | None) -> str:
    """0.9912 as 99.1%."""
    return f"{value:.1%}" if isinstance(value, (int, float)) else NOT_MEASURED


def megabytes(value: float | None) -> str:
    """Bytes as millions of them."""
    return f"{value / 1e6:.{1 if value >= 1e6 else 3}f}" if isinstance(value, (int, float)) else NOT_MEASURED


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with fixed digits."""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else NOT_MEASURED


def difference(value: float | None) -> str:
    """A difference that may be tiny: 0.0117, or 2.4e-07."""
    return number(value) if not isinstance(value, float) or value >= 1e-3 or value == 0 else f"{value:.1e}"


def count(value: int | None) -> str:
    """A whole number with thousands apart."""
    return f"{value:,}" if isinstance(value, int) else NOT_MEASURED


def day(value: str | None) -> str:
    """2026-11-23T07:24:07+00:00 as 2026-11-23 07:24 UTC."""
    return f"{value[:16].replace('T', ' ')} UTC" if isinstance(value, str) and value.endswith("+00:00") else str(value)


def cell(value: object) -> str:
    """Text for a Markdown table: one line, no bars, and no HTML, which Markdown readers would render."""
    text = " ".join(str(value).split())
    return re.sub(r"[&<>`|*\[\]\\~]", lambda found: f"&#{ord(found[0])};", text)
