"""Two small charts as inline SVG: no script, no font, no file beside the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#0b6e99", "#c2571a", "#5b7f2b", "#8a5aa8")
"""Told apart by people who see no red or no green, on white and on black (after Okabe and Ito)."""

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 34

Points = Sequence[tuple[float, float]]


def line_chart(series: Mapping[str, Points], *, title: str, x_label: str, y_label: str) -> str:
    """One line a series, each named at its end in the legend above.

    Args:
        series: (x, y) points by name, in the order of x; empty ones are left out.
        title: What a screen reader says.
        x_label: Below the axis, with its unit.
        y_label: In the legend, with its unit.
    """
    drawn = {name: list(points) for name, points in series.items() if points}
    if not drawn:
        return ""
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    low, high = _room(min(ys), max(ys))
    begin, end = min(xs), max(max(xs), min(xs) + 1e-9)

    def place(x: float, y: float) -> str:
        right = LEFT + (x - begin) / (end - begin) * (WIDTH - LEFT - RIGHT)
        up = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{right:.1f},{up:.1f}"

    parts = [_grid(low, high), _x_axis(begin, end, x_label)]
    for colour, (_name, points) in zip(_colours(len(drawn)), drawn.items(), strict=True):
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        last = place(*points[-1]).split(",")
        parts.append(f'<circle cx="{last[0]}" cy="{last[1]}" r="3.5" fill="{colour}"/>')
    return _figure(title, list(drawn), y_label, "".join(parts))


def bar_chart(groups: Mapping[str, Mapping[str, float]], *, title: str, y_label: str) -> str:
    """Bars beside each other in each group, their values above them.

    Args:
        groups: Value by series by group, such as `{"16 tokens": {"teacher": 3.7, "student": 0.6}}`.
        title: What a screen reader says.
        y_label: In the legend, with its unit.
    """
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    if not names:
        return ""
    highest = max(value for values in groups.values() for value in values.values()) * 1.12 or 1.0
    room = (WIDTH - LEFT - RIGHT) / len(groups)
    bar = min(44.0, room * 0.8 / len(names))
    parts = [_grid(0.0, highest)]
    for place, (group, values) in enumerate(groups.items()):
        middle = LEFT + (place + 0.5) * room
        parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">{escape(group)}</text>')
        for index, name in enumerate(names):
            if name not in values:
                continue
            left = middle + (index - len(names) / 2) * bar
            tall = values[name] / highest * (HEIGHT - TOP - BOTTOM)
            top = HEIGHT - BOTTOM - tall
            colour = _colours(len(names))[index]
            centre, value = left + bar / 2 - 1, _short(values[name])
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{bar - 2:.1f}" height="{tall:.1f}" fill="{colour}"/>'
                f'<text x="{centre:.1f}" y="{top - 4:.1f}" text-anchor="middle">{value}</text>'
            )
    return _figure(title, names, y_label, "".join(parts))


def _figure(title: str, names: Sequence[str], y_label: str, inside: str) -> str:
    keys = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>'
        for colour, name in zip(_colours(len(names)), names, strict=True)
    )
    return (
        f"<figure><figcaption>{escape(y_label)} {keys}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{inside}</svg></figure>"
    )


def _grid(low: float, high: float) -> str:
    lines = []
    for value in _ticks(low, high):
        up = HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        lines.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>'
            f'<text x="{LEFT - 6}" y="{up + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    return "".join(lines)


def _x_axis(begin: float, end: float, label: str) -> str:
    texts = []
    for value in _ticks(begin, end):
        right = LEFT + (value - begin) / (end - begin) * (WIDTH - LEFT - RIGHT)
        texts.append(f'<text x="{right:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    return "".join(texts) + f'<text x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(label)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Up to six multiples of 1, 2 or 5 times a power of ten, between `low` and `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= (high - low) / 5)
    return [round(number * size, 12) for number in range(math.ceil(low / size), math.floor(high / size) + 1)]


def _room(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _colours(count: int) -> tuple[str, ...]:
    return tuple(COLOURS[index % len(COLOURS)] for index in range(count))
