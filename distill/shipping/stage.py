"""What the stages that ship have in common: which file, for which processor, made by which versions."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.candidates import machine_target
from distill.export.quantize import Target
from distill.run import Run
from distill.teacher import Checkpoint

LIBRARIES = ("distill", "torch", "transformers", "onnx", "onnxruntime", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run makes."""
    return {name: version(name) for name in LIBRARIES}


def shipped_file(run: Run, name: str) -> Path:
    """Where the graph is as it ships: as it was traced and quantised, or what it was cut into."""
    folder = run.work / "onnx"
    return (folder / "cut" if run.task.cut else folder) / f"{name}.onnx"


def target_of(run: Run) -> Target:
    """What the file is shaped for; this machine where the recipe leaves it open."""
    return machine_target() if run.recipe.export.target == "auto" else run.recipe.export.target


def settings_of(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """What was chosen for this model on validation data."""
    models = (run.ledger.facts("evaluate") or {})["models"]
    return dict(models["teacher" if checkpoint is run.teacher else "student"]["settings"])


def lengths_of(run: Run) -> list[int]:
    """The recipe's lengths, as far as the model takes them."""
    longest = run.longest
    if not run.task.stretches:
        return [longest]
    return [length for length in run.recipe.bench.lengths if length <= longest] or [longest]


def without_rows(facts: dict[str, Any]) -> dict[str, Any]:
    """Measures of a model without the texts it was measured on."""
    return {key: value for key, value in facts.items() if key != "disagreements"}


def stored_tables(run: Run) -> list[dict[str, Any]]:
    """How the file that ships keeps its embedding tables: name, bits, error and bytes of each."""
    steps = (run.ledger.facts("export") or {}).get("verification") or [{}]
    return list(steps[-1].get("tables") or [])


def embeddings_of(run: Run) -> str:
    """`int4` where the file that ships keeps the table of its tokens so, else nothing."""
    return "int4" if any(table["bits"] == 4 for table in stored_tables(run)) else ""
