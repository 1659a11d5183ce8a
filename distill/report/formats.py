"""Numbers and names as a reader wants them; what is not there is said to be not measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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


def rate(value: float | None) -> str:
    """So many a second, thousands apart; two digits behind the point where there are few."""
    if not isinstance(value, (int, float)):
        return NOT_MEASURED
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


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


def in_order(lengths: Iterable[str]) -> list[str]:
    """Lengths of the benchmark, each once, shortest first; real text is last."""
    return sorted(set(lengths), key=lambda length: (int(length) == 0, int(length)))


def shapes(batches: Sequence[Sequence[int]] | None) -> str:
    """[[1, 6], [8, 21]] as `1x6, 8x21`."""
    if not isinstance(batches, Sequence) or not batches:
        return NOT_MEASURED
    return ", ".join(f"{rows}x{length}" for rows, length in batches)


def gigabytes(value: float | None) -> str:
    """Bytes as thousands of millions of them."""
    return f"{value / 1e9:.1f} GB" if isinstance(value, (int, float)) else NOT_MEASURED


def words(value: Any) -> str:
    """A setting as plain words: a mapping as `key value`, a list with commas, a pair of layers as `1 from 2`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {words(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
            return ", ".join(f"{words(one)} from {words(other)}" for one, other in value)
        return ", ".join(words(part) for part in value)
    return NOT_MEASURED if value is None else str(value)


def settings(term: Mapping[str, Any]) -> str:
    """What a term of the objective was told besides its name and weight, such as `temperature 4.0; layers 1 from 2`."""
    rest = {
        key: value for key, value in term.items() if key not in ("term", "weight") and value not in (None, "", [], {})
    }
    if rest.get("loss") == term.get("term"):
        del rest["loss"]
    named = (
        words(value) if key == "options" else f"{key.replace('_', ' ')} {words(value)}" for key, value in rest.items()
    )
    return "; ".join(named)


FILTERS = {
    each.__name__: each
    for each in (
        percent,
        megabytes,
        gigabytes,
        number,
        difference,
        count,
        rate,
        day,
        cell,
        tokens,
        shapes,
        words,
        settings,
    )
}
"""As the templates call them."""
