"""The one-file variant `onnx/model_text.onnx`: texts in, probabilities and labels out, no tokenizer beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from distill.errors import BundleError, VerificationError, needs_extra
from distill.export.bundle import MANIFEST
from distill.export.runtime import QUANTIZED, Bundle, inside
from distill.export.sessions import open_session
from distill.export.single_file import metadata_of, refuse_external_data
from distill.export.strings import odd_strings
from distill.export.text_graph import CONTRIB, Nodes, wordpiece
from distill.files import full_disk_is_an_error, json_lines, sha256_file, write_json
from distill.progress import SILENT, Progress

TEXT = "onnx/model_text.onnx"
STRINGS = 10_000
"""Odd strings whose ids must be the same before the file ships."""
CLOSE = 1e-4
"""Largest difference of a probability beside the same graph fed with ids."""
BATCH = 32


class TextModel:
    """`model_text.onnx` in ONNX Runtime, with the operators of onnxruntime-extensions.

    Args:
        model: A file, or the model's bytes.

    Raises:
        MissingExtraError: onnxruntime-extensions is not installed.
        BundleError: The file cannot be loaded.
    """

    def __init__(self, model: str | Path | bytes) -> None:
        try:
            from onnxruntime_extensions import get_library_path
        except ModuleNotFoundError:
            raise needs_extra("text", "onnxruntime-extensions") from None
        if not isinstance(model, bytes):
            refuse_external_data(Path(model))
        said = metadata_of(model if isinstance(model, bytes) else Path(model))
        try:
            self.session = open_session(model, 1, said, operators=get_library_path())
        except Exception as error:  # onnxruntime raises classes of its own, one a status code
            reason = " ".join(str(error).split())[:200]
            raise BundleError(f"ONNX Runtime cannot load the text model ({reason})", fix="Export it again.") from None
        self.outputs = [value.name for value in self.session.get_outputs()]

    def predict(self, texts: Sequence[str]) -> dict[str, Any]:
        """Every output for texts: `labels` (B,) strings, `probabilities` (B, C), `logits` (B, C), float32."""
        values = self.session.run(None, {"text": np.array(list(texts), object)})
        return dict(zip(self.outputs, values, strict=True))


def export_text(bundle: str | Path, *, strings: int = STRINGS, progress: Progress = SILENT) -> Path:
    """Adds `onnx/model_text.onnx` to a bundle, if it tokenizes as the bundle does, and lists it in its manifest.

    Args:
        bundle: Its folder; it classifies single texts, with a tokenizer of BERT's kind.
        strings: Odd strings to compare, beside the golden texts.
        progress: Told what is done.

    Returns:
        Path of the file.

    Raises:
        ExportError: Another kind of tokenizer.
        BundleError: A bundle for another task, for pairs, or without manifest.
        VerificationError: A text gets other ids or another answer.
        MissingExtraError: onnxruntime-extensions is not installed.
    """
    folder = Path(bundle)
    loaded = Bundle.load(folder)
    manifest = json.loads(inside(folder, MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("task") != "text-classification" or manifest.get("pairs"):
        kind = f"{manifest.get('task')}, {'pairs' if manifest.get('pairs') else 'single texts'}"
        raise BundleError(
            f"it is for {kind}; text models are made for text-classification of single texts",
            where=str(folder),
            fix="Ship the bundle as it is: its tokenizer runs beside the graph.",
        )
    if loaded.side == "left":
        raise BundleError(
            "its tokenizer keeps the end of a long text (truncation_side), a text model's keeps the beginning",
            where=str(folder),
            fix="Ship the bundle as it is: its tokenizer runs beside the graph.",
        )
    with progress.stage("Putting the tokenizer into the graph"):
        made = build_text_model(loaded, onnx.load(inside(folder, QUANTIZED)))
    lines = json_lines(inside(folder, "golden.jsonl"))
    golden = [line["text"] for line in lines if "text_pair" not in line]
    vocab = sorted(loaded.tokenizer.get_vocab())
    with progress.stage(f"Comparing {strings + len(golden):,} texts"):
        _refuse_other_ids(loaded, [*golden, *odd_strings(strings, vocab)])
        _refuse_other_answers(loaded, made, golden)
    path = folder / TEXT
    beside = folder.with_name(f"{folder.name}-{path.name}.writing")  # not inside: a bundle holds what it lists
    try:
        with full_disk_is_an_error(folder):
            beside.write_bytes(made.SerializeToString())
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    manifest["files"][TEXT] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    write_json(folder / MANIFEST, manifest)
    return path


def build_text_model(bundle: Bundle, model: ModelProto) -> ModelProto:
    """The bundle's tokenizer before its graph, and the most probable label behind it.

    Args:
        bundle: Whose tokenizer, padding and labels are taken.
        model: Its graph, which stays as it is.

    Raises:
        ExportError: The tokenizer is of a kind that does not fit into a graph.
    """
    front = _front(bundle, [value.name for value in model.graph.input])
    behind = Nodes(prefix="labels")
    best = behind("ArgMax", "probabilities", axis=1, keepdims=0)
    behind.name(behind("Gather", behind.value(bundle.labels), best), "labels")
    label = helper.make_tensor_value_info("labels", TensorProto.STRING, ["B"])
    whole = ModelProto()
    whole.CopyFrom(model)
    graph = whole.graph
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend([*front.nodes, *model.graph.node, *behind.nodes])
    graph.initializer.extend([*front.constants, *behind.constants])
    graph.input.append(_TEXTS)
    graph.output.extend([label, *model.graph.output])
    known = {entry.domain for entry in model.opset_import}
    whole.opset_import.extend(entry for entry in _OPERATORS if entry.domain not in known)
    return whole


def build_token_model(bundle: Bundle) -> ModelProto:
    """The tokenizer alone: texts in; `input_ids` and `attention_mask` out, (B, L) int64."""
    names = ["input_ids", "attention_mask"]
    front = _front(bundle, names)
    outputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["B", "L"]) for name in names]
    graph = helper.make_graph(front.nodes, "tokens", [_TEXTS], outputs, initializer=front.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), *_OPERATORS], ir_version=10)


_TEXTS = helper.make_tensor_value_info("text", TensorProto.STRING, ["B"])
_OPERATORS = (helper.make_opsetid("ai.onnx.ml", 3), helper.make_opsetid(CONTRIB, 1))


def _front(bundle: Bundle, inputs: Sequence[str]) -> Nodes:
    """Nodes from `text` to the inputs of a graph."""
    rows = [{"input_ids": ids, "token_type_ids": ids} for ids in ([], [1])]
    padding = int(bundle.pad(rows)["input_ids"][0, 0])
    node, made = wordpiece(bundle.tokenizer, "text", bundle.max_length, padding)
    for name in inputs:
        node.name(made[name], name)
    return node


def other_ids(bundle: Bundle, model: ModelProto, texts: Sequence[str]) -> list[str]:
    """The texts to which a token model gives other ids than the bundle's tokenizer, asked in batches."""
    asked = TextModel(model.SerializeToString())
    other = []
    for begin in range(0, len(texts), BATCH):
        some = texts[begin : begin + BATCH]
        wanted = bundle.pad(bundle.encode(some))
        found = asked.predict(some)
        if all(np.array_equal(found[name], wanted[name]) for name in found):
            continue
        for text in some:
            ids = asked.predict([text])["input_ids"].tolist()
            other += [text] if ids != [bundle.encode([text])[0]["input_ids"]] else []
    return other


def _refuse_other_ids(bundle: Bundle, texts: Sequence[str]) -> None:
    other = other_ids(bundle, build_token_model(bundle), texts)
    if other:
        shown = ", ".join(repr(text[:40]) for text in other[:3])
        raise VerificationError(
            f"in the graph {len(other)} of {len(texts)} texts get other tokens, such as {shown}",
            where=str(bundle.folder),
            fix="Ship the bundle as it is: its tokenizer runs beside the graph.",
        )


def _refuse_other_answers(bundle: Bundle, model: ModelProto, texts: Sequence[str]) -> None:
    asked = TextModel(model.SerializeToString())
    for text in texts:
        ours, found = bundle(text), asked.predict([text])
        wanted = [ours.probabilities[label] for label in bundle.labels]
        moved = float(np.abs(found["probabilities"][0] - wanted).max())
        if not moved <= CLOSE or found["labels"][0] != ours.label:
            raise VerificationError(
                f"the text model answers {text[:40]!r} with {found['labels'][0]!r}, the bundle with {ours.label!r} "
                f"(probabilities differ by {moved:.4f})",
                where=str(bundle.folder),
                fix="Export it again.",
            )
