"""The runtime and the int8 file on processors that are not here: arm64, and x86 without VNNI, under qemu."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.export.bundle import golden_vectors
from distill.export.graph import export_graph
from distill.export.quantize import quantize_dynamic_int8
from distill.export.runtime import Bundle
from distill.tasks import TASKS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LEAST = 0.995  # of the sentences have the same label

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def arm64() -> Path:
    """A Python for arm64 with the runtime's wheels, fetched once for each version of ONNX Runtime."""
    for command in ("qemu-aarch64-static", "apt-get", "dpkg"):
        if shutil.which(command) is None:
            pytest.skip(f"needs {command}, of Debian's packages qemu-user-static, apt and dpkg")
    script, runtime = BENCHMARKS / "clients/arm64.sh", version("onnxruntime")
    wanted = hashlib.sha256(script.read_bytes() + runtime.encode()).hexdigest()[:12]
    folder = Path.home() / ".cache" / "distill-tests" / f"arm64-{wanted}"
    if not folder.is_dir():
        beside = folder.with_name(f"{folder.name}.{os.getpid()}")
        command = ["bash", str(script), str(beside), runtime]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            shutil.rmtree(beside, ignore_errors=True)
            pytest.skip(f"a Python for arm64 cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
        try:
            beside.rename(folder)
        except OSError:  # another worker was faster
            shutil.rmtree(beside)
    return folder


def test_arm64_gives_the_same_tokens_and_labels(shared_bundle: Any, arm64: Path) -> None:
    texts = shared_bundle.texts
    native = golden_vectors(Bundle.load(shared_bundle.folder), texts)
    ask = runpy.run_path(str(BENCHMARKS / "clients/agreement.py"))["arm64"]
    found = ask(shared_bundle.folder, texts, native, arm64, "neoverse-n1")
    assert found["tokens"] == len(texts)
    assert found["labels"] >= LEAST * len(texts)


def test_haswell_gives_the_same_labels(shared_bundle: Any, tmp_path: Path) -> None:
    """It adds two products of bytes in 16 bits: the file for it keeps weights to 7 bits, so that none overflows."""
    if shutil.which("qemu-x86_64-static") is None:
        pytest.skip("needs qemu-x86_64-static, of Debian's package qemu-user-static")
    tools = runpy.run_path(str(BENCHMARKS / "qemu_avx2.py"))
    spec = TASKS["text-classification"].graph(("input_ids", "attention_mask", "token_type_ids"))
    export_graph(shared_bundle.model, spec, tmp_path / "fp32.onnx")
    file = quantize_dynamic_int8(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", target="x86-avx2").path
    ids = [shared_bundle.tokenizer(text)["input_ids"] for text in shared_bundle.texts]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    native, emulated = (tools["answers"](prefix, file, tmp_path / "ids.json") for prefix in ((), tools["EMULATOR"]))
    assert native.shape == emulated.shape
    assert float((native.argmax(-1) == emulated.argmax(-1)).mean()) >= LEAST
    assert np.isfinite(emulated).all()
