"""The folder that ships: everything an app needs, whole or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distill.errors import BundleError
from distill.export.modelcard import model_card
from distill.export.ort_format import write_ort_files
from distill.export.pieces import bytes_of, files_of, renamed
from distill.export.runtime import FULL, QUANTIZED, Bundle, open_graph
from distill.export.sessions import Sums, sums_of
from distill.files import read_json, replace_folder, sha256_file, write_json, write_text
from distill.heads import HEADS, Text
from distill.heads.images import CONFIG

MANIFEST = "MANIFEST.json"
FORMAT = 1
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "merges.txt")
WRITING = "generation_config.json"


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle.

    Attributes:
        name: What it is called.
        task: Key of the tasks.
        labels: By class number.
        max_length: Tokens at most.
        fp32_onnx: The full-precision file.
        int8_onnx: The file that ships to apps.
        model_folder: Has `config.json` and the tokenizer's files.
        golden_texts: Texts whose ids and answers are kept as a proof.
        metrics: By role (teacher, student, student-int8 ...): metrics, retention, agreement, bytes.
        verification: What was checked when the files were made.
        recipe_toml: The resolved recipe.
        versions: Of the libraries that made it.
        data_source: Where the training data came from, for the model card.
        measured_on: `test` or `validation`: the data that `metrics` are of.
        beside: Further files of `model_folder` that other libraries read.
        weights: How the file that ships keeps its weights, as `export.weights` has it.
        prefix: What stands before every text.
        ort: Whether the int8 file is also written in ORT's own format, with the operators that a reduced build needs.
    """

    name: str
    task: str
    labels: Sequence[str]
    max_length: int
    fp32_onnx: Path
    int8_onnx: Path
    model_folder: Path
    golden_texts: Sequence[Text]
    metrics: Mapping[str, Any]
    verification: Sequence[Mapping[str, Any]]
    recipe_toml: str
    versions: Mapping[str, str]
    data_source: str = ""
    measured_on: str = "test"
    beside: Sequence[str] = ()
    ort: bool = False
    weights: str = "int8"
    prefix: str = ""


def write_bundle(folder: Path, contents: Contents) -> None:
    """Assembles a bundle beside `folder` and puts it in its place.

    Raises:
        BundleError: A file it needs is missing.
        OutputError: The disk is full.
    """
    replace_folder(folder, lambda new: _fill(new, contents))


def _fill(folder: Path, contents: Contents) -> None:
    (folder / "onnx").mkdir()
    for source, name in ((contents.fp32_onnx, FULL), (contents.int8_onnx, QUANTIZED)):
        for file, new in renamed(source, folder / name):
            shutil.copyfile(file, new)
    if contents.ort:
        x86 = open_graph(folder / QUANTIZED).metadata.get("distill.target", "").startswith("x86")
        write_ort_files(files_of(folder / QUANTIZED), folder / "onnx", x86=x86)
    reads = HEADS[contents.task].reads
    needed = ["config.json", *(TOKENIZER_FILES[:2] if "text" in reads else ()), *([CONFIG] if "image" in reads else ())]
    for name in dict.fromkeys((*needed, WRITING, *TOKENIZER_FILES)):
        source = contents.model_folder / name
        if source.is_file():
            shutil.copyfile(source, folder / name)
        elif name in needed:
            raise BundleError(f"{name} is missing", where=str(contents.model_folder), fix="Train the student again.")
    for name in contents.beside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(contents.model_folder / name, folder / name)
    if "text" in reads:
        _cut_at(folder / "tokenizer_config.json", contents.max_length)
    if contents.prefix:  # where transformers.js looks for what stands before each text
        write_json(folder / "config.json", {**(read_json(folder / "config.json") or {}), "prefix": contents.prefix})
    write_text(folder / "recipe.toml", contents.recipe_toml)
    bundle = Bundle.load(folder)
    if bundle.labels != list(contents.labels):
        raise BundleError(
            f"the graph's labels {bundle.labels[:4]} are not the model's {list(contents.labels)[:4]}",
            where=str(contents.int8_onnx),
            fix="Export it again.",
        )
    lines = [json.dumps(line, ensure_ascii=False) for line in golden_vectors(bundle, contents.golden_texts)]
    write_text(folder / "golden.jsonl", "\n".join(lines) + "\n")
    manifest = _manifest(folder, contents, bundle.model.metadata.get("distill.embeddings", ""))
    found = {sums_of(file, bundle.model.metadata) for file in files_of(folder / QUANTIZED)}
    sums: Sums = "inexact" if "inexact" in found else "on request" if "on request" in found else "exact"
    write_text(folder / "README.md", model_card(manifest, bundle.model.inputs, bundle.model.outputs, sums, bundle.side))
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, manifest)


def _cut_at(path: Path, max_length: int) -> None:
    """Tells clients that read `tokenizer_config.json` (transformers.js, transformers) where to cut a long text."""
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "model_max_length": max_length})


def golden_vectors(bundle: Bundle, texts: Sequence[Text]) -> list[dict[str, Any]]:
    """What the shipped file says of the first window of each text, asked one by one: text, ids and the head's proof."""
    vectors = []
    for text in texts:
        window = bundle.head.windows(bundle.reader, [text])[0][0]
        proof = {"ids": list(window.ids), bundle.head.proof: bundle.prove(window).astype(float).tolist()}
        vectors.append({**bundle.head.kept(text, window), **proof})
    return vectors


def _manifest(folder: Path, contents: Contents, embeddings: str) -> dict[str, Any]:
    sizes = {"fp32": bytes_of(folder / FULL), "int8": bytes_of(folder / QUANTIZED)}
    return {
        "format": FORMAT,
        "name": contents.name,
        "task": contents.task,
        "labels": list(contents.labels),
        "max_length": contents.max_length,
        **({"prefix": contents.prefix} if contents.prefix else {}),
        "pairs": bool(contents.golden_texts) and all(isinstance(text, tuple) for text in contents.golden_texts),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": dict(contents.versions),
        "data": contents.data_source,
        "measured_on": contents.measured_on,
        "weights": contents.weights,
        **({"embeddings": embeddings} if embeddings else {}),
        "onnx_bytes": sizes,
        "metrics": dict(contents.metrics),
        "verification": [dict(step) for step in contents.verification],
    }
