"""Runs a command on a processor with AMX as on one without: the kernel refuses AMX's registers to it and its children.

    python benchmarks/without_amx.py python benchmarks/latency.py --layers 4

ONNX Runtime and oneDNN (PyTorch, OpenVINO) then take AVX-512 VNNI, as on most x86 servers and laptops. Linux on x86-64
alone. What oneDNN would have done in bf16 with AMX it does in fp32 or, where the processor has it, with AVX-512 bf16.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ARCH_PRCTL, REQUEST_PERMISSION = 158, 0x1023  # of x86-64; ARCH_REQ_XCOMP_PERM
LOAD, SAME, RETURN = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
NUMBER, FIRST_ARGUMENT = 0, 16  # where struct seccomp_data has them
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM

FILTER = (
    (LOAD, 0, 0, NUMBER),
    (SAME, 0, 3, ARCH_PRCTL),
    (LOAD, 0, 0, FIRST_ARGUMENT),
    (SAME, 0, 1, REQUEST_PERMISSION),
    (RETURN, 0, 0, REFUSE),
    (RETURN, 0, 0, ALLOW),
)


def refuse_amx() -> None:
    """From here on, this process and those it starts cannot have AMX.

    Raises:
        OSError: The kernel has no such filters.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in FILTER))
    program = struct.pack("HxxxxxxP", len(FILTER), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program):
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    refuse_amx()
    os.execvp(sys.argv[1], sys.argv[1:])
