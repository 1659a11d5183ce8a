"""Every error a person can meet, each one line: where it is, what is wrong, what to do.

DistillError              exit code 1
├── MissingExtraError     2   an optional dependency is not installed
├── RecipeError           3   the recipe, all of its problems at once
├── CardError             4   a teacher or student card
├── DataError             5   files, columns, rows, labels
├── TeacherError          6   loading, labels, tokenizer, score floor
├── CacheError            7   the teacher cache
├── StudentError          8   a shape that cannot be built, a vocabulary that cannot be trimmed
├── ObjectiveError        9   losses, layer maps, projections, missing features
├── TrainingError        10   a loss that is not finite, a checkpoint that does not fit
├── ExportError          11   the ONNX graph and its quantisation
├── VerificationError    12   a file that does not answer as it should
├── BundleError          13   a bundle that is incomplete, changed or unsafe
└── OutputError          14   an output folder that holds other work, a full disk
"""

from __future__ import annotations


class DistillError(Exception):
    """A problem that the person can mend.

    Args:
        what: What is wrong, with the value that is wrong.
        where: The file, row, key or option in question; may be empty.
        fix: One sentence that says what to do; may be empty.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        sentence = self.what if self.what.endswith((".", "!", "?")) else f"{self.what}."
        return " ".join(f"{place}{sentence} {self.fix}".split())


class MissingExtraError(DistillError):
    """A command needs packages that the base install leaves out."""

    exit_code = 2


class RecipeError(DistillError, ValueError):
    """A recipe that cannot be used. `problems` holds one line for each thing wrong with it."""

    exit_code = 3

    def __init__(self, problems: list[str], *, where: str = "recipe") -> None:
        self.problems = problems
        super().__init__("; ".join(problems), where=where)


class CardError(DistillError, ValueError):
    """A teacher or student card that is missing or does not hold what it must."""

    exit_code = 4


class DataError(DistillError, ValueError):
    """Data that cannot be read, or rows that make no sense."""

    exit_code = 5


class TeacherError(DistillError):
    """A teacher that cannot be loaded, matched to the labels, or trusted."""

    exit_code = 6


class CacheError(DistillError):
    """A teacher cache that cannot be written or read."""

    exit_code = 7


class StudentError(DistillError, ValueError):
    """A student that cannot be built from this card and this teacher."""

    exit_code = 8


class ObjectiveError(DistillError, ValueError):
    """An objective that cannot be computed for this teacher and this student."""

    exit_code = 9


class TrainingError(DistillError):
    """Training that cannot go on."""

    exit_code = 10


class ExportError(DistillError):
    """An ONNX graph that cannot be made."""

    exit_code = 11


class VerificationError(DistillError):
    """A file that does not answer as the model it came from."""

    exit_code = 12


class BundleError(DistillError):
    """A bundle that is incomplete, altered or unsafe to load."""

    exit_code = 13


class OutputError(DistillError):
    """An output folder that cannot be used."""

    exit_code = 14


def first_line(error: BaseException) -> str:
    """What an error of another package says first, up to 200 characters; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def needs_extra(extra: str, missing: str) -> MissingExtraError:
    """The error for a package that `pip install "distill[extra]"` brings.

    Args:
        extra: The extra's name in pyproject.toml, such as `train`.
        missing: The package that could not be imported.
    """
    return MissingExtraError(
        f"this needs {missing}, which the base install leaves out",
        fix=f'Run: pip install "distill[{extra}]"',
    )
