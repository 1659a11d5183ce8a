"""What this machine is, and what this process takes of it: facts that a measurement means nothing without."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

USEFUL_FLAGS = (
    *("sse4_2", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
"""Instruction sets that decide how fast int8 and bf16 run, on x86 and on Arm."""

ARM_MAKERS = {"0x41": "Arm", "0x42": "Broadcom", "0x48": "HiSilicon", "0x4e": "Nvidia", "0x51": "Qualcomm"}
ARM_PARTS: dict[str, str] = {}
ARM_PARTS |= {"0xd03": "Cortex-A53", "0xd05": "Cortex-A55", "0xd07": "Cortex-A57", "0xd08": "Cortex-A72"}
ARM_PARTS |= {"0xd0b": "Cortex-A76", "0xd0c": "Neoverse-N1", "0xd40": "Neoverse-V1", "0xd41": "Cortex-A78"}
ARM_PARTS |= {"0xd44": "Cortex-X1", "0xd46": "Cortex-A510", "0xd47": "Cortex-A710", "0xd48": "Cortex-X2"}
ARM_PARTS |= {"0xd49": "Neoverse-N2", "0xd4d": "Cortex-A715", "0xd4e": "Cortex-X3", "0xd4f": "Neoverse-V2"}
"""`CPU part` of an Arm core to its name: Linux on Arm gives no model name (Arm's Main ID Register, MIDR_EL1)."""

CPUINFO = Path("/proc/cpuinfo")
"""Linux alone has it; elsewhere the flags are not told."""


def describe_machine() -> dict[str, Any]:
    """What a measurement depends on, as JSON values.

    Returns:
        `cpu` (model), `flags` (those of `USEFUL_FLAGS` it has), `cores` (that this process may use), `cpu_limit` (as
        many cores' time as a container allows, None without a limit), `memory_bytes`, `governor` (of the frequency,
        None where it is not told), `os`, `python`.
    """
    model, flags = parse_cpuinfo(_read("/proc/cpuinfo"))
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "flags": [flag for flag in USEFUL_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "cpu_limit": parse_cpu_limit(_read("/sys/fs/cgroup/cpu.max")),
        "memory_bytes": _memory(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def parse_cpuinfo(text: str) -> tuple[str, set[str]]:
    """Model and flags from Linux's /proc/cpuinfo; both empty where the text tells neither.

    A phone has several kinds of core: each is named once, in the order of the file.
    """
    models: dict[str, None] = {}
    flags: set[str] = set()
    maker = ""
    for line in text.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            models[value] = None
        elif key == "CPU implementer":
            maker = ARM_MAKERS.get(value, value)
        elif key == "CPU part":
            models[f"{maker} {ARM_PARTS.get(value, value)}"] = None
        elif key in ("flags", "Features"):
            flags |= set(value.split())
    return " + ".join(models), flags


def parse_cpu_limit(text: str) -> float | None:
    """Cores' worth of time from cgroup v2's cpu.max, `QUOTA PERIOD` in microseconds; None for `max`, no limit."""
    quota, _, period = text.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def load_average() -> float | None:
    """Processes that ran or waited to run, averaged over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where neither the kernel nor psutil tells."""
    told = _status("VmRSS")
    return told if told is not None else _psutil("rss")


def peak_bytes() -> int | None:
    """The most memory that this process has held; None where nothing tells.

    Linux's VmHWM first: it begins anew with the program, `ru_maxrss` still holds what the parent had when it forked.
    """
    told = _status("VmHWM")
    if told is None:
        told = _psutil("peak_wset")  # Windows
    if told is None and sys.platform == "darwin":
        import resource

        told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes there, kilobytes elsewhere
    return told


def _status(key: str) -> int | None:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _psutil(key: str) -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return getattr(psutil.Process().memory_info(), key, None)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return _total_by_psutil()


def _total_by_psutil() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)
