"""Numbers and names as a reader wants them; what is not there is said to be not measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NOT_MEASURED = "not measured"


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


def tokens(length: int | str) -> str:
    """A length of the benchmark: 0 stands for real text."""
    return f"{length} tokens" if int(length) else "real text"


def shapes(batches: Sequence[Sequence[int]] | None) -> str:
    """[[1, 6], [8, 21]] as `1 x 6, 8 x 21`."""
    if not isinstance(batches, Sequence) or not batches:
        return NOT_MEASURED
    return ", ".join(f"{rows} x {length}" for rows, length in batches)


def gigabytes(value: float | None) -> str:
    """Bytes as thousands of millions of them."""
    return f"{value / 1e9:.1f} GB" if isinstance(value, (int, float)) else NOT_MEASURED


def settings(term: Mapping[str, Any]) -> str:
    """What a term of the objective was told besides its name and weight."""
    rest = {key: value for key, value in term.items() if key not in ("term", "weight") and value not in (None, "", [])}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in rest.items())


FILTERS = {
    each.__name__: each
    for each in (percent, megabytes, gigabytes, number, difference, count, day, cell, tokens, shapes, settings)
}
"""As the templates call them."""
