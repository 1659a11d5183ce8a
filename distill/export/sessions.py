"""How a graph is opened in ONNX Runtime: the same way wherever it answers, is measured or is timed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import onnxruntime

WIDE = ("arm64", "x86-vnni", "wasm")
"""Targets whose int8 weights go to -127 and 127 (`LARGEST` in `quantize`)."""

CPU = ["CPUExecutionProvider"]

PRECISE = "session.x64quantprecision"
"""ONNX Runtime's switch for x86 without VNNI: its products of u8 and s8 add pairs in 16 bits, where 2 * 255 * 127 does
not fit; with the switch weights become u8 on loading and sums are exact. Processors with VNNI and Arm ignore it."""

SHARED = "Attempt to replace the existing tensor"
"""What it says where the switch meets weights that several products share."""


Sums = Literal["exact", "on request", "inexact"]
"""What a file's products of bytes are on x86 without VNNI: right in any case, with `PRECISE`, or not at all."""
MULTIPLY = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger")


def sums_of(path: Path, metadata: Mapping[str, str]) -> Sums:
    """What other programs have to know of a file that they open on x86 without VNNI.

    Args:
        path: An ONNX file.
        metadata: Its own, or that of the file beside it that speaks for both.
    """
    import onnx_ir as ir  # of the train extra, which whoever writes a bundle has

    graphs = [ir.load(path).graph] if metadata.get("distill.target") in WIDE else []
    weights = [
        node.inputs[1]
        for graph in graphs
        for node in ir.traversal.RecursiveGraphIterator(graph)
        if node.op_type in MULTIPLY
    ]
    if not weights:
        return "exact"
    return "inexact" if len(set(weights)) < len(weights) else "on request"


def open_session(
    model: str | Path | bytes, threads: int, metadata: Mapping[str, str], *, operators: str = ""
) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        model: A file, or its bytes.
        threads: Threads of a call; 0 leaves it to ONNX Runtime.
        metadata: The file's. One made for processors that keep exact sums is given them on all others too, but where
            layers share their weights (ALBERT): ONNX Runtime 1.32 cannot make such weights u8, and refuses the file. A
            file that names no target runs as ONNX Runtime would run it.
        operators: A library of custom operators.
    """
    if metadata.get("distill.target") in WIDE:
        try:
            return onnxruntime.InferenceSession(model, _options(threads, operators, exact=True), providers=CPU)
        except Exception as error:  # onnxruntime raises classes of its own, one a status code
            if SHARED not in str(error):
                raise
    return onnxruntime.InferenceSession(model, _options(threads, operators), providers=CPU)


def _options(threads: int, operators: str, *, exact: bool = False) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4 if exact else 3  # what is refused there is opened again, or raised
    if threads == 1:  # nothing to spin for: an idle app should not hold a core
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if exact:
        options.add_session_config_entry(PRECISE, "1")
    if operators:
        options.register_custom_ops_library(operators)
    return options
