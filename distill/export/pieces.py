"""Where a graph is: one file, or two for an encoder and a decoder, or for texts and images, under clients' names."""

from __future__ import annotations

from pathlib import Path


def pieces(path: Path) -> tuple[Path, Path]:
    """What stands for `model_quantized.onnx`: `encoder_model_quantized.onnx`, `decoder_model_merged_quantized.onnx`."""
    decoder = f"decoder_{path.name}".replace("decoder_model", "decoder_model_merged", 1)
    return path.with_name(f"encoder_{path.name}"), path.with_name(decoder)


def towers(path: Path) -> tuple[Path, Path]:
    """What stands for `model_quantized.onnx`: `text_model_quantized.onnx` and `vision_model_quantized.onnx`."""
    return path.with_name(f"text_{path.name}"), path.with_name(f"vision_{path.name}")


def files_of(path: Path) -> tuple[Path, ...]:
    """The files of a graph: the path itself, or its pieces where there is no such file but those."""
    if path.exists():
        return (path,)
    return next((found for found in (pieces(path), towers(path)) if found[1].exists()), (path,))


def renamed(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Each file of one graph with the name that it has beside another."""
    files = files_of(source)
    ways = {1: (target,), 2: (towers if files == towers(source) else pieces)(target)}
    return list(zip(files, ways[len(files)], strict=True))


def bytes_of(path: Path) -> int:
    """Bytes of all files of a graph."""
    return sum(file.stat().st_size for file in files_of(path))
