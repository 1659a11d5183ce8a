"""Where a graph is: one file, or two for an encoder and a decoder, under the names that clients look for."""

from __future__ import annotations

from pathlib import Path


def pieces(path: Path) -> tuple[Path, Path]:
    """What stands for `model_quantized.onnx`: `encoder_model_quantized.onnx`, `decoder_model_merged_quantized.onnx`."""
    decoder = f"decoder_{path.name}".replace("decoder_model", "decoder_model_merged", 1)
    return path.with_name(f"encoder_{path.name}"), path.with_name(decoder)


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of a graph: the path itself, or its pieces where there is no such file but those."""
    found = pieces(path)
    return found if not path.exists() and found[1].exists() else (path,)


def bytes_of(path: Path) -> int:
    """Bytes of all files of a graph."""
    return sum(file.stat().st_size for file in files_of(path))
