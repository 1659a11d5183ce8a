"""What this machine is: facts that a measurement means nothing without."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

USEFUL_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""Instruction sets that decide how fast int8 and bf16 run, on x86 and on Arm."""


def describe_machine() -> dict[str, Any]:
    """CPU model and the flags that matter, cores this process may use, memory in bytes, operating system."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "flags": [flag for flag in USEFUL_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": _memory(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu() -> tuple[str, set[str]]:
    model = platform.processor() or platform.machine()
    flags: set[str] = set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return model, flags
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            model = value
        if key in ("flags", "Features"):
            flags = set(value.split())
    return model, flags


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
