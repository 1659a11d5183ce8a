"""Weights in blocks: what is stored, what ONNX Runtime makes of it, and when it is refused."""

import numpy as np
import onnx
import pytest
import torch
from transformers import AlbertConfig, AlbertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from distill.errors import ExportError
from distill.export.blockwise import quantize_blocks_within
from distill.export.graph import export_graph
from distill.export.ladder import rank_products
from distill.export.onnx_model import OnnxModel
from distill.export.precision import BLOCK, pack_blocks, quantize_weights
from distill.export.quantize import product_names
from distill.tasks import TASKS


@pytest.fixture(scope="module")
def fp32(tmp_path_factory):
    """A small GPT-2 whose width is no whole number of blocks."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_positions=128, n_embd=48, n_layer=2, n_head=4)).eval()
    path = tmp_path_factory.mktemp("blocks") / "model.onnx"
    export_graph(model, TASKS["causal-lm"].exported(model, ["input_ids", "attention_mask"]), path)
    return path


def test_packed_numbers_by_hand():
    weight = np.zeros((BLOCK + 1, 1), np.float32)
    weight[:3, 0], weight[BLOCK, 0] = (-1.0, 1.0, 0.6), 3.0
    numbers, scales = pack_blocks(weight, 8)
    np.testing.assert_allclose(scales, [[1 / 127, 3 / 127]], rtol=1e-6)
    assert numbers.shape == (1, 2, BLOCK)
    assert list(numbers[0, 0, :4]) == [1, 255, 128 + 76, 128]


def test_four_bits_lie_low_half_first():
    """Numbers that 4 bits hold exactly: -8 to 7 times a scale, in pairs."""
    wanted = np.resize(np.arange(-8, 8), BLOCK)
    numbers, scales = pack_blocks(wanted[:, None] * np.float32(0.25), 4)
    assert numbers.shape == (1, 1, BLOCK // 2)
    low, high = numbers[0, 0] & 15, numbers[0, 0] >> 4
    found = np.stack([low, high], axis=1).reshape(-1).astype(int) - 8
    np.testing.assert_allclose(found * scales[0, 0], wanted * 0.25, rtol=1e-6)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.02), (4, 0.25)])
def test_answers_and_size(fp32, tmp_path, bits, error):
    made = quantize_weights(fp32, tmp_path / "blocks.onnx", bits=bits, metadata={"distill.task": "causal-lm"})
    assert (len(made.weights), len(made.tables)) == (9, 2)  # four products of each layer and the head
    assert made.bytes < fp32.stat().st_size * (0.35 if bits == 8 else 0.28)
    exact, blocks = OnnxModel(fp32), OnnxModel(made.path)
    assert blocks.metadata["distill.task"] == "causal-lm"
    ids = np.random.default_rng(0).integers(0, 2000, (2, 12))
    wanted, found = exact.read(ids, None)[0], blocks.read(ids, None)[0]
    assert np.abs(wanted - found).mean() < error * wanted.std()
    _, past = blocks.read(ids[:, :7], None)
    stepwise, _ = blocks.read(ids[:, 7:], past)
    np.testing.assert_allclose(stepwise, found[:, 7:], atol=0.05 * wanted.std())


def test_what_loses_too_much_is_refused(fp32, tmp_path):
    scores = iter((0.5, 0.4))
    with pytest.raises(
        ExportError, match=r"weights in 4 bits lose 20.00 points, more than max_drop = 10.*export.weights"
    ):
        quantize_blocks_within(
            fp32, tmp_path / "blocks.onnx", bits=4, measure=lambda _: next(scores), max_drop=10, relative=True
        )
    assert not list(tmp_path.iterdir())
    scores = iter((0.5, 0.4))
    result = quantize_blocks_within(
        fp32, tmp_path / "blocks.onnx", bits=4, measure=lambda _: next(scores), max_drop=10.1
    )
    assert result.rungs[0].drop == pytest.approx(10.0)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_metric_that_is_no_number_is_refused(fp32, tmp_path, bits):
    """NaN is larger than nothing: asked whether it lost too much, a file of NaN once answered no."""
    measure = lambda path: 0.9 if path == fp32 else float("nan")  # noqa: E731
    with pytest.raises(ExportError, match=rf"weights in {bits} bits lose nan points, more than max_drop = 100"):
        quantize_blocks_within(fp32, tmp_path / "blocks.onnx", bits=bits, measure=measure, max_drop=100)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def albert(tmp_path_factory):
    """Six layers that are one: a product's weight is read six times."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "embedding_size": 32, "hidden_size": 64, "intermediate_size": 128}
    config = AlbertConfig(**sizes, num_hidden_layers=6, num_attention_heads=4, num_labels=2)
    path = tmp_path_factory.mktemp("albert") / "model.onnx"
    model = AlbertForSequenceClassification(config).eval()
    export_graph(model, TASKS["text-classification"].graph(["input_ids", "attention_mask"]), path)
    return path


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_that_layers_share_is_stored_once(albert, tmp_path, bits):
    made = quantize_weights(albert, tmp_path / "blocks.onnx", bits=bits)
    names = {value.name for value in onnx.load(made.path).graph.initializer}
    assert sum(f"{weight}.int{bits}" in names for weight in set(made.weights)) == len(set(made.weights))
    assert len(made.weights) > 4 * len(set(made.weights))
    assert made.bytes < 0.6 * albert.stat().st_size
    ids = np.random.default_rng(0).integers(0, 500, (2, 12))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    wanted, found = (OnnxModel(path).predict(batch)["probabilities"] for path in (albert, made.path))
    assert np.abs(wanted - found).max() < 0.05


def test_a_weight_that_layers_share_is_ranked_once(albert):
    names = product_names(albert)
    assert len(names) == len(set(names))
    ids = np.random.default_rng(0).integers(0, 500, (2, 12))
    ranked = rank_products(albert, [{"input_ids": ids, "attention_mask": np.ones_like(ids)}])
    assert sorted(one.name for one in ranked) == sorted(names)
