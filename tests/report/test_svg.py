from __future__ import annotations

import itertools
import math
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from distill.report.svg import bar_chart, line_chart, shares

SVG = "{http://www.w3.org/2000/svg}"


def drawn(figure: str) -> ElementTree.Element:
    """The svg element of a figure; a parse error if it is no XML."""
    begin, end = figure.index("<svg"), figure.index("</svg>") + len("</svg>")
    return ElementTree.fromstring(figure[begin:end])


def texts(svg: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in svg.iter(f"{SVG}text")]


def points(svg: ElementTree.Element) -> list[list[tuple[float, ...]]]:
    return [
        [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
        for line in svg.iter(f"{SVG}polyline")
    ]


def test_a_line_goes_through_its_points_and_stays_inside() -> None:
    svg = drawn(
        line_chart(
            {"a": [(0, 0.0), (1, 1.0), (2, 0.5)], "b": [(0, 1.0), (2, 0.0)]}, title="t", x_label="epoch", y_label="y"
        )
    )
    (low, high, middle), (top, bottom) = points(svg)
    assert low[0] < high[0] < middle[0]
    assert high[1] < middle[1] < low[1]  # up is less in SVG
    assert top[1] == high[1]
    assert bottom == pytest.approx((middle[0], low[1]))
    _, _, width, height = map(float, svg.get("viewBox", "").split())
    assert all(0 <= x <= width and 0 <= y <= height for line in points(svg) for x, y in line)
    assert texts(svg)[-1] == "epoch"
    assert svg.find(f"{SVG}title").text == "t"  # type: ignore[union-attr]


def test_ticks_are_round_numbers_within_the_data() -> None:
    svg = drawn(line_chart({"a": [(0, 0.81), (6, 0.93)]}, title="", x_label="x", y_label="y"))
    shown = [float(text) for text in texts(svg)[:-1]]
    assert {0.0, 2.0, 4.0, 6.0} <= set(shown) or {0.0, 6.0} <= set(shown)
    assert 0.9 in shown
    assert 2 <= len([value for value in shown if 0.8 < value < 0.95]) <= 7


@pytest.mark.parametrize(
    "series",
    [
        {"one": [(3.0, 0.5)]},
        {"flat": [(0.0, 0.0), (1.0, 0.0)]},
        {"upright": [(1.0, 0.0), (1.0, 5.0)]},
        {"negative": [(0.0, -5.0), (1.0, -1e-9)]},
        {"huge": [(0.0, 1e12), (1e9, 3e12)]},
        {"not finite": [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]},
    ],
    ids=lambda series: next(iter(series)),
)
def test_awkward_numbers_are_drawn(series: dict[str, list[tuple[float, float]]]) -> None:
    """A loss that is constant, a single evaluation, a loss that blew up: none may break the report."""
    svg = drawn(line_chart(series, title="t", x_label="x", y_label="y"))
    assert len(set(texts(svg))) == len(texts(svg)) or len(texts(svg)) > 3
    assert all(math.isfinite(value) for line in points(svg) for pair in line for value in pair)
    assert "nan" not in ElementTree.tostring(svg, encoding="unicode")


def test_nothing_to_draw_is_nothing() -> None:
    assert line_chart({}, title="t", x_label="x", y_label="y") == ""
    assert line_chart({"a": [], "b": [(0, math.nan)]}, title="t", x_label="x", y_label="y") == ""
    assert bar_chart({}, title="t", y_label="y") == ""
    assert bar_chart({"16": {}, "32": {"a": math.nan}}, title="t", y_label="y") == ""
    assert shares({}, unit="s") == ""


def test_a_name_keeps_its_colour_when_others_are_missing() -> None:
    """The student is blue in every chart of a report."""
    alone = line_chart({"teacher": [], "student": [(0, 1), (1, 2)]}, title="t", x_label="x", y_label="y")
    both = line_chart({"teacher": [(0, 1)], "student": [(0, 1), (1, 2)]}, title="t", x_label="x", y_label="y")
    assert 'background:var(--c1)"></i>student' in alone
    assert 'background:var(--c1)"></i>student' in both
    assert "teacher" not in alone


def test_bars_are_as_tall_as_their_values() -> None:
    svg = drawn(bar_chart({"16": {"a": 4.0, "b": 1.0}, "32": {"b": 2.0}}, title="t", y_label="ms"))
    bars = list(svg.iter(f"{SVG}rect"))
    heights = [float(bar.get("height", "")) for bar in bars]
    assert heights[0] / heights[1] == pytest.approx(4.0, rel=0.01)
    assert heights[2] / heights[1] == pytest.approx(2.0, rel=0.01)
    assert [bar.get("style") for bar in bars] == ["fill:var(--c0)", "fill:var(--c1)", "fill:var(--c1)"]
    assert {"16", "32", "4.00", "1.00", "2.00"} <= set(texts(svg))
    edges = [(float(bar.get("x", "")), float(bar.get("width", ""))) for bar in bars]
    assert all(left + wide <= right for (left, wide), (right, _) in itertools.pairwise(edges))


def test_bars_of_nothing() -> None:
    svg = drawn(bar_chart({"16": {"a": 0.0}}, title="t", y_label="ms"))
    assert [float(bar.get("height", "")) for bar in svg.iter(f"{SVG}rect")] == [0.0]


@pytest.mark.parametrize("bad", ["</svg><script>alert(1)</script>", '" onload="x', "a & b < c"])
def test_names_are_escaped(bad: str) -> None:
    for figure in (
        line_chart({bad: [(0, 1), (1, 2)]}, title=bad, x_label=bad, y_label=bad),
        bar_chart({bad: {bad: 1.0}}, title=bad, y_label=bad),
    ):
        svg = drawn(figure)
        assert svg.find(f"{SVG}title").text == bad  # type: ignore[union-attr]
        assert "<script" not in figure
    assert "<script" not in shares({bad: 1.0}, unit=bad)


def test_shares_are_as_long_as_their_values() -> None:
    class Widths(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name == "style"]

    parser = Widths()
    parser.found = []
    parser.feed(shares({"train": 200.0, "bench": 50.0, "none": 0.0, "odd": math.nan}, unit="s"))
    assert parser.found == ["width:100.0%", "width:25.0%", "width:0.0%"]


def test_what_cannot_be_seen_is_told() -> None:
    """The description has the numbers that the lines and bars have."""
    lines = drawn(line_chart({"a": [(0, 0.8), (1, 0.95), (2, 0.9)]}, title="t", x_label="epoch", y_label="y"))
    assert lines.find(f"{SVG}desc").text == "a: from 0.8 at 0 to 0.9 at 2, lowest 0.8, highest 0.95"  # type: ignore[union-attr]
    bars = drawn(bar_chart({"16": {"a": 4.0, "b": 1.0}, "32": {"b": 2.0}}, title="t", y_label="ms"))
    assert bars.find(f"{SVG}desc").text == "16: a 4.00, b 1.00; 32: b 2.00"  # type: ignore[union-attr]
