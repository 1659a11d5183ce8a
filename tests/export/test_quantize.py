from __future__ import annotations

import csv
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
)

from distill.candidates import machine_target
from distill.errors import ExportError
from distill.export.graph import export_forms, export_graph, write
from distill.export.lookups import quantize_rows
from distill.export.onnx_model import OnnxModel
from distill.export.passes import DEFAULT, apply_passes, passes_for
from distill.export.quantize import exact_names, quantize_columns, quantize_dynamic_int8
from distill.export.sessions import WIDE
from distill.export.sizes import components
from distill.tasks import TASKS
from distill.tasks.text_classification import TextClassification

FAMILIES = ("bert", "roberta", "deberta-v2", "modernbert", "albert")


@pytest.fixture
def exported(tiny: Callable[[str], Any], tmp_path: Path) -> Callable[[str], Path]:
    """By family: the fp32 file."""

    def export(family: str) -> Path:
        graph = tiny(family).graph
        return write(graph, tmp_path / f"{family}.onnx", {"distill.format": "1"}, apply_passes(graph)).path

    return export


def values(path: Path) -> dict[str, np.ndarray]:
    return {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}


@settings(max_examples=50, deadline=None)
@given(
    weight=arrays(np.float32, (7, 5), elements=st.floats(-8, 8, width=32, allow_subnormal=False)),
    largest=st.sampled_from([127, 63]),
)
def test_rounding_is_off_by_half_a_step_at_most(weight: np.ndarray, largest: int) -> None:
    numbers, scales = quantize_columns(weight, largest)
    assert np.abs(numbers.astype(int)).max() <= largest
    assert np.all(np.abs(numbers * scales - weight) <= scales * 0.5001)
    rows, factors = quantize_rows(weight)
    assert factors.shape == (7, 1)
    assert np.all(np.abs(rows * factors - weight) <= factors * 0.5001)


