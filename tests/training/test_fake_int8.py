"""A model that rounds as its int8 file does gives what the file gives, and learns to live with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from distill.errors import ExportError
from distill.export import lookups
from distill.export.graph import export_graph
from distill.export.ladder import quantize_within
from distill.export.onnx_model import OnnxModel
from distill.export.passes import DEFAULT
from distill.export.quantize import LARGEST, exact_names, quantize_int8
from distill.tasks.text_classification import TextClassification
from distill.training.fake_int8 import (
    FEW_COLUMNS,
    FEW_ROWS,
    compute_in_floats,
    compute_in_int8,
    rounded,
    rounded_input,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
SPEC = TextClassification().graph(["input_ids", "attention_mask"])
WHOLE = tuple(each for each in DEFAULT if each.name != "first token early")
"""Without the pass after which the last layer's ranges are those of one token."""


def model_of(family: str) -> Any:
    """Random weights, large enough that rounding shows."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **SHAPE)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """By family and inputs: the graph of `model_of`, traced once for all targets."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def export(family: str, *inputs: str) -> Path:
        spec = TextClassification().graph(inputs)
        return export_graph(model_of(family), spec, folder / f"{family}.onnx", passes=WHOLE).path

    return export


def text(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(3, 99, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def logits(model: Any, batch: dict[str, np.ndarray]) -> torch.Tensor:
    return model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits


@pytest.mark.parametrize("target", ["x86-vnni", "x86-avx2"])
def test_training_sees_the_numbers_of_the_file(target: Any, whole: Callable[..., Path], tmp_path: Path) -> None:
    """Scales and int8 weights are those of the file, so that what was learned is what ships."""
    model, batch = model_of("modernbert"), text(3, 17)
    source = whole("modernbert", *batch)
    quantize_int8(source, tmp_path / "int8.onnx", target=target)
    exact = logits(model, batch).detach().numpy()
    compute_in_int8(model, largest=LARGEST[target], exact=exact_names(source))
    ours = logits(model, batch).detach().numpy()
    theirs = OnnxModel(tmp_path / "int8.onnx").predict(batch)["logits"]
    assert np.abs(theirs - ours).max() < 1e-5 * exact.std()
    assert np.abs(theirs - exact).max() > 1e-3 * exact.std()


@pytest.mark.parametrize("target", ["x86-vnni", "x86-avx2"])
def test_positions_are_rounded_as_words_are(target: Any, whole: Callable[..., Path], tmp_path: Path) -> None:
    """BERT's positions are a table that the file keeps in int8; its two token types are not."""
    model = model_of("bert")
    batch = {**text(3, 17), "token_type_ids": np.arange(51).reshape(3, 17) % 2}
    source = whole("bert", *batch)
    made = quantize_int8(source, tmp_path / "int8.onnx", target=target)
    exact = logits(model, batch).detach().numpy()
    rounded_ones = compute_in_int8(model, largest=LARGEST[target], exact=exact_names(source))
    tables = {table.name.split(".weight")[0] + ".weight" for table in made.tables}  # passes put words behind a name
    assert {name for name in rounded_ones if "embeddings" in name} == tables
    ours = logits(model, batch).detach().numpy()
    theirs = OnnxModel(tmp_path / "int8.onnx").predict(batch)["logits"]
    assert np.abs(theirs - ours).max() < 1e-5 * exact.std()
    assert np.abs(theirs - exact).max() > 1e-3 * exact.std()
    assert (FEW_ROWS, FEW_COLUMNS) == (lookups.FEW_ROWS, lookups.FEW_COLUMNS)


def test_names_of_weights_stay_and_the_swap_is_taken_back() -> None:
    model, batch = model_of("bert"), text(2, 9)
    before, names = logits(model, batch), list(model.state_dict())
    swapped = compute_in_int8(model, exact=["classifier.weight.product"])
    assert len(swapped) == 15  # six a layer, the pooler, words and positions
    assert "classifier.weight" not in swapped
    assert list(model.state_dict()) == names
    assert not torch.equal(logits(model, batch), before)
    compute_in_floats(model)
    assert torch.equal(logits(model, batch), before)


def test_weights_of_language_models_are_turned() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=99, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    product = model.transformer.h[0].mlp.c_fc
    x = torch.randn(2, 5, 32)
    by_hand = rounded_input(x) @ rounded(product.weight.T, 127, axis=1).T + product.bias
    assert "transformer.h.0.mlp.c_fc.weight" in compute_in_int8(model)
    torch.testing.assert_close(product(x), by_hand)


def test_rounding_lets_gradients_through() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    rounded(weight, 127, axis=1).sum().backward()
    assert torch.equal(weight.grad, torch.ones(4, 6))
    x = torch.tensor([[0.0, 1.0, 2.55]], requires_grad=True)
    kept = rounded_input(x)
    torch.testing.assert_close(kept, x)
    assert torch.equal(rounded_input(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(rounded(torch.zeros(2, 3), 127, axis=1), torch.zeros(2, 3))


@pytest.fixture
def shifted() -> Any:
    """A model in which numbers between layers lie around plus or minus 20 and biases take that back.

    No channel is larger than the others and nearly every product reads such numbers: neither smoothing nor a few
    products in fp32 help.
    """
    model = model_of("bert")
    shift = torch.where(torch.arange(32) % 2 == 0, 20.0, -20.0)
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias += shift
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            for product in (attention.query, attention.key, attention.value):
                product.bias -= product.weight @ shift
            attention.value.bias += shift
            output = layer.attention.output
            output.dense.bias -= shift + output.dense.weight @ shift
            output.LayerNorm.bias += shift
            layer.intermediate.dense.bias -= layer.intermediate.dense.weight @ shift
            layer.output.dense.bias -= shift
            layer.output.LayerNorm.bias += shift
        model.bert.pooler.dense.bias -= model.bert.pooler.dense.weight @ shift
    return model


def wholly_dynamic(path: Path) -> bool:
    nodes = onnx.load(path).graph.node
    floats = [node for node in nodes if node.op_type == "MatMul" and ".weight" in node.input[1]]
    return len(floats) == 1 and all(node.op_type != "QuantizeLinear" for node in nodes)  # the classifier stays exact


def test_what_nothing_else_repairs_is_trained(shifted: Any, tmp_path: Path) -> None:
    batches = [text(8, length, seed) for seed, length in enumerate([9, 17, 30] * 6)]
    wanted = [logits(shifted, batch).detach() for batch in batches]
    source = tmp_path / "model.onnx"
    export_graph(shifted, SPEC, source)

    def measure(path: Path) -> float:
        """Share of rows with the fp32 model's answer; this caller wants all in int8, with ranges as they come."""
        if path != source and not wholly_dynamic(path):
            return 0.0
        said = [OnnxModel(path).predict(batch)["logits"].argmax(-1) for batch in batches]
        return float(np.mean([one == two.argmax(-1).numpy() for one, two in zip(said, wanted, strict=True)]))

    def learn(path: Path, exact: Sequence[str]) -> None:
        model = copy.deepcopy(shifted)
        compute_in_int8(model, largest=LARGEST["x86-avx2"], exact=exact)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        for step in range(450):
            optimizer.param_groups[0]["lr"] = 1e-4 * (1 - step / 450)
            number = step % len(batches)
            loss = torch.nn.functional.mse_loss(logits(model, batches[number]), wanted[number])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        compute_in_floats(model)
        export_graph(model, SPEC, path)

    settings: dict[str, Any] = {"measure": measure, "batches": batches, "target": "x86-avx2", "max_drop": 2.0}
    with pytest.raises(ExportError, match="more than max_drop = 2"):
        quantize_within(source, tmp_path / "int8.onnx", **settings)
    result = quantize_within(source, tmp_path / "int8.onnx", learn=learn, **settings)
    assert result.rungs[0].drop > 5
    assert result.rungs[-1].form == "dynamic, trained in int8"
    assert measure(result.graph.path) == pytest.approx(result.rungs[-1].metric)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "model.onnx"]
