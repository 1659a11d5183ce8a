"""Logits are compared batch by batch, by the same numbers as all at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distill.export.distance import Distance
from distill.export.graph import export_graph, write
from distill.export.ladder import rank_products
from distill.export.onnx_model import OnnxModel
from distill.export.passes import apply_passes
from distill.export.quantize import quantize_dynamic_int8
from distill.tasks import TASKS


@pytest.mark.parametrize("kept", [0, 100, 2**28])
def test_the_distance_is_that_of_all_logits(kept: int, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    one = tiny("bert")
    graph = one.graph
    exact = write(graph, tmp_path / "model.onnx", {}, apply_passes(graph)).path
    made = quantize_dynamic_int8(exact, tmp_path / "int8.onnx").path
    batches = one.batches((2, 9), (5, 17), (3, 33))
    models = [OnnxModel(path) for path in (exact, made)]
    wanted, found = (np.concatenate([model.predict(batch)["logits"] for batch in batches]) for model in models)
    distance = Distance(exact, batches, kept=kept)
    assert distance(made) == pytest.approx(np.sqrt(np.mean((found - wanted) ** 2.0)) / wanted.std(), rel=1e-4)
    assert distance(exact) == 0


def test_what_is_no_number_is_infinitely_far(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    one = tiny("bert")
    graph = one.graph
    exact = write(graph, tmp_path / "model.onnx", {}, apply_passes(graph)).path
    model = onnx.load(exact)
    bias = next(value for value in model.graph.initializer if value.name == "classifier.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "nan.onnx")
    assert Distance(exact, one.batches((2, 9)))(tmp_path / "nan.onnx") == np.inf


def test_a_language_models_logits_are_never_held_together(tmp_path: Path) -> None:
    """Thirty batches of 2 x 64 x 2000 logits are 31 MB in fp32: what is held is a few batches, in float64 at most."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    path = export_graph(
        model, TASKS["causal-lm"].exported(model, ["input_ids", "attention_mask"]), tmp_path / "model.onnx"
    ).path
    ids = np.random.default_rng(0).integers(0, 2000, (2, 64))
    batches = [{"input_ids": ids, "attention_mask": np.ones_like(ids)}] * 30
    tracemalloc.start()
    Distance(path, batches, kept=0)(path)
    ranked = rank_products(path, batches[:2])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * 2 * 64 * 2000 * 4
    assert len(ranked) == 5
