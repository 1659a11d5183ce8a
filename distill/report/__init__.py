"""The report of a run, from what was measured: `report.md` for a repository, `report.html` for everyone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from distill.files import write_text
from distill.report.facts import headline, latency_rows, verdicts
from distill.report.figures import charts
from distill.report.formats import FILTERS, in_order

__all__ = ["charts", "headline", "latency_rows", "verdicts", "write_report"]


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
        "verdicts": verdicts(results),
        "tried_lengths": in_order(n for row in results.get("tried") or [] for n in row["latency_ms"]),
        "roles": [row["role"] for row in results.get("models") or []],
    }
    paths = []
    for name in ("report.md", "report.html"):
        template = _environment(html=name.endswith("html")).get_template(f"{name}.j2")
        paths.append(folder / name)
        write_text(paths[-1], template.render(values))
    return paths


def _environment(*, html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.report"),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    environment.filters.update(FILTERS)
    return environment
