"""The runtime and the int8 file on processors that are not here: arm64, and x86 without VNNI, under qemu.

Both are asked 500 real sentences, with the file that ships to such a processor: its own passes, its own operators.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from distill.export.bundle import Contents, golden_vectors, write_bundle
from distill.export.graph import export_graph
from distill.export.passes import passes_for
from distill.export.quantize import quantize_dynamic_int8
from distill.export.runtime import Bundle
from distill.tasks import TASKS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LEAST = 0.995  # of the sentences have the same label
SENTENCES = 500
LABELS = [
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
]
"""SNIPS' intents."""

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


@dataclass(frozen=True)
class Reader:
    """Two layers of all-MiniLM-L6-v2 that tell what is asked for."""

    model: Any
    folder: Path
    texts: list[str]
    ids: list[list[int]]

    def export(self, path: Path, target: Any) -> Path:
        """The int8 file for a processor."""
        metadata = {
            "distill.format": "1",
            "distill.task": "text-classification",
            "distill.labels": json.dumps(LABELS),
            "distill.max_length": "64",
        }
        spec = TASKS["text-classification"].graph(("input_ids", "attention_mask", "token_type_ids"))
        full = path.with_name(f"fp32-{path.name}")
        export_graph(self.model, spec, full, metadata=metadata, passes=passes_for(target))
        return quantize_dynamic_int8(full, path, target=target).path


@pytest.fixture(scope="session")
def reader(minilm_folder: Path, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """It learns from 1,000 training sentences of SNIPS, and is asked 500 of its test sentences."""

    def rows(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: row for row, name in enumerate(LABELS)}}
    model = BertForSequenceClassification.from_pretrained(minilm_folder, num_hidden_layers=2, **names).eval()
    tokenizer, folder = AutoTokenizer.from_pretrained(minilm_folder), tmp_path_factory.mktemp("reader")
    known, asked = (rows(shared_data / "snips" / name) for name in ("train.jsonl", "test.jsonl"))
    known = known[:: len(known) // 1000][:1000]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for begin in range(0, len(known), 25):
        some = known[begin : begin + 25]
        batch = tokenizer([" ".join(row["tokens"]) for row in some], padding=True, return_tensors="pt")
        model(**batch, labels=torch.tensor([LABELS.index(row["intent"]) for row in some])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = [" ".join(row["tokens"]) for row in asked[:SENTENCES]]
    ids = [row[:64] for row in tokenizer(texts)["input_ids"]]
    assert len(texts) == SENTENCES
    return Reader(model, folder, texts, ids)


@pytest.mark.skipif(version("onnxruntime").startswith("1.23."), reason="ONNX Runtime 1.23 for Arm aborts when emulated")
def test_arm64_gives_the_same_tokens_and_labels(reader: Reader, arm64: Path, tmp_path: Path) -> None:
    int8 = reader.export(tmp_path / "int8.onnx", "arm64")
    assert "DynamicQuantizeMatMul" in {node.op_type for node in onnx.load(int8).graph.node}  # Arm has kernels for it
    files = {"fp32_onnx": tmp_path / "fp32-int8.onnx", "int8_onnx": int8, "model_folder": reader.folder}
    facts = {"metrics": {}, "verification": [], "recipe_toml": 'name = "reader"\n', "versions": {"distill": "0"}}
    named = {"name": "reader", "task": "text-classification", "labels": LABELS, "max_length": 64}
    write_bundle(tmp_path / "bundle", Contents(**named, **files, **facts, golden_texts=reader.texts[:8]))
    native = golden_vectors(Bundle.load(tmp_path / "bundle"), reader.texts)
    assert len({int(np.argmax(line["probabilities"])) for line in native}) == len(LABELS)  # or it would say nothing
    ask = runpy.run_path(str(BENCHMARKS / "clients/agreement.py"))["arm64"]
    found = ask(tmp_path / "bundle", reader.texts, native, arm64, "neoverse-n1")
    assert found["tokens"] == SENTENCES
    assert found["labels"] >= LEAST * SENTENCES


def test_haswell_gives_the_same_labels(reader: Reader, tmp_path: Path) -> None:
    """It adds two products of bytes in 16 bits: the file for it keeps weights to 7 bits, so that none overflows."""
    if shutil.which("qemu-x86_64-static") is None:
        pytest.skip("needs qemu-x86_64-static, of Debian's package qemu-user-static")
    tools = runpy.run_path(str(BENCHMARKS / "qemu_avx2.py"))
    file = reader.export(tmp_path / "int8.onnx", "x86-avx2")
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert {"Attention", "MatMulIntegerToFloat"} <= kinds
    (tmp_path / "ids.json").write_text(json.dumps(reader.ids))
    native, emulated = (tools["answers"](prefix, file, tmp_path / "ids.json") for prefix in ((), tools["EMULATOR"]))
    assert native.shape == emulated.shape == (SENTENCES, len(LABELS))
    assert len(set(native.argmax(-1).tolist())) == len(LABELS)
    assert float((native.argmax(-1) == emulated.argmax(-1)).mean()) >= LEAST
    assert np.isfinite(emulated).all()


def test_haswell_is_found_to_overflow() -> None:
    """There sessions of files whose weights are not kept to 7 bits are opened with a switch."""
    if shutil.which("qemu-x86_64-static") is None:
        pytest.skip("needs qemu-x86_64-static, of Debian's package qemu-user-static")
    emulator = runpy.run_path(str(BENCHMARKS / "qemu_avx2.py"))["EMULATOR"]
    asked = "from distill.export.sessions import overflows; print(overflows())"
    done = subprocess.run([*emulator, sys.executable, "-c", asked], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"], done.stderr
