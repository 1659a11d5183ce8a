"""Every pass, on and off and in any order, on graphs that are no classifiers with a first token.

Decoders with their past, encoders with decoders, images, two towers, bottlenecks, and each head that a task puts in its
graph: every output of the graph is compared with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.export.affine_norms import fold_affine_norms
from distill.export.graph import trace
from distill.export.passes import DEFAULT, FUSED, Pass, apply_passes
from distill.export.passes.fused_attention import fused_attention
from distill.export.passes.shapes import gemm_as_product
from distill.tasks import TASKS
from distill.tasks.base import GraphSpec

EVERY = (*DEFAULT, Pass("fused attention", fused_attention), Pass("gemm as product", gemm_as_product))
IDS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SHAPE, **IDS, "max_position_embeddings": 64}
START = {"decoder_start_token_id": 0}
BOTH_ENDS = {
    f"{side}_{name}": number
    for side in ("encoder", "decoder")
    for name, number in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))
}
GPT2 = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
THIN = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2}


def captioner() -> Any:
    reads = transformers.ViTConfig(**SHAPE, image_size=8, patch_size=4)
    writes = transformers.GPT2Config(**{**GPT2, "n_layer": 1})
    joined = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(reads, writes, **START)
    return transformers.VisionEncoderDecoderModel(joined)


def clip() -> Any:
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**TEXT, "max_position_embeddings": 32},
            vision_config={**SHAPE, "image_size": 8, "patch_size": 4},
            projection_dim=24,
        )
    )


def made(kind: str, family: str, **shape: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = transformers.AutoConfig.for_model(family, **shape)
        return getattr(transformers, f"AutoModel{kind}").from_config(config)

    return make


GRAPHS: dict[str, tuple[str, Callable[[], Any]]] = {
    "gpt2 with its past": ("causal-lm", made("ForCausalLM", "gpt2", **GPT2)),
    "t5 with its past": (
        "seq2seq",
        made("ForSeq2SeqLM", "t5", **IDS, **START, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4),
    ),
    "marian with its past": (
        "seq2seq",
        made(
            "ForSeq2SeqLM",
            "marian",
            **{**IDS, **START, **BOTH_ENDS, "d_model": 32, "max_position_embeddings": 64, "forced_eos_token_id": None},
        ),
    ),
    "vit": ("image-classification", made("ForImageClassification", "vit", **SHAPE, image_size=24, patch_size=8)),
    "vit and gpt2": ("image-captioning", captioner),
    "clip": ("image-text", clip),
    "distilbert tags": (
        "token-classification",
        made("ForTokenClassification", "distilbert", vocab_size=99, dim=32, n_layers=1, n_heads=4, hidden_dim=64),
    ),
    "electra spans": ("question-answering", made("ForQuestionAnswering", "electra", **TEXT, embedding_size=16)),
    "mobilebert number": (
        "regression",
        made("ForSequenceClassification", "mobilebert", **{**TEXT, **THIN, "num_labels": 1}),
    ),
    "bert labels": ("multi-label", made("ForSequenceClassification", "bert", **TEXT, num_labels=3)),
    "bert vector": ("sentence-embedding", made("", "bert", **TEXT)),
    "roberta states": ("masked-lm", made("ForMaskedLM", "roberta", **{**TEXT, "pad_token_id": 1, "bos_token_id": 0})),
}
Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Traced:
    """A graph as it was traced, and what PyTorch says to a few inputs, by output."""

    file: bytes
    answers: tuple[tuple[Feeds, Mapping[str, np.ndarray]], ...]

    @property
    def graph(self) -> ir.Model:
        """A copy that a test may rewrite."""
        return ir.from_proto(onnx.load_from_string(self.file))


@cache
def traced(name: str) -> Traced:
    task, make = TASKS[GRAPHS[name][0]], GRAPHS[name][1]
    torch.manual_seed(0)
    whole = make().eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model = fold_affine_norms(task.shipped(whole))
    spec = task.exported(model, ["input_ids", "attention_mask"])
    answers = []
    for sizes in ((1, 1, 1, 0), (2, 5, 3, 4), (3, 17, 2, 1)):
        batch = feeds(spec, *sizes)
        with torch.no_grad():
            given = {each: torch.from_numpy(value) for each, value in batch.items()}
            said = spec.run(model, given) if spec.run else spec.head(model(**given, return_dict=True))
        answers.append((batch, dict(zip(spec.outputs, (value.numpy() for value in said), strict=True))))
    return Traced(ir.to_proto(trace(model, spec)).SerializeToString(), tuple(answers))


def feeds(spec: GraphSpec, rows: int, length: int, written: int, past: int) -> Feeds:
    """Random numbers for every input, as large as its dynamic axes say; the last of several rows ends in padding."""
    rng = np.random.default_rng(length)
    sample = torch.zeros((2, 17), dtype=torch.int64)
    traced_with = spec.sample(sample, sample) if spec.sample else (sample,) * len(spec.inputs)
    sizes = {"batch": rows, "batch_size": rows, "images": rows, "length": length, "written": written}
    sizes |= {"past_length": past, "total_length": past + length}
    batch: Feeds = {}
    for name, value in zip(spec.inputs, traced_with, strict=True):
        shape = [sizes[spec.axes[name][axis]] if axis in spec.axes[name] else n for axis, n in enumerate(value.shape)]
        if name == "attention_mask":
            batch[name] = np.ones(shape, np.int64)
            batch[name][1:, shape[1] - (shape[1] > 4) :] = 0
        elif name == "position_ids":
            batch[name] = np.tile(np.arange(past, past + length), (rows, 1))
        elif value.dtype == torch.int64:
            batch[name] = rng.integers(3, 99, shape)
        else:
            batch[name] = rng.standard_normal(shape).astype(np.float32)
    return batch


@pytest.fixture
def same_answers(tmp_path: Path) -> Callable[[ir.Model, Traced], None]:
    """Writes a graph, asks ONNX Runtime and compares with PyTorch."""

    def same_answers(graph: ir.Model, one: Traced) -> None:
        ir.save(graph, tmp_path / "graph.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options, providers=["CPUExecutionProvider"])
        read = {value.name for value in session.get_inputs()}
        for batch, expected in one.answers:
            given = {name: value for name, value in batch.items() if name in read}
            for name, value in zip(expected, session.run(list(expected), given), strict=True):
                np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=0, err_msg=name)

    return same_answers


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("passes", [(), DEFAULT, FUSED], ids=["none", "default", "fused"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_what_ships_answers_as_pytorch(passes: Any, name: str, same_answers: Callable[..., None]) -> None:
    one = traced(name)
    graph = one.graph
    apply_passes(graph, passes)
    same_answers(graph, one)


@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_passes_in_any_order_change_no_answer(data: st.DataObject, same_answers: Callable[..., None]) -> None:
    """Some twice, some never."""
    one = traced(data.draw(st.sampled_from(sorted(GRAPHS)), label="graph"))
    order = data.draw(st.lists(st.sampled_from(EVERY), max_size=2 * len(EVERY)), label="order")
    graph = one.graph
    apply_passes(graph, order)
    same_answers(graph, one)
