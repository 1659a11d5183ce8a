"""How a graph is opened in ONNX Runtime: the same way wherever it answers, is measured or is timed."""

from __future__ import annotations

from collections.abc import Mapping

import onnxruntime

WIDE = ("arm64", "x86-vnni", "wasm")
"""Targets whose int8 weights go to -127 and 127 (`LARGEST` in `quantize`)."""

PRECISE = "session.x64quantprecision"
"""ONNX Runtime's switch for x86 without VNNI: its products of u8 and s8 add pairs in 16 bits, where 2 * 255 * 127 does
not fit; with the switch weights become u8 on loading and sums are exact. Processors with VNNI and Arm ignore it."""


def session_options(threads: int, metadata: Mapping[str, str]) -> onnxruntime.SessionOptions:
    """Options of a session on the CPU.

    Args:
        threads: Threads of a call; 0 leaves it to ONNX Runtime.
        metadata: The file's. One made for processors that keep exact sums is given them on all others too; a file that
            names no target runs as ONNX Runtime would run it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if threads == 1:  # nothing to spin for: an idle app should not hold a core
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if metadata.get("distill.target") in WIDE:
        options.add_session_config_entry(PRECISE, "1")
    return options
