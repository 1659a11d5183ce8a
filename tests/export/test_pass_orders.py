"""Every pass, on and off and in any order, on graphs that are no encoders with a first token: GPT-2, T5, ViT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.export.graph import name_weights, trace
from distill.export.passes import DEFAULT, FUSED, Pass, apply_passes
from distill.export.passes.fused_attention import fused_attention
from distill.export.passes.shapes import gemm_as_product
from distill.export.runtime import OnnxModel
from distill.tasks.base import GraphSpec

EVERY = (*DEFAULT, Pass("fused attention", fused_attention), Pass("gemm as product", gemm_as_product))
LABELS = {"num_labels": 3, "pad_token_id": 0}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "CausalLM",
        {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1},
    ),
    "t5": (
        "TokenClassification",
        LABELS | {"vocab_size": 99, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    ),
    "vit": (
        "ImageClassification",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        | {"image_size": 24, "patch_size": 8, "num_labels": 3},
    ),
}
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Traced:
    """A graph as it was traced, and what PyTorch says to a few inputs."""

    file: bytes
    answers: tuple[tuple[Feeds, np.ndarray], ...]

    @property
    def graph(self) -> ir.Model:
        """A copy that a test may rewrite."""
        return ir.from_proto(onnx.load_from_string(self.file))


@cache
def traced(family: str) -> Traced:
    kind, shape = SHAPES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(transformers.AutoConfig.for_model(family, **shape))
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    fed = [pixels()] if family == "vit" else [text(1, 1), text(1, 5), text(3, 17)]
    with torch.no_grad():
        said = [model(**{name: torch.from_numpy(value) for name, value in one.items()}).logits.numpy() for one in fed]
    graph = traced_image(model) if family == "vit" else traced_text(model)
    return Traced(ir.to_proto(graph).SerializeToString(), tuple(zip(fed, said, strict=True)))


def traced_text(model: Any) -> ir.Model:
    axes = {0: "batch", 1: "length"}
    spec = GraphSpec(
        inputs=("input_ids", "attention_mask"),
        outputs=("logits",),
        axes={"input_ids": axes, "attention_mask": axes},
        head=lambda output: (output.logits,),
    )
    return trace(model, spec)


def traced_image(model: Any) -> ir.Model:
    model.set_attn_implementation("eager")
    size = (torch.zeros(1, 3, 24, 24),)
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    program = torch.onnx.export(model, size, dynamo=True, verbose=False, opset_version=20, **names)
    assert program is not None
    name_weights(program.model)
    return program.model


def text(rows: int, length: int) -> Feeds:
    ids = np.random.default_rng(length).integers(3, 99, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def pixels() -> Feeds:
    return {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, 24, 24)).astype(np.float32)}


@pytest.fixture
def same_answers(tmp_path: Path) -> Callable[[ir.Model, Traced], None]:
    """Writes a graph, asks ONNX Runtime and compares with PyTorch."""

    def same_answers(graph: ir.Model, one: Traced) -> None:
        ir.save(graph, tmp_path / "graph.onnx")
        model = OnnxModel(tmp_path / "graph.onnx")
        for batch, expected in one.answers:
            np.testing.assert_allclose(model.predict(batch)["logits"], expected, atol=1e-4, rtol=0)

    return same_answers


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("passes", [(), DEFAULT, FUSED], ids=["none", "default", "fused"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_ships_answers_as_pytorch(passes: Any, family: str, same_answers: Callable[..., None]) -> None:
    one = traced(family)
    graph = one.graph
    apply_passes(graph, passes)
    same_answers(graph, one)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_passes_in_any_order_change_no_answer(data: st.DataObject, same_answers: Callable[..., None]) -> None:
    """Some twice, some never."""
    one = traced(data.draw(st.sampled_from(sorted(SHAPES)), label="family"))
    order = data.draw(st.lists(st.sampled_from(EVERY), max_size=2 * len(EVERY)), label="order")
    graph = one.graph
    apply_passes(graph, order)
    same_answers(graph, one)
