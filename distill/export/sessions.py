"""How a graph is opened in ONNX Runtime: the same way wherever it answers, is measured or is timed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime

WIDE = ("arm64", "x86-vnni", "wasm")
"""Targets whose int8 weights go to -127 and 127 (`LARGEST` in `quantize`)."""

CPU = ["CPUExecutionProvider"]

PRECISE = "session.x64quantprecision"
"""ONNX Runtime's switch for x86 without VNNI: its products of u8 and s8 add pairs in 16 bits, where 2 * 255 * 127 does
not fit; with the switch weights become u8 on loading and sums are exact. With AMX it is not to be set: products of u8
do without AMX there, which makes six layers of 384 take 2.8 times as long."""

PRODUCT = (
    b'\x08\x05\x12\x00:b\n\x18\n\x01a\n\x01b\x12\x01y"\rMatMulInteger\x12\x01gZ\x15\n\x01a\x12\x10\n\x0e\x08\x02\x12\n\n\x03'
    b"\x12\x01m\n\x03\x12\x01kZ\x15\n\x01b\x12\x10\n\x0e\x08\x03\x12\n\n\x03\x12\x01k\n\x03\x12\x01nb\x15\n\x01y\x12\x10\n\x0e\x08"
    b"\x06\x12\n\n\x03\x12\x01m\n\x03\x12\x01nB\x04\n\x00\x10\n"
)
"""A graph of one MatMulInteger, a (m, k) u8 times b (k, n) s8: the base install has nothing to write one with."""

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


@cache
def overflows() -> bool:
    """Whether ONNX Runtime's products of u8 and s8 overflow on this machine; it is asked for the largest ones."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(PRODUCT, options, providers=CPU)
    large = {"a": np.full((4, 64), 255, np.uint8), "b": np.full((64, 16), 127, np.int8)}
    return bool((session.run(None, large)[0] != 64 * 255 * 127).any())


def open_session(
    model: str | Path | bytes, threads: int, metadata: Mapping[str, str], *, operators: str = ""
) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Args:
        model: A file, or its bytes.
        threads: Threads of a call; 0 leaves it to ONNX Runtime.
        metadata: The file's. One made for processors that keep exact sums is given them where `overflows` too, but if
            layers share their weights (ALBERT): ONNX Runtime 1.32 cannot make such weights u8, and refuses the file. A
            file that names no target runs as ONNX Runtime would run it.
        operators: A library of custom operators.
    """
    if metadata.get("distill.target") in WIDE and overflows():
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
