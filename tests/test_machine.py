"""The facts of this machine, against what the kernel says."""

import errno
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from distill.machine import (
    USEFUL_FLAGS,
    describe_machine,
    load_average,
    parse_cpu_limit,
    parse_cpuinfo,
    peak_bytes,
    resident_bytes,
)

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Gold 6348 CPU @ 2.60GHz
flags\t\t: fpu avx2 avx512f avx512_vnni

processor\t: 1
model name\t: Intel(R) Xeon(R) Gold 6348 CPU @ 2.60GHz
flags\t\t: fpu avx2 avx512f avx512_vnni
"""
PHONE = """processor\t: 0
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd05

processor\t: 7
Features\t: fp asimd asimddp
CPU implementer\t: 0x41
CPU part\t: 0xd44
"""
UNKNOWN_ARM = "CPU implementer\t: 0x99\nCPU part\t: 0x123\n"


@pytest.mark.parametrize(
    "text, model, flags",
    [
        (X86, "Intel(R) Xeon(R) Gold 6348 CPU @ 2.60GHz", {"fpu", "avx2", "avx512f", "avx512_vnni"}),
        (PHONE, "Arm Cortex-A55 + Arm Cortex-X1", {"fp", "asimd", "asimddp"}),  # two kinds of core, each once
        (UNKNOWN_ARM, "0x99 0x123", set()),  # numbers say more than nothing
        ("", "", set()),
    ],
)
def test_cpu_model_and_flags_are_read_on_x86_and_on_arm(text: str, model: str, flags: set[str]):
    assert parse_cpuinfo(text) == (model, flags)


@pytest.mark.parametrize(
    "text, cores", [("max 100000\n", None), ("150000 100000\n", 1.5), ("", None), ("nonsense", None), ("1 0", None)]
)
def test_a_containers_limit_is_in_cores(text: str, cores: float | None):
    assert parse_cpu_limit(text) == cores


def test_the_facts_are_json_and_are_those_of_this_machine():
    facts = json.loads(json.dumps(describe_machine()))
    assert set(facts) == {"cpu", "flags", "cores", "cpu_limit", "memory_bytes", "governor", "os", "python"}
    assert facts["cpu"]
    assert facts["cores"] == len(os.sched_getaffinity(0))
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert facts["memory_bytes"] == int(total.split()[1]) * 1024
    assert facts["os"].startswith(os.uname().sysname)


def test_only_flags_that_decide_speed_are_told():
    _, flags = parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    assert describe_machine()["flags"] == [flag for flag in USEFUL_FLAGS if flag in flags]


def test_peak_memory_remembers_what_was_given_back():
    before = peak_bytes()
    assert before is not None
    held = bytearray(os.urandom(1024)) * (64 * 1024)  # 64 MiB, every page written
    assert resident_bytes() >= len(held)
    del held
    after = peak_bytes()
    assert after >= before
    assert after >= 64 * 1024 * 1024


def test_the_load_average_is_the_kernels():
    told = load_average()
    assert told is not None
    assert told >= 0


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="Linux on x86-64")
def test_amx_can_be_taken_away():
    """What the tables without AMX were measured with."""
    ask = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(158, 0x1023, 18), ctypes.get_errno())
"""
    without = Path(__file__).parents[1] / "benchmarks" / "without_amx.py"
    command = [sys.executable, str(without), sys.executable, "-c", ask]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.split() == ["-1", str(errno.EPERM)]
