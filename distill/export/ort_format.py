"""ORT's own file format and the list of operators that a reduced ONNX Runtime build needs for it.

    write_ort("model_quantized.onnx", "phone")

A reduced build cannot read .onnx, and holds the operators of the list alone: it is a few megabytes instead of twenty.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from distill.errors import ExportError, first_line
from distill.files import write_text

CONFIG = "required_operators.config"


@dataclass(frozen=True)
class OrtFile:
    """A written .ort file.

    Attributes:
        path: Where it is.
        bytes: Its size.
        config: What `build.sh --include_ops_by_config` takes.
        operators: What all files of the list need, `domain;opset;names` a line.
    """

    path: Path
    bytes: int
    config: Path
    operators: tuple[str, ...]


def write_ort(onnx_path: str | Path, folder: str | Path, *, x86: bool = False) -> OrtFile:
    """Writes `NAME.ort` and `required_operators.config` for an ONNX file, and opens what was written.

    The graph is optimised on this machine, once and for all: what ONNX Runtime would do to it on loading is done.

    Args:
        onnx_path: An exported file, of whatever precision.
        folder: Where the two files go.
        x86: Whether it is made for x86 alone: optimisations that no other processor, and no browser, has are let in.

    Raises:
        ExportError: ONNX Runtime cannot convert the file.
    """
    return write_ort_files([onnx_path], folder, x86=x86)[0]


def write_ort_files(onnx_paths: Sequence[str | Path], folder: str | Path, *, x86: bool = False) -> list[OrtFile]:
    """`write_ort` of files that ship together, such as an encoder and its decoder: one list of operators for all.

    Args:
        onnx_paths: As there.
        folder: As there.
        x86: As there.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    made = [_convert(Path(path), target, x86) for path in onnx_paths]
    needed: dict[str, set[str]] = {}
    for _, lines in made:
        for line in lines:
            opset, _, names = line.rpartition(";")
            needed.setdefault(opset, set()).update(names.split(","))
    operators = tuple(f"{opset};{','.join(sorted(names))}" for opset, names in sorted(needed.items()))
    write_text(target / CONFIG, "\n".join(operators) + "\n")
    return [OrtFile(path, path.stat().st_size, target / CONFIG, operators) for path, _ in made]


def _convert(source: Path, target: Path, x86: bool) -> tuple[Path, list[str]]:
    """The .ort file in `target`, and its operators as the tool lists them: `domain;opset;names`."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    path = target / source.with_suffix(".ort").name
    with tempfile.TemporaryDirectory(dir=target, prefix=".ort-") as made:
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves the file it has read open
                convert_onnx_models_to_ort(
                    source, Path(made), [OptimizationStyle.Fixed], target_platform="amd64" if x86 else "arm"
                )
        except Exception as error:  # the tool raises whatever the runtime does
            raise ExportError(
                f"ONNX Runtime cannot convert it: {first_line(error)}",
                where=str(source),
                fix=f"Ship the .onnx file, or convert it with another onnxruntime than {onnxruntime.__version__}.",
            ) from error
        (found,) = Path(made).glob("*.ort")
        onnxruntime.InferenceSession(str(found), providers=["CPUExecutionProvider"])
        os.replace(found, path)
        (listed,) = Path(made).glob("*.config")
        lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    return path, [line for line in lines if line and not line.startswith(("#", "!"))]
