"""What each command loads: the base install has no torch, and a person waits for every import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "transformers", "datasets", "onnx", "onnx_ir", "onnxscript", "sklearn", "pyarrow", "jinja2", "pandas"}
ASKED = "import sys; sys.argv = ['distill', *sys.argv[1:]]\nfrom distill.cli import main\n"
TOLD = "print('LOADED', *sorted({name.split('.')[0] for name in sys.modules}))\n"
RUN = "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
PROGRAM = ASKED + RUN + TOLD


def loaded(*command: str, program: str = PROGRAM) -> set[str]:
    """Top-level names of the modules that a process has at its end."""
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED ")[2].split())


def test_importing_the_package_loads_nothing_of_others() -> None:
    names = loaded(program=f"import sys\nimport distill\n{TOLD}")
    assert not names & (HEAVY | {"numpy", "onnxruntime", "tokenizers", "pydantic", "typer", "rich"})


def test_errors_of_a_bundle_cost_no_torch() -> None:
    names = loaded(program=f"import sys\nimport distill.errors, distill.recipe, distill.cards, distill.machine\n{TOLD}")
    assert not names & (HEAVY | {"onnxruntime"})


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["compress", "--help"], ["student", "--help"]])
def test_help_loads_no_library_that_computes(command: list[str]) -> None:
    assert not loaded(*command) & (HEAVY | {"numpy", "onnxruntime", "tokenizers"})


def test_predict_loads_what_answering_needs(tiny_bundle: Path) -> None:
    names = loaded("predict", str(tiny_bundle), "where is my card")
    assert {"numpy", "onnxruntime", "tokenizers"} <= names
    assert not names & HEAVY


def test_verify_loads_no_torch(tiny_bundle: Path) -> None:
    assert not loaded("verify", str(tiny_bundle)) & HEAVY


def test_bench_of_onnx_files_loads_no_torch(tiny_bundle: Path) -> None:
    command = ["bench", str(tiny_bundle), "--lengths", "8", "--runs", "3"]
    assert not loaded(*command) & HEAVY


def test_student_list_loads_no_torch() -> None:
    assert not loaded("student", "list") & HEAVY