def test_a_column_of_zeros_stays_zero() -> None:
    """A scale of 0 would divide by zero, one of NaN would spread."""
    numbers, scales = quantize_columns(np.zeros((3, 2), np.float32))
    assert not numbers.any()
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("target", ["arm64", "x86-vnni", "x86-avx2", "wasm", "portable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_answers_nearly_like_fp32(
    family: str, target: Any, tiny: Callable[[str], Any], exported: Callable[[str], Path], tmp_path: Path
) -> None:
    if family == "albert" and target in WIDE and machine_target() == "x86-avx2":
        pytest.skip("sums of weights that layers share are not exact on x86 without VNNI: docs/graph.md")
    one, source = tiny(family), exported(family)
    made = quantize_dynamic_int8(source, tmp_path / "int8.onnx", target=target)
    exact, small = OnnxModel(source), OnnxModel(made.path)
    assert small.inputs == exact.inputs
    assert small.outputs == ("logits", "probabilities")
    errors, spread = [], []
    for batch in one.batches((1, 1), (1, 5), (3, 33), (4, 120)):
        logits = exact.predict(batch)["logits"]
        errors.append(np.abs(small.predict(batch)["logits"] - logits).ravel())
        spread.append(logits.ravel())
    assert np.concatenate(errors).mean() < 0.12 * np.concatenate(spread).std()
    assert small.metadata == {"distill.format": "1", "distill.target": target}


def test_products_and_tables_are_int8_and_the_last_product_is_not(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    made = quantize_dynamic_int8(exported("bert"), tmp_path / "int8.onnx")
    assert "bert.encoder.layer.0.attention.self.query+key+value.weight.scaled" in made.products
    assert "bert.pooler.dense.weight.product" in made.products
    assert made.kept == ("classifier.weight.product",)
    assert [table.name.split(".")[2] for table in made.tables] == ["word_embeddings", "position_embeddings"]
    assert all(table.bits == 8 and table.bytes == table.int8_bytes and table.error < 0.03 for table in made.tables)
    large = {
        name: value.dtype for name, value in values(made.path).items() if value.ndim > 1 and min(value.shape[-2:]) > 3
    }
    assert {name for name, dtype in large.items() if dtype != np.int8} == set()


@pytest.mark.parametrize("target", ["x86-avx2", "portable"])
def test_weights_leave_room_where_pairs_are_added_in_16_bits(
    target: Any, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Without VNNI, 255 * 127 twice is more than 32767: the processor would saturate and nobody would know."""
    made = quantize_dynamic_int8(exported("bert"), tmp_path / "int8.onnx", target=target)
    stored = values(made.path)
    for name in made.products:
        numbers = stored[f"{name}.int8"].astype(int)
        pairs = np.abs(numbers[0::2]) + np.abs(numbers[1::2])
        assert 255 * pairs.max() <= 32767
        assert np.abs(numbers).max() == 63


def test_the_portable_file_is_plain_onnx(
    tiny: Callable[[str], Any], exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another implementation, written by others, gives the same numbers; nothing depends on ONNX Runtime's own
    operators."""
    made = quantize_dynamic_int8(exported("bert"), tmp_path / "int8.onnx", target="portable")
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    (batch,) = tiny("bert").batches((2, 7))
    (logits, _) = ReferenceEvaluator(model).run(None, batch)
    np.testing.assert_allclose(OnnxModel(made.path).predict(batch)["logits"], logits, atol=2e-3)


def test_onnx_runtime_joins_the_portable_operators(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """Left apart, they would be several times slower than the fp32 product."""
    made = quantize_dynamic_int8(exported("bert"), tmp_path / "int8.onnx", target="portable")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(made.path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "seen.onnx").graph.node]
    assert "MatMulInteger" not in kinds
    assert kinds.count("DynamicQuantizeMatMul") == len(made.products)


def test_a_product_can_be_kept_exact(exported: Callable[[str], Path], tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    made = quantize_dynamic_int8(exported("bert"), tmp_path / "int8.onnx", keep=[name])
    assert name in made.kept
    assert name not in made.products
    assert values(made.path)[name].dtype == np.float32


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one graph a target."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    spec, folder = TASKS["causal-lm"].exported(model, ["input_ids", "attention_mask"]), tmp_path_factory.mktemp("gpt2")
    targets = ("arm64", "x86-vnni", "x86-avx2")
    export_forms(model, spec, {folder / f"{target}.onnx": passes_for(target) for target in targets})
    return folder


@pytest.mark.parametrize("target, times", [("arm64", 1), ("x86-vnni", 1), ("x86-avx2", 2)])
def test_a_tied_table_is_stored_once(
    target: Any, times: int, gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 looks its tokens up in what it multiplies with; weights to 63 are other numbers than a table's to 127."""
    source = gpt2 / f"{target}.onnx"
    made = quantize_dynamic_int8(source, tmp_path / "int8.onnx", target=target)
    large = [numbers for numbers in values(made.path).values() if numbers.size == 2000 * 32]
    assert [numbers.dtype for numbers in large] == [np.int8] * times
    assert sum(part.bytes for part in made.components) == sum(value.nbytes for value in values(made.path).values())
    monkeypatch.setattr("distill.export.quantize.share_tied", lambda model: 0)
    twice = quantize_dynamic_int8(source, tmp_path / "twice.onnx", target=target)
    assert round((twice.bytes - made.bytes) / (2000 * 32), 1) == 2 - times
    ids = np.random.default_rng(0).integers(0, 2000, (2, 9))
    one, two = (OnnxModel(path).read(ids, None)[0] for path in (made.path, twice.path))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("target", ["arm64", "x86-avx2"])
def test_a_head_whose_logits_are_cut_in_two_stays_exact(target: Any, tmp_path: Path) -> None:
    """Starts and ends of spans are one product, split behind it: what the graph returns is no product's own result."""
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForQuestionAnswering(BertConfig(**shape, intermediate_size=64)).eval()
    spec = TASKS["question-answering"].exported(model, ["input_ids", "attention_mask"])
    source = export_graph(model, spec, tmp_path / "qa.onnx", passes=passes_for(target)).path
    made = quantize_dynamic_int8(source, tmp_path / "int8.onnx", target=target)
    assert list(made.kept) == exact_names(source) == ["qa_outputs.weight"]
    assert values(made.path)["qa_outputs.weight"].dtype == np.float32
    assert made.products


def test_keeping_what_is_not_there_is_refused(exported: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'layer\.9' is no product of bert\.onnx.*intermediate\.dense\.weight"):
        quantize_dynamic_int8(exported("bert"), tmp_path / "int8.onnx", keep=["layer.9"])
    assert not (tmp_path / "int8.onnx").exists()


def test_a_file_that_is_quantised_already_is_refused(exported: Callable[[str], Path], tmp_path: Path) -> None:
    made = quantize_dynamic_int8(exported("bert"), tmp_path / "int8.onnx")
    with pytest.raises(ExportError, match=r"int8\.onnx: nothing in it can be quantised"):
        quantize_dynamic_int8(made.path, tmp_path / "again.onnx")


@pytest.mark.parametrize("family", ["albert", "deberta-v2"])
def test_shared_weights_are_stored_once(
    family: str, tiny: Callable[[str], Any], exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """ALBERT's layers share everything; DeBERTa's keys serve tokens and relative positions."""
    made = quantize_dynamic_int8(exported(family), tmp_path / "int8.onnx")
    parameters = sum(parameter.numel() for parameter in tiny(family).model.parameters())
    stored = sum(value.size for value in values(made.path).values() if value.dtype == np.int8)
    assert stored <= parameters


def test_bytes_are_told_by_component(exported: Callable[[str], Path], tmp_path: Path) -> None:
    made = quantize_dynamic_int8(exported("bert"), tmp_path / "int8.onnx")
    assert [part.name for part in made.components] == ["embeddings", "layer 1", "layer 2", "head", "graph"]
    assert sum(part.bytes for part in made.components) == sum(value.nbytes for value in values(made.path).values())
    assert made.bytes == made.path.stat().st_size


def test_halves_and_tables_are_told_by_their_names(tmp_path: Path) -> None:
    """Two encoders of one layer each; an encoder and a decoder whose cross-attention is merged over its layers."""
    names = {
        "vision_model.encoder.layers.0.mlp.fc1.weight": "image layer 1",
        "text_model.encoder.layers.0.mlp.fc1.weight": "text layer 1",
        "text_model.embeddings.token_embedding.weight": "embeddings",
        "text_projection.weight": "head",
    }
    told_apart(names, ["embeddings", "text layer 1", "image layer 1", "head"], tmp_path)
    names = {
        "shared.weight": "embeddings",
        "model.encoder.embed_positions.weight": "embeddings",
        "model.encoder.layers.0.fc1.weight": "encoder layer 1",
        "model.decoder.layers.0.fc1.weight": "decoder layer 1",
        "model.decoder.layers.0+0+1+1.encoder_attn.k_proj.weight": "cross-attention",
        "decoder.block.0+0+1+1.layer.1.EncDecAttention.k.weight.int8": "cross-attention",
    }
    told_apart(names, ["embeddings", "encoder layer 1", "decoder layer 1", "cross-attention"], tmp_path)
    names = {"wte.weight": "embeddings", "wpe.weight": "embeddings", "h.9.mlp.weight": "layer 10", "val": "graph"}
    told_apart(names, ["embeddings", "layer 10", "graph"], tmp_path)


def told_apart(names: dict[str, str], order: list[str], folder: Path) -> None:
    weight = np.zeros(3, np.float32)
    kept = [onnx.numpy_helper.from_array(weight, name) for name in names]
    graph = onnx.helper.make_graph([], "g", [], [], kept)
    onnx.save(onnx.helper.make_model(graph), folder / "named.onnx")
    found = components(folder / "named.onnx")
    assert [part.name for part in found] == order
    assert {part.name: part.bytes for part in found} == {
        name: weight.nbytes * list(names.values()).count(name) for name in order
    }


def test_a_merged_cross_attention_is_no_head(tmp_path: Path) -> None:
    """As the passes name it in a real graph."""
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    ids = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0, "forced_eos_token_id": None}
    model = MarianMTModel(MarianConfig(vocab_size=50, **sizes, **ids)).eval()
    spec = TASKS["seq2seq"].exported(model, ["input_ids", "attention_mask"])
    made = quantize_dynamic_int8(export_graph(model, spec, tmp_path / "whole.onnx").path, tmp_path / "int8.onnx")
    layers = [f"{side} layer {number}" for side in ("encoder", "decoder") for number in (1, 2)]
    assert [part.name for part in made.components] == ["embeddings", *layers, "cross-attention", "head", "graph"]


@pytest.fixture(scope="module")
def real(
    minilm_folder: Path,
    shared_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, list[Any]]:
    """Two layers of MiniLM: ours in fp32, the exporter's untouched, and 64 real sentences in batches."""
    folder = tmp_path_factory.mktemp("real")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder, num_labels=4, num_hidden_layers=2).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    spec = TextClassification().graph(["input_ids", "attention_mask", "token_type_ids"])
    ours, plain = folder / "ours.onnx", folder / "plain.onnx"
    export_forms(model, spec, {ours: DEFAULT, plain: ()})
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    with (shared_data / "sst2" / "dev.csv").open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:64]
    batches = [
        dict(tokenizer(texts[begin : begin + 8], padding=True, return_tensors="np")) for begin in range(0, 64, 8)
    ]
    return ours, plain, batches


@pytest.mark.skipif(version("onnxruntime").startswith("1.23."), reason="its quantize_dynamic refuses the traced graph")
def test_on_real_text_no_less_exact_than_onnx_runtimes_own(real: tuple[Path, Path, list[Any]], tmp_path: Path) -> None:
    ours, plain, batches = real
    quantize_dynamic(plain, tmp_path / "theirs.onnx", per_channel=True, weight_type=QuantType.QInt8)
    made = quantize_dynamic_int8(ours, tmp_path / "int8.onnx")
    exact, small, theirs = OnnxModel(ours), OnnxModel(made.path), OnnxModel(tmp_path / "theirs.onnx")
    wanted = [exact.predict(batch)["logits"] for batch in batches]
    errors = [
        np.sqrt(
            np.mean(
                [
                    np.mean((model.predict(batch)["logits"] - logits) ** 2)
                    for batch, logits in zip(batches, wanted, strict=True)
                ]
            )
        )
        for model in (small, theirs)
    ]
    assert errors[0] <= 1.1 * errors[1]
    assert errors[0] < 0.2 * np.concatenate(wanted).std()


def test_the_file_is_little_more_than_its_int8_weights(real: tuple[Path, Path, list[Any]], tmp_path: Path) -> None:
    made = quantize_dynamic_int8(real[0], tmp_path / "int8.onnx")
    weights = sum(value.size for value in values(made.path).values() if value.dtype == np.int8)
    assert weights < made.bytes < 1.03 * weights
