"""What a long step tells whoever waits for it. The command line draws it; a library caller may ignore it."""

from __future__ import annotations

from typing import Protocol, Self


class Stage(Protocol):
    """One long step under way; a context manager."""

    def advance(self, steps: int = 1) -> None:
        """`steps` more units of the stage's total are done."""

    def note(self, text: str) -> None:
        """A short fact to show beside the bar, such as `loss 0.31`; replaces the last one."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class Progress(Protocol):
    """Where stages are announced."""

    def stage(self, name: str, total: float | None = None, unit: str = "steps") -> Stage:
        """Begins a stage of `total` units (None: not known beforehand)."""

    def say(self, text: str) -> None:
        """One line that stays: a result, a decision, a warning."""

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """A small table that stays."""


class _SilentStage:
    def advance(self, steps: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Silent:
    def stage(self, name: str, total: float | None = None, unit: str = "steps") -> Stage:
        return _SilentStage()

    def say(self, text: str) -> None:
        pass

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        pass


SILENT: Progress = _Silent()
