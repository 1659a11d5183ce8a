"""What is drawn where nobody watches: whole tables, whatever terminal there is not."""

import io

from rich.console import Console

from distill.display import print_table


def drawn(**settings):
    console = Console(file=io.StringIO(), **settings)
    print_table(console, "Latency", ["model", "ms at 32"], [["a" * 90, "0.553 (12.7x)"], ["b", "5.8 (1.0x)"]])
    return console.file.getvalue()


def test_a_table_in_a_file_is_whole(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "a" * 90 + "  0.553 (12.7x)\n" in drawn()
    assert max(map(len, drawn().splitlines())) == 105  # and no line is filled up


def test_what_is_drawn_next_has_the_width_of_before(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = Console(file=io.StringIO(), width=40)
    print_table(console, "", ["model"], [["a" * 90]])
    assert console.width == 40


def test_a_table_on_a_terminal_keeps_to_its_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert max(map(len, drawn(force_terminal=True, width=40, color_system=None).splitlines())) <= 40


def test_a_width_that_was_asked_for_is_kept(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, drawn().splitlines())) <= 60
