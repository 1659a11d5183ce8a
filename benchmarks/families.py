"""Graph passes on other families: is the shaped graph ever slower than the untouched one?

    python benchmarks/families.py --out results.json

Random weights, 4 layers, 384 wide, one thread, one sentence. Each family's graph as torch.onnx gives it, after the
passes for phones and browsers, after those for x86, and int8 of the first (quantize_dynamic) and of the others (ours).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = (16, 128)
WIDE: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
VOCABULARY = {"vocab_size": 5000, "num_labels": 2}
DEBERTA = {"relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("SequenceClassification", WIDE | VOCABULARY),
    "modernbert": ("SequenceClassification", WIDE | VOCABULARY | IDS | {"intermediate_size": 576}),
    "deberta-v2": ("SequenceClassification", WIDE | VOCABULARY | DEBERTA | {"type_vocab_size": 0}),
    "mpnet": ("SequenceClassification", WIDE | VOCABULARY),
    "albert": ("SequenceClassification", WIDE | VOCABULARY | {"embedding_size": 128}),
    "gpt2": (
        "SequenceClassification",
        VOCABULARY | {"n_embd": 384, "n_layer": 4, "n_head": 12, "n_positions": 256, "pad_token_id": 0},
    ),
    "t5": (
        "TokenClassification",
        VOCABULARY | {"d_model": 384, "d_ff": 1536, "num_layers": 4, "num_heads": 12, "d_kv": 32, "pad_token_id": 0},
    ),
    "vit": ("ImageClassification", WIDE | {"image_size": 176, "patch_size": 16, "num_labels": 2}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in arguments.families:
            files, fed = build(family, Path(folder))
            found[family] = {str(n): race(files, fed(n), arguments.rounds) for n in LENGTHS}
            for length, row in found[family].items():
                cells = [f"{name} {ms:.2f} ({row['untouched'] / ms:.2f}x)" for name, ms in row.items()]
                print(f"{family:11} {length:>4}  " + "  ".join(cells), flush=True)
    if arguments.out:
        from distill.files import write_json
        from distill.machine import describe_machine

        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(arguments.out, {"created": now, "machine": describe_machine(), "median_ms": found})


def build(family: str, folder: Path) -> tuple[dict[str, Path], Any]:
    """The files by name, and a function from a length to what they are fed."""
    import logging

    import torch
    import transformers
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from distill.candidates import machine_target
    from distill.export.graph import drop_unread_inputs, write
    from distill.export.passes import DEFAULT, FUSED, apply_passes
    from distill.export.quantize import quantize_int8

    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    kind, shape = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family, **shape)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    files = {}
    for name, passes in (("untouched", ()), ("phones", DEFAULT), ("x86", FUSED)):
        graph = traced(model, kind)
        changes = apply_passes(graph, passes)
        drop_unread_inputs(graph)
        files[name] = write(graph, folder / f"{family}-{name}.onnx", {}, changes).path
    eight = {f"{name} int8": folder / f"{family}-{name}8.onnx" for name in files}
    quantize_dynamic(files["untouched"], eight["untouched int8"], per_channel=True, weight_type=QuantType.QInt8)
    quantize_int8(files["phones"], eight["phones int8"], target="wasm")
    quantize_int8(files["x86"], eight["x86 int8"], target=machine_target())
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, 176, 176)).astype(np.float32)}
    return files | eight, (lambda length: pixels) if kind.startswith("Image") else text


def traced(model: Any, kind: str) -> Any:
    import torch

    from distill.export.graph import name_weights, trace
    from distill.tasks.base import GraphSpec

    if kind.startswith("Image"):
        model.set_attn_implementation("eager")
        program = torch.onnx.export(model, (torch.zeros(1, 3, 176, 176),), dynamo=True, verbose=False, opset_version=20)
        assert program is not None
        name_weights(program.model)
        return program.model
    axes = {0: "batch", 1: "length"}
    spec = GraphSpec(
        inputs=("input_ids", "attention_mask"),
        outputs=("logits",),
        axes={"input_ids": axes, "attention_mask": axes},
        head=lambda output: (output.logits,),
    )
    return trace(model, spec)


def text(length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(length).integers(3, 5000, (1, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def race(files: dict[str, Path], fed: dict[str, np.ndarray], rounds: int) -> dict[str, float]:
    """Median milliseconds by name; the files take turns."""
    import onnxruntime

    sessions = {}
    for name, path in files.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        sessions[name] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, session in sessions.items():
            given = {value.name: fed[value.name] for value in session.get_inputs()}
            for call in range(7):
                begin = time.perf_counter_ns()
                session.run(None, given)
                if call > 1:
                    times[name].append((time.perf_counter_ns() - begin) / 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


if __name__ == "__main__":
    main()
