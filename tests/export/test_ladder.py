"""The gate is real: a model that plain int8 ruins is either repaired or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from distill.errors import ExportError
from distill.export.graph import write
from distill.export.ladder import quantize_within, rank_products
from distill.export.onnx_model import OnnxModel
from distill.export.passes import apply_passes

OUTLIER = "bert.encoder.layer.0.output.dense.weight"
BIAS = "bert.encoder.layer.0.output.dense.bias"


def planted_with(kind: str, graph: Any, numbers: np.ndarray) -> Any:
    """Puts Mul or Add with `numbers` (K,) between the activation function and the product that reads it."""
    import onnx_ir as ir

    product = graph.graph.initializers[OUTLIER].uses()[0].node
    gelu = product.inputs[0].producer()
    vector = ir.Value(name="planted", const_value=ir.tensor(numbers), type=ir.TensorType(ir.DataType.FLOAT))
    graph.graph.register_initializer(vector)
    node = ir.node(kind, [gelu.outputs[0], vector])
    graph.graph.insert_after(gelu, node)
    product.replace_input_with(0, node.outputs[0])


def changed(graph: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    import onnx_ir as ir

    value = graph.graph.initializers[name]
    value.const_value = ir.tensor(change(value.const_value.numpy()).astype(np.float32), name=name)


@pytest.fixture
def planted(tiny: Callable[[str], Any], tmp_path: Path) -> Path:
    """A graph in which one product reads a channel a thousand times larger than the others.

    The channel's weights are as much smaller, so that fp32 answers as before; in int8 one scale must serve all channels
    of the product's input, and everything but the outlier is rounded to nothing.
    """
    graph = tiny("bert").graph
    apply_passes(graph)
    factors = np.ones(64, np.float32)
    factors[5] = 1000
    changed(graph, OUTLIER, lambda weight: weight / factors[:, None])
    planted_with("Mul", graph, factors)
    return write(graph, tmp_path / "planted.onnx", {}, {}).path


@pytest.fixture
def shifted(tiny: Callable[[str], Any], tmp_path: Path) -> Path:
    """A graph in which every channel of one product's input is shifted by up to 300, and its bias takes that back.

    No channel is larger than the others, so nothing can be moved into weights: only fp32 helps.
    """
    graph = tiny("bert").graph
    apply_passes(graph)
    shift = np.where(np.arange(64) % 2, 300, -300).astype(np.float32)
    weight = graph.graph.initializers[OUTLIER].const_value.numpy().astype(np.float64)
    changed(graph, BIAS, lambda bias: bias - shift @ weight)
    planted_with("Add", graph, shift)
    return write(graph, tmp_path / "planted.onnx", {}, {}).path


@pytest.fixture
def batches(tiny: Callable[[str], Any]) -> list[dict[str, np.ndarray]]:
    return tiny("bert").batches(*[(2, 9), (2, 17)] * 60)


@pytest.fixture
def agreement(batches: Sequence[Any], tmp_path: Path) -> Callable[[Path], float]:
    """Share of rows with the fp32 graph's answer, of those whose answer is no toss-up: random weights are unsure."""

    def logits(path: Path) -> np.ndarray:
        model = OnnxModel(path)
        return np.concatenate([model.predict(batch)["logits"] for batch in batches])

    def measure(path: Path) -> float:
        wanted = logits(tmp_path / "planted.onnx")
        ordered = np.sort(wanted, axis=1)
        sure = ordered[:, -1] - ordered[:, -2] > 0.1
        return float((logits(path).argmax(-1) == wanted.argmax(-1))[sure].mean())

    return measure


Measured = Callable[[Path], float]


def test_an_outlier_channel_is_moved_into_the_weights(
    planted: Path, batches: Sequence[Any], agreement: Measured, tmp_path: Path
) -> None:
    result = quantize_within(planted, tmp_path / "int8.onnx", measure=agreement, max_drop=0.5, batches=batches)
    assert [rung.drop > 5 for rung in result.rungs] == [True, False]
    assert result.rungs[-1].drop <= 0.5
    assert result.rungs[0].form == "dynamic"
    assert result.rungs[1].form.startswith("dynamic, smoothed")
    assert result.said(0.5).startswith(
        f"plain int8 loses {result.rungs[0].drop:.2f} points; taken instead: dynamic, smoo"
    )
    assert OUTLIER in result.graph.products  # nothing had to stay in fp32
    assert 100 * (1 - agreement(result.graph.path)) == pytest.approx(result.rungs[-1].drop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "planted.onnx"]


