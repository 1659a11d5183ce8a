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
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from distill.errors import ExportError

CONFIG = "required_operators.config"


@dataclass(frozen=True)
class OrtFile:
    """A written .ort file.

    Attributes:
        path: Where it is.
        bytes: Its size.
        config: What `build.sh --include_ops_by_config` takes.
        operators: What it needs, `domain;opset;names` a line.
    """

    path: Path
    bytes: int
    config: Path
    operators: tuple[str, ...]


def write_ort(onnx_path: str | Path, folder: str | Path, *, arm: bool = True) -> OrtFile:
    """Writes `NAME.ort` and `required_operators.config` for an ONNX file, and opens what was written.

    The graph is optimised on this machine, once and for all: what ONNX Runtime would do to it on loading is done.

    Args:
        onnx_path: An exported file, of whatever precision.
        folder: Where the two files go.
        arm: Whether it is made for Arm processors; for others, optimisations that only x86 has are let in.

    Raises:
        ExportError: ONNX Runtime cannot convert the file.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    source, target = Path(onnx_path), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    path, config = target / source.with_suffix(".ort").name, target / CONFIG
    with tempfile.TemporaryDirectory(dir=target, prefix=".ort-") as made:
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves the file it has read open
                convert_onnx_models_to_ort(
                    source, Path(made), [OptimizationStyle.Fixed], target_platform="arm" if arm else "amd64"
                )
        except Exception as error:  # the tool raises whatever the runtime does
            raise ExportError(
                f"ONNX Runtime cannot convert it: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                where=str(source),
                fix=f"Ship the .onnx file, or convert it with another onnxruntime than {onnxruntime.__version__}.",
            ) from error
        (found,) = Path(made).glob("*.ort")
        onnxruntime.InferenceSession(str(found), providers=["CPUExecutionProvider"])
        os.replace(found, path)
        (listed,) = Path(made).glob("*.config")
        os.replace(listed, config)
    lines = [line.strip() for line in config.read_text(encoding="utf-8").splitlines()]
    operators = tuple(line for line in lines if line and not line.startswith(("#", "!")))
    return OrtFile(path, path.stat().st_size, config, operators)
