"""Three small charts as inline SVG: no script, no font, no file beside the page.

Colours are the page's CSS variables `--c0` to `--c3`, so that a chart is readable on white and on black.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = 4
"""How many colours the page defines; a fifth series begins anew."""
DASHES = ("2 3", "6 3", "none", "8 3 2 3")
"""So that lines are told apart in print, too. The third, the student's, is the solid one."""

HEIGHT = 240
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 18, 38

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, title: str, x_label: str, y_label: str, width: int = 480) -> str:
    """One line a series, named in the legend above.

    Args:
        series: (x, y) points by name, in the order of x. What is empty or not finite is left out, but keeps its colour,
            so that a name has the same colour in several charts.
        title: What a screen reader says.
        x_label: Below the axis, with its unit.
        y_label: In the legend, with its unit.
        width: In the unit of the text, which is 12 high: a chart shown narrow needs a small one.

    Returns:
        A `<figure>`, or an empty string where there is nothing to draw.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(x + y)] for name, points in series.items()}
    drawn = {name: points for name, points in finite.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    low, high = _room(min(ys), max(ys))
    begin, end = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, min(xs) + 0.5)

    def place(x: float, y: float) -> tuple[str, str]:
        right = LEFT + (x - begin) / (end - begin) * (width - LEFT - RIGHT)
        up = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{right:.1f}", f"{up:.1f}"

    parts = [_grid(low, high, width), _x_axis(begin, end, x_label, width)]
    colours = {name: number for number, name in enumerate(series) if name in drawn}
    for name, number in colours.items():
        points = drawn[name]
        path = " ".join(",".join(place(x, y)) for x, y in points)
        x, y = place(*points[-1])
        parts.append(
            f'<polyline points="{path}" style="stroke:{_colour(number)}" stroke-dasharray="{_dash(number)}"/>'
            f'<circle cx="{x}" cy="{y}" r="4" style="fill:{_colour(number)}"/>'
        )
    told = (
        f"{name}: from {points[0][1]:.4g} at {points[0][0]:.4g} to {points[-1][1]:.4g} at {points[-1][0]:.4g},"
        f" lowest {min(y for _, y in points):.4g}, highest {max(y for _, y in points):.4g}"
        for name, points in drawn.items()
    )
    return _figure(title, "; ".join(told), colours, y_label, "".join(parts), width)


def bar_chart(groups: Mapping[str, Mapping[str, float]], *, title: str, y_label: str, width: int = 760) -> str:
    """Bars beside each other in each group, their values above them.

    Args:
        groups: Value by series by group, such as `{"16 tokens": {"teacher": 3.7, "student": 0.6}}`.
        title: What a screen reader says.
        y_label: In the legend, with its unit.
        width: In the unit of the text, which is 12 high.

    Returns:
        A `<figure>`, or an empty string where there is nothing to draw.
    """
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    finite = [value for values in groups.values() for value in values.values() if math.isfinite(value)]
    if not finite:
        return ""
    highest = max(finite) * 1.08 or 1.0
    room = (width - LEFT - RIGHT) / len(groups)
    bar = min(48.0, room * 0.84 / len(names))
    parts = [_grid(0.0, highest, width)]
    for place, (group, values) in enumerate(groups.items()):
        middle = LEFT + (place + 0.5) * room
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{escape(group)}</text>')
        for index, name in enumerate(names):
            value = values.get(name, math.nan)
            if math.isfinite(value):
                left = middle + (index - len(names) / 2) * bar
                parts.append(_bar(left, bar, value, value / highest, index))
    told = (
        f"{group}: " + ", ".join(f"{name} {_short(value)}" for name, value in values.items() if math.isfinite(value))
        for group, values in groups.items()
    )
    colours = {name: number for number, name in enumerate(names)}
    return _figure(title, "; ".join(told), colours, y_label, "".join(parts), width)


def shares(parts: Mapping[str, float], *, unit: str, digits: int = 1) -> str:
    """A row for each part, with a bar as long as its value beside the others', as a table without lines.

    Args:
        parts: Value by name, in the order of the rows.
        unit: Behind each value.
        digits: Behind the point.
    """
    most = max((value for value in parts.values() if math.isfinite(value)), default=0.0)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="n">{value:.{digits}f} {escape(unit)}</td>'
        f'<td class="bar"><i style="width:{100 * value / most if most > 0 else 0:.1f}%"></i></td></tr>'
        for name, value in parts.items()
        if math.isfinite(value)
    )
    return f'<table class="shares"><tbody>{rows}</tbody></table>' if rows else ""


def _bar(left: float, wide: float, value: float, share: float, index: int) -> str:
    tall = share * (HEIGHT - TOP - BOTTOM)
    top = HEIGHT - BOTTOM - tall
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide - 3:.1f}" height="{tall:.1f}" rx="2"'
        f' style="fill:{_colour(index)}"/>'
        f'<text class="value" x="{left + (wide - 3) / 2:.1f}" y="{top - 5:.1f}" text-anchor="middle">'
        f"{_short(value)}</text>"
    )


def _figure(title: str, told: str, colours: Mapping[str, int], y_label: str, inside: str, width: int) -> str:
    """The chart with its legend; `told` is what a reader who does not see it needs to know."""
    keys = "".join(
        f'<span class="key"><i style="background:{_colour(number)}"></i>{escape(name)}</span>'
        for name, number in colours.items()
    )
    return (
        f"<figure><figcaption>{escape(y_label)}<br>{keys}</figcaption>"
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title><desc>{escape(told)}</desc>{inside}</svg></figure>"
    )


def _grid(low: float, high: float, width: int) -> str:
    lines = []
    for value in _ticks(low, high):
        up = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>'
            f'<text x="{LEFT - 8}" y="{up + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    return "".join(lines)


def _x_axis(begin: float, end: float, label: str, width: int) -> str:
    texts = []
    for value in _ticks(begin, end):
        right = LEFT + (value - begin) / (end - begin) * (width - LEFT - RIGHT)
        texts.append(f'<text x="{right:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + width - RIGHT) / 2
    return "".join(texts) + f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Up to six multiples of 1, 2 or 5 times a power of ten, between `low` and `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= (high - low) / 5 * (1 - 1e-9))
    return [round(number * size, 12) for number in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _room(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _colour(number: int) -> str:
    return f"var(--c{number % COLOURS})"


def _dash(number: int) -> str:
    return DASHES[number % len(DASHES)]
