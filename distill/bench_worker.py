"""One model in one process, timed on request: JSON lines in, JSON lines out.

`distill.bench` starts one for each model, so that load time and memory are that model's alone.

    {"cell": [batch, length], "calls": 20}  ->  {"ns": [...]}
    {"memory": true}                        ->  {"peak_bytes": 41234432, "idle_bytes": ...}
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SEED, IDS = 0, 100
"""Ids are drawn below 100, which every vocabulary has; which row of a table is read costs the same."""


def main(path: str, threads: int) -> None:
    """Loads `path`, says how long that took, then answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    load = _load_torch if Path(path).is_dir() else _load_onnx
    try:
        load_ns, idle_bytes, call = load(Path(path), threads)
    except Exception as error:  # told to the driver, which raises it as one line
        answers.write(json.dumps({"error": " ".join(str(error).split())[:300]}) + "\n")
        return
    answers.write(json.dumps({"load_ns": load_ns, "idle_bytes": idle_bytes}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if "cell" in request:
            batch = _batch(*request["cell"])
            answer: dict[str, Any] = {"ns": [_time(call, batch) for _ in range(request["calls"])]}
        else:
            answer = {"peak_bytes": _memory("VmHWM")}
        answers.write(json.dumps(answer) + "\n")


def _time(call: Callable[[dict[str, Any]], Any], batch: dict[str, Any]) -> int:
    start = time.perf_counter_ns()
    call(batch)
    return time.perf_counter_ns() - start


def _load_onnx(path: Path, threads: int) -> tuple[int, int, Callable[[dict[str, Any]], Any]]:
    from distill.export.runtime import OnnxModel

    idle = _memory("VmRSS")
    start = time.perf_counter_ns()
    model = OnnxModel(path, threads=threads)
    return time.perf_counter_ns() - start, idle, model.predict


def _load_torch(path: Path, threads: int) -> tuple[int, int, Callable[[dict[str, Any]], Any]]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    model_class = getattr(transformers, config.architectures[0])
    idle = _memory("VmRSS")
    start = time.perf_counter_ns()
    model = model_class.from_pretrained(path, use_safetensors=True, dtype=torch.float32).eval()
    loaded = time.perf_counter_ns() - start

    def call(batch: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(batch["input_ids"])).logits.numpy()

    return loaded, idle, call


def _batch(rows: int, length: int) -> dict[str, Any]:
    """Full rows of random ids: no padding, the same for every model."""
    ids = np.random.default_rng(SEED).integers(0, IDS, (rows, length), np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _memory(key: str) -> int:
    """Bytes of this process by the kernel's count: VmRSS is now, VmHWM the most so far; 0 where it is not told."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
