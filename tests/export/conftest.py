"""Tiny models of every family, each traced once a session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from distill.evaluation import TorchPredictor
from distill.export.graph import trace
from distill.export.onnx_model import OnnxModel
from distill.tasks.base import GraphSpec
from distill.tasks.text_classification import TextClassification

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 160,
    "num_labels": 3,
}
DISTILBERT = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "num_labels": 3}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 16,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SHAPE,
    "roberta": SHAPE | {"pad_token_id": 1},
    "xlm-roberta": SHAPE | {"pad_token_id": 1},
    "distilbert": DISTILBERT | {"max_position_embeddings": 160},
    "electra": SHAPE | {"embedding_size": 16},
    "mpnet": SHAPE | {"pad_token_id": 1},
    "deberta-v2": SHAPE | DEBERTA,
    "modernbert": SHAPE | SPECIALS | {"global_attn_every_n_layers": 2, "local_attention": 16},
    "albert": SHAPE | {"embedding_size": 16},  # both layers share their weights; GELU by tanh
}
TYPED = ("bert", "electra", "albert")  # their tokenizers give token_type_ids
TASK = TextClassification()


@dataclass(frozen=True)
class Tiny:
    """A random model, what its graph takes, and the graph as traced."""

    model: Any
    spec: GraphSpec
    padding: int
    file: bytes

    @property
    def graph(self) -> ir.Model:
        """A copy that a test may rewrite."""
        import onnx

        return ir.from_proto(onnx.load_from_string(self.file))

    @property
    def reference(self) -> TorchPredictor:
        return TorchPredictor(self.model, TASK)

    def batches(self, *shapes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
        """Random ids; every row but the first ends in padding, token types are mixed."""
        rng = np.random.default_rng(0)
        batches = []
        for rows, length in shapes:
            mask = (np.arange(length) < np.maximum(length - np.arange(rows)[:, None] * 7, 1)).astype(np.int64)
            ids = np.where(mask == 1, rng.integers(3, 99, (rows, length)), self.padding)
            types = rng.integers(0, 2, (rows, length)) * mask
            values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
            batches.append({name: values[name] for name in self.spec.inputs})
        return batches


def build(family: str, **changes: Any) -> Any:
    """A model with weights large enough that attention is uneven and every mistake shows in the logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family] | changes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def spec_of(family: str) -> GraphSpec:
    names = ["input_ids", "attention_mask", "token_type_ids"]
    return TASK.graph(names if family in TYPED else names[:2])


@pytest.fixture(scope="session")
def tiny(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Tiny]:
    """By family: the model, its spec and its traced graph."""

    @cache
    def traced(family: str) -> Tiny:
        model, spec = build(family), spec_of(family)

        def fill(folder: Path) -> None:
            (folder / "traced.onnx").write_bytes(ir.to_proto(trace(model, spec)).SerializeToString())

        file = made_once(f"traced-{family}", fill) / "traced.onnx"
        return Tiny(model, spec, model.config.pad_token_id or 0, file.read_bytes())

    return traced


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Any]:
    """By family and changes to its config: a fresh model."""
    return build


@pytest.fixture
def load(tmp_path: Path) -> Callable[[ir.Model], OnnxModel]:
    """Writes a graph and opens it in ONNX Runtime."""

    def load(graph: ir.Model) -> OnnxModel:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        ir.save(graph, path)
        return OnnxModel(path)

    return load