def test_without_repair_it_is_plain_int8_or_nothing(planted: Path, agreement: Measured, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"measure": agreement, "batches": [], "repair": False}
    lost = r"plain int8 loses \d+\.\d\d points, more than max_drop = 0\.5; repairs .*export\.repair = true.*No file"
    with pytest.raises(ExportError, match=lost):
        quantize_within(planted, tmp_path / "int8.onnx", max_drop=0.5, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["planted.onnx"]
    result = quantize_within(planted, tmp_path / "int8.onnx", max_drop=100, **settings)
    assert [rung.form for rung in result.rungs] == ["dynamic"]


def test_the_culprit_is_found_and_kept(
    shifted: Path, batches: Sequence[Any], agreement: Measured, tmp_path: Path
) -> None:
    result = quantize_within(shifted, tmp_path / "int8.onnx", measure=agreement, max_drop=0.5, batches=batches)
    assert result.rungs[0].drop > 5
    assert result.rungs[-1].drop <= 0.5
    assert [rung.form.rsplit(", ", 1)[-1] for rung in result.rungs[-2:]] == ["1 in fp32", "1 in fp16"]
    assert result.rungs[-2].bytes - result.rungs[-1].bytes == pytest.approx(64 * 32 * 2, abs=300)  # half of the weight
    stored = {value.name: value.data_type for value in onnx.load(result.graph.path).graph.initializer}
    assert stored[f"{OUTLIER}.fp16"] == onnx.TensorProto.FLOAT16
    assert OUTLIER not in stored
    assert result.graph.bytes == result.graph.path.stat().st_size == result.rungs[-1].bytes
    assert result.sensitivity[0].name == OUTLIER
    assert result.sensitivity[0].error > 5 * result.sensitivity[1].error
    assert OUTLIER in result.graph.kept
    assert 100 * (1 - agreement(result.graph.path)) == pytest.approx(result.rungs[-1].drop)
    assert result.as_dict()["rungs"][0]["kept"] == ()


def test_what_fp16_would_lose_stays_in_fp32(
    shifted: Path, batches: Sequence[Any], agreement: Measured, tmp_path: Path
) -> None:
    def without_half(path: Path) -> float:
        kinds = {value.data_type for value in onnx.load(path).graph.initializer}
        return 0.5 if onnx.TensorProto.FLOAT16 in kinds else agreement(path)

    result = quantize_within(shifted, tmp_path / "int8.onnx", measure=without_half, max_drop=0.5, batches=batches)
    assert [rung.form.rsplit(", ", 1)[-1] for rung in result.rungs[-2:]] == ["1 in fp16", "1 in fp32"]
    assert [rung.drop <= 0.5 for rung in result.rungs[-2:]] == [False, True]
    assert without_half(result.graph.path) == agreement(result.graph.path)


def test_ranges_seen_beforehand_come_last(
    shifted: Path, batches: Sequence[Any], agreement: Measured, tmp_path: Path
) -> None:
    def static_alone(path: Path) -> float:
        kinds = {node.op_type for node in onnx.load(path).graph.node}
        return 1.0 if path == shifted or "QuantizeLinear" in kinds else 0.9

    result = quantize_within(shifted, tmp_path / "int8.onnx", measure=static_alone, max_drop=0.5, batches=batches)
    forms = [rung.form for rung in result.rungs]
    assert forms[0] == "dynamic"
    assert all(form.startswith("dynamic") for form in forms[:-1])
    assert forms[-1].startswith("static (")
    assert OnnxModel(result.graph.path).predict(batches[0])["logits"].shape == (2, 3)


def test_what_cannot_be_repaired_is_not_written(
    shifted: Path, batches: Sequence[Any], agreement: Measured, tmp_path: Path
) -> None:
    def strict(path: Path) -> float:
        return agreement(path) if path == shifted else min(agreement(path), 0.9)

    with pytest.raises(ExportError, match=rf"int8 loses 10\.00 points at best .*max_drop = 0\.5; .*{OUTLIER}"):
        quantize_within(shifted, tmp_path / "int8.onnx", measure=strict, max_drop=0.5, batches=batches)
    assert [path.name for path in tmp_path.iterdir()] == ["planted.onnx"]


def test_a_file_that_is_good_enough_at_once_is_not_searched_for(
    planted: Path, agreement: Measured, tmp_path: Path
) -> None:
    result = quantize_within(planted, tmp_path / "int8.onnx", measure=agreement, max_drop=100, batches=[])
    assert len(result.rungs) == 1
    assert not result.sensitivity


def test_sensitivity_needs_text(planted: Path) -> None:
    with pytest.raises(ExportError, match="there is no text to measure sensitivity on"):
        rank_products(planted, [])
