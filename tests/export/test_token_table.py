"""The table of the tokens in blocks of 4 bits: what is stored, what ONNX Runtime reads, and when there is none."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from distill.errors import ExportError
from distill.export.blocks import BLOCK, round_blocks, widen
from distill.export.blockwise import quantize_blocks_within
from distill.export.graph import export_graph, write
from distill.export.ladder import quantize_within
from distill.export.onnx_model import OnnxModel
from distill.export.ort_format import write_ort
from distill.export.passes import apply_passes
from distill.export.precision import quantize_weights
from distill.export.quantize import quantize_dynamic_int8
from distill.export.token_table import check_token_table, relative_error
from distill.tasks import TASKS

FAMILIES = ("bert", "roberta", "modernbert", "albert")


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 99 tokens, 48 numbers each, which is no whole number of blocks."""
    torch.manual_seed(0)
    shape = {"vocab_size": 99, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=64, max_position_embeddings=80)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    spec = TASKS["text-classification"].graph(["input_ids", "attention_mask"])
    return export_graph(model, spec, tmp_path_factory.mktemp("fp32") / "bert.onnx").path


def values(path: Path) -> dict[str, np.ndarray]:
    return {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}


def batches(*shapes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"input_ids": rng.integers(3, 99, shape), "attention_mask": np.ones(shape, np.int64)} for shape in shapes]


def min_max(numbers: np.ndarray) -> np.ndarray:
    """Blocks of 4 bits as they are mostly made: the largest number of each goes to 7."""
    blocks = numbers.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 7
    scales[scales == 0] = 1
    return (np.rint(blocks / scales) * scales).reshape(numbers.shape)


@settings(max_examples=25, deadline=None)
@given(numbers=arrays(np.float32, (3, 2 * BLOCK), elements=st.floats(-8, 8, width=32, allow_subnormal=False)))
def test_no_block_is_further_off_than_by_its_largest_number(numbers: np.ndarray) -> None:
    rounded, scales = round_blocks(numbers, 4)
    assert rounded.max() <= 15
    found = np.square(widen(rounded, scales, 4, 2 * BLOCK) - numbers).reshape(-1, BLOCK).sum(axis=1)
    plain = np.square(min_max(numbers) - numbers).reshape(-1, BLOCK).sum(axis=1)
    assert np.all(found <= plain * 1.0001 + 1e-6)


def test_a_real_table_loses_less_than_by_its_largest_numbers(minilm_folder: Path) -> None:
    """all-MiniLM-L6-v2's table: measured 0.097 by the largest number, 0.081 by the search, 0.0073 in int8."""
    from safetensors.numpy import load_file

    table = load_file(minilm_folder / "model.safetensors")["embeddings.word_embeddings.weight"][::40]
    rounded, scales = round_blocks(table, 4, half=True)
    found, plain = relative_error(table, widen(rounded, scales, 4, 384)), relative_error(table, min_max(table))
    assert scales.dtype == np.float16
    assert found**2 < 0.72 * plain**2
    assert found < 0.085


def test_a_block_of_zeros_stays_zero() -> None:
    """A scale of 0 would divide by zero, and one too small for fp16 becomes 0."""
    numbers = np.zeros((2, BLOCK), np.float32)
    numbers[1, 3] = 1e-9
    rounded, scales = round_blocks(numbers, 4, half=True)
    assert (scales != 0).all()
    np.testing.assert_array_equal(widen(rounded, scales, 4, BLOCK), 0)


