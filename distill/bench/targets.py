"""What can be measured: ONNX files, bundles and PyTorch checkpoints, told apart by what lies at the path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from distill.errors import BundleError, needs_extra
from distill.export.pieces import bytes_of, files_of

QUANTIZED = Path("onnx/model_quantized.onnx")


@dataclass(frozen=True)
class Target:
    """A model to measure.

    Attributes:
        name: Short and unique.
        path: What is loaded: an ONNX file, or a folder with a PyTorch checkpoint.
        format: `ONNX` or `PyTorch`.
        bytes: Of the file, or of the checkpoint's weights.
        load_ms: From the file to a session that answers, the median over fresh processes.
        memory_bytes: Peak of its process above what the libraries alone take; None where the system does not tell.
        threads: Threads of the session that `load_ms` and `memory_bytes` were measured with.
    """

    name: str
    path: str
    format: str
    bytes: int
    load_ms: float | None = None
    memory_bytes: int | None = None
    threads: int = 1


def find_targets(paths: Sequence[str | Path]) -> list[Target]:
    """The models at the paths, in order, each with a name that tells it from the others.

    Raises:
        BundleError: A path is not there, or holds nothing that can be measured.
        MissingExtraError: A PyTorch checkpoint without torch.
    """
    if not paths:
        raise BundleError(
            "there is nothing to measure", where="bench", fix="Name at least one ONNX file, bundle or checkpoint."
        )
    found = [_recognise(Path(path)) for path in paths]
    names = short_names([os.path.abspath(path) for path in paths])  # `.` has a name too
    return [Target(name, *facts) for name, facts in zip(names, found, strict=True)]


def _recognise(path: Path) -> tuple[str, str, int]:
    """Path to load, format and bytes."""
    for graph in (path, path / QUANTIZED):
        if graph.suffix == ".onnx" and all(file.is_file() for file in files_of(graph)):
            return str(graph), "ONNX", bytes_of(graph)
    weights = list(path.glob("model*.safetensors"))
    if (path / "config.json").is_file() and weights:
        if find_spec("torch") is None or find_spec("transformers") is None:
            raise needs_extra("train", "torch")
        return str(path), "PyTorch", sum(file.stat().st_size for file in weights)
    raise _no_target(path)


def _no_target(path: Path) -> BundleError:
    fix = "Give FILE.onnx, a bundle's folder, or a folder with config.json and model.safetensors."
    if not path.exists():
        return BundleError("is not there", where=str(path), fix=fix)
    inside = sorted(str(file.relative_to(path)) for file in (*path.glob("*.onnx"), *path.glob("onnx/*.onnx")))
    if inside:
        fix = f"It holds {', '.join(inside[:3])}: name the file."
    elif list(path.glob("*.bin")):
        fix = "Its weights are pickled, which can run code: save them as safetensors first."
    return BundleError("is neither an ONNX file, nor a bundle, nor a PyTorch checkpoint", where=str(path), fix=fix)


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest endings of the paths that tell them apart; a path that comes twice is numbered."""
    names = [Path(path).parts[-1:] for path in paths]
    for size in range(2, max(len(Path(path).parts) for path in paths) + 1):
        doubled = {name for name in names if names.count(name) > 1}
        names = [Path(path).parts[-size:] if name in doubled else name for path, name in zip(paths, names, strict=True)]
    shown = [str(Path(*name)) for name in names]
    return [
        name if shown.count(name) == 1 else f"{Path(name).name} #{shown[: number + 1].count(name)}"
        for number, name in enumerate(shown)
    ]