@pytest.mark.parametrize("target", ["arm64", "x86-vnni", "x86-avx2", "wasm"])
def test_onnx_runtime_fetches_what_was_stored(target: Any, fp32: Path, tmp_path: Path) -> None:
    """Every row of the table, in this machine's ONNX Runtime against NumPy, to what fp16 holds."""
    made = quantize_dynamic_int8(fp32, tmp_path / "int4.onnx", target=target, tables="int4")
    model = onnx.load(made.path)
    (lookup,) = [node for node in model.graph.node if node.op_type == "GatherBlockQuantized"]
    (widened,) = [node.output[0] for node in model.graph.node if node.input[:1] == lookup.output]
    model.graph.output.append(onnx.helper.make_tensor_value_info(widened, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "seen.onnx")
    ids = np.arange(99).reshape(3, 33)
    found = OnnxModel(tmp_path / "seen.onnx").predict({"input_ids": ids, "attention_mask": np.ones_like(ids)})[widened]
    (named,) = [each for each in made.tables if each.bits == 4]
    table = values(fp32)[named.name]
    stored = widen(*round_blocks(table, 4, half=True), 4, 48)
    wanted = stored[ids] if found.shape == (3, 33, 48) else stored[ids.T]  # the sequence may come first
    np.testing.assert_allclose(found, wanted, rtol=2**-10)
    assert named.error == pytest.approx(relative_error(table, stored))
    kept = values(made.path)
    assert named.bytes == sum(kept[name].nbytes for name in lookup.input if name in kept)
    assert named.bytes == 99 * (24 + 2 * 2)
    assert named.int8_bytes == 99 * (48 + 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_the_tokens_alone_is_in_int4(family: str, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """Positions stay in int8, looked up (RoBERTa) or cut off (BERT): they are few, and every token reads one."""
    one = tiny(family)
    graph = one.graph
    source = write(graph, tmp_path / f"{family}.onnx", {}, apply_passes(graph)).path
    eight, four = (
        quantize_dynamic_int8(source, tmp_path / f"{form}.onnx", target="x86-avx2", tables=form)
        for form in ("int8", "int4")
    )
    assert [table.name for table in four.tables] == [table.name for table in eight.tables]
    (named,) = [table.name for table in four.tables if table.bits == 4]
    assert "word_embeddings" in named or "tok_embeddings" in named
    assert OnnxModel(four.path).metadata["distill.embeddings"] == "int4"
    assert "distill.embeddings" not in OnnxModel(eight.path).metadata
    exact = OnnxModel(source)
    for batch in one.batches((1, 1), (3, 33)):
        logits = exact.predict(batch)["logits"]
        assert np.abs(OnnxModel(four.path).predict(batch)["logits"] - logits).mean() < 0.5 * np.abs(logits).mean()


def test_int4_tables_move_answers_by_what_rounding_them_does(fp32: Path, tmp_path: Path) -> None:
    """The graph with the rounded table in fp32, against the one that reads blocks: nothing else differs."""
    made = quantize_dynamic_int8(fp32, tmp_path / "int4.onnx", target="x86-avx2", tables="int4")
    plain = onnx.load(fp32)
    (named,) = [table.name for table in made.tables if table.bits == 4]
    (table,) = [value for value in plain.graph.initializer if value.name == named]
    stored = widen(*round_blocks(onnx.numpy_helper.to_array(table), 4, half=True), 4, 48)
    table.CopyFrom(onnx.numpy_helper.from_array(stored.astype(np.float32), table.name))
    onnx.save(plain, tmp_path / "rounded.onnx")
    rounded = quantize_dynamic_int8(tmp_path / "rounded.onnx", tmp_path / "int8.onnx", target="x86-avx2", tables="fp32")
    for batch in batches((1, 1), (3, 33)):
        one, other = (OnnxModel(path).predict(batch)["logits"] for path in (made.path, rounded.path))
        np.testing.assert_allclose(one, other, atol=0.2)  # what fp16 changes may cross a step of int8


def test_standard_operators_have_no_lookup_of_four_bits(fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"embeddings: standard ONNX has no operator .*another export\.target"):
        quantize_dynamic_int8(fp32, tmp_path / "int4.onnx", target="portable", tables="int4")
    assert not (tmp_path / "int4.onnx").exists()


def test_a_graph_that_reads_no_tokens_is_refused(tmp_path: Path) -> None:
    """Or a person would believe that something had become smaller."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=24, patch_size=8)).eval()
    spec = TASKS["image-classification"].exported(model, ["pixel_values"])
    source = export_graph(model, spec, tmp_path / "vit.onnx").path
    with pytest.raises(ExportError, match="there is no table of tokens that could be in int4"):
        quantize_dynamic_int8(source, tmp_path / "int4.onnx", tables="int4")
    with pytest.raises(ExportError, match=r"there is no table of tokens .*export\.embeddings = \"int8\""):
        check_token_table(model, "int8")


@pytest.fixture
def tied(tmp_path: Path) -> tuple[Path, Any]:
    """A small language model that looks its tokens up in what its last product multiplies with."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_positions=32, n_embd=64, n_layer=1, n_head=2)).eval()
    spec = TASKS["causal-lm"].exported(model, ["input_ids", "attention_mask"])
    return export_graph(model, spec, tmp_path / "gpt.onnx").path, model


def test_a_table_that_is_multiplied_with_is_refused_in_int8(tied: tuple[Path, Any], tmp_path: Path) -> None:
    """It would be in the file twice, and the file larger than before; a model says so before it is trained."""
    source, model = tied
    says = r'multiplied with as well as looked up, .* stored twice.*export\.weights = "blocks-4"'
    with pytest.raises(ExportError, match=rf"lm_head\.weight is {says}"):
        quantize_dynamic_int8(source, tmp_path / "int4.onnx", tables="int4")
    with pytest.raises(ExportError, match=says):
        quantize_weights(source, tmp_path / "int4.onnx", bits=8, tables="int4")
    for weights in ("int8", "blocks-8"):
        with pytest.raises(ExportError, match=rf"The table of the tokens is {says}"):
            check_token_table(model, weights)
    check_token_table(model, "blocks-4")
    assert not (tmp_path / "int4.onnx").exists()


def test_lookup_and_product_share_blocks_of_four_bits(tied: tuple[Path, Any], tmp_path: Path) -> None:
    source, _ = tied
    made = quantize_weights(source, tmp_path / "shared.onnx", tables="int4")
    apart = quantize_weights(source, tmp_path / "apart.onnx")
    stored = values(made.path)
    large = [numbers for numbers in stored.values() if numbers.size >= 2000 * 32]
    assert [(numbers.dtype, numbers.shape) for numbers in large] == [(np.uint8, (2000, 32))]
    assert apart.bytes - made.bytes == pytest.approx(2000 * (64 + 4), rel=0.02)
    (table,) = [each for each in made.tables if each.bits == 4]
    assert table.bytes == 2000 * (32 + 2 * 4)  # fp32 scales, as the product reads them
    rounded = onnx.load(source)
    for value in rounded.graph.initializer:  # the same numbers in fp32, for the lookup and for the product
        numbers = onnx.numpy_helper.to_array(value)
        if sorted(numbers.shape) == [64, 2000]:
            by_token = numbers if numbers.shape[0] == 2000 else numbers.T
            exact = widen(*round_blocks(by_token, 4), 4, 64)
            kept = np.ascontiguousarray(exact if by_token is numbers else exact.T)
            value.CopyFrom(onnx.numpy_helper.from_array(kept.astype(np.float32), value.name))
    onnx.save(rounded, tmp_path / "rounded.onnx")
    ids = np.random.default_rng(0).integers(0, 2000, (2, 9))
    wanted = OnnxModel(tmp_path / "rounded.onnx").read(ids, None)[0]
    found, other = (OnnxModel(path).read(ids, None)[0] for path in (made.path, apart.path))
    assert np.abs(found - wanted).mean() < 0.12 * wanted.std()  # the layer's own products are in 4 bits
    exact = OnnxModel(source).read(ids, None)[0]
    assert np.abs(found - exact).mean() < 1.3 * np.abs(other - exact).mean()


def test_blocks_of_weights_and_int4_pass_one_gate(tied: tuple[Path, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bits": 4, "tables": "int4", "max_drop": 1.0}
    says = r'weights in 4 bits, embeddings in int4 lose 20.00 points.*export\.embeddings = "int8", or export\.weights'
    scores = iter((0.5, 0.3))
    with pytest.raises(ExportError, match=says):
        quantize_blocks_within(tied[0], tmp_path / "a.onnx", measure=lambda _: next(scores), **settings)
    result = quantize_blocks_within(tied[0], tmp_path / "a.onnx", measure=lambda _: 0.5, **settings)
    assert [table.bits for table in result.graph.tables] == [4]
    assert OnnxModel(tmp_path / "a.onnx").metadata["distill.embeddings"] == "int4"


def in_int4(path: Path) -> bool:
    return OnnxModel(path).metadata.get("distill.embeddings") == "int4"


def test_the_gate_keeps_int4_where_it_is_good_enough(fp32: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"max_drop": 0.5, "batches": batches((2, 9)), "tables": "int4", "target": "arm64"}
    result = quantize_within(fp32, tmp_path / "a.onnx", measure=lambda _: 0.9, **asked)
    assert [rung.form for rung in result.rungs] == ["dynamic", "dynamic, embeddings in int4"]
    assert result.rungs[1].bytes == (tmp_path / "a.onnx").stat().st_size < result.rungs[0].bytes
    assert in_int4(tmp_path / "a.onnx")


def test_the_gate_takes_int8_where_int4_loses_too_much(fp32: Path, tmp_path: Path) -> None:
    def measure(path: Path) -> float:
        return 0.8 if in_int4(path) else 0.9

    asked: dict[str, Any] = {"max_drop": 0.5, "batches": batches((2, 9)), "tables": "int4"}
    result = quantize_within(fp32, tmp_path / "a.onnx", measure=measure, **asked)
    assert [rung.form for rung in result.rungs] == ["dynamic, embeddings in int4", "dynamic"]
    assert [round(rung.drop) for rung in result.rungs] == [10, 0]
    assert result.said(0.5) == ""  # what was wrong with int4 is no fault of int8's
    assert not in_int4(tmp_path / "a.onnx")
    assert {table.bits for table in result.graph.tables} == {8}
    says = r'plain int8 with embeddings in int4 loses 10\.00 points.*repair = true, export\.embeddings = "int8"'
    with pytest.raises(ExportError, match=says):
        quantize_within(fp32, tmp_path / "b.onnx", measure=measure, repair=False, **asked)
    assert not (tmp_path / "b.onnx").exists()


def test_what_is_kept_from_int8_and_int4_go_together(fp32: Path, tmp_path: Path) -> None:
    """A form that keeps a product is tried in fp16 and in int4, each on top of what was good enough before."""

    def measure(path: Path) -> float:
        floats = [numbers for numbers in values(path).values() if numbers.dtype in (np.float16, np.float32)]
        return 0.9 if any(numbers.ndim == 2 and min(numbers.shape) > 3 for numbers in floats) else 0.5

    asked: dict[str, Any] = {"max_drop": 0.5, "batches": batches((2, 9)), "tables": "int4", "target": "arm64"}
    result = quantize_within(fp32, tmp_path / "a.onnx", measure=measure, **asked)
    assert [rung.form.split("1 in ")[1] for rung in result.rungs[-3:]] == ["fp32", "fp16", "fp16, embeddings in int4"]
    assert in_int4(tmp_path / "a.onnx")
    kinds = {numbers.dtype for numbers in values(tmp_path / "a.onnx").values()}
    assert {np.dtype(np.uint8), np.dtype(np.float16), np.dtype(np.int8)} <= kinds


def test_a_reduced_runtime_is_told_of_the_operator(fp32: Path, tmp_path: Path) -> None:
    made = quantize_dynamic_int8(fp32, tmp_path / "int4.onnx", target="x86-avx2", tables="int4")
    ort = write_ort(made.path, tmp_path / "phone")
    (fused,) = [line for line in ort.operators if line.startswith("com.microsoft;1;")]
    assert "GatherBlockQuantized" in fused.split(";")[2].split(",")
    (batch,) = batches((2, 9))
    one, other = (OnnxModel(path).predict(batch)["logits"] for path in (made.path, ort.path))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_oldest_runtime_allowed_has_the_operator() -> None:
    """Asked of the wheels: for uint8 it came with ONNX Runtime 1.23; 1.22.1 refuses the file."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    (least,) = [line.split(">=")[1] for line in project["dependencies"] if line.startswith("onnxruntime>=")]
    assert tuple(map(int, least.split("."))) >= (1, 23)
