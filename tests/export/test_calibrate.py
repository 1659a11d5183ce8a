"""What is seen of activations, and what is made of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from distill.candidates import machine_target
from distill.errors import ExportError
from distill.export.calibrate import METHODS, Range, Seen, observe
from distill.export.graph import write
from distill.export.onnx_model import OnnxModel
from distill.export.passes import apply_passes, passes_for
from distill.export.quantize import quantize_int8
from distill.export.sessions import WIDE
from distill.export.smooth import smooth_outliers


def file_of(one: Any, path: Path, target: str = "x86-vnni") -> Path:
    graph = one.graph
    apply_passes(graph, passes_for(target))
    return write(graph, path, {}, {}).path


def seen_of(numbers: np.ndarray) -> Seen:
    rows = numbers.reshape(-1, 1).astype(np.float32)
    limit = float(np.abs(rows).max())
    counts, _ = np.histogram(rows, 2048, range=(-limit, limit))
    return Seen(float(rows.min()), float(rows.max()), np.abs(rows).max(0), rows.sum(0), len(rows), counts)


def test_padding_is_not_looked_at(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """A row in a padded batch gives the same ranges as the row alone."""
    one = tiny("bert")
    path = file_of(one, tmp_path / "model.onnx")
    (batch,) = one.batches((2, 17))
    rows = ((0, 17), (1, 10))
    alone = [{name: column[row : row + 1, :length] for name, column in batch.items()} for row, length in rows]
    together, apart = observe(path, [batch]), observe(path, alone)
    assert together.values.keys() == apart.values.keys()
    assert len(together.values) == 11  # four a layer, one more for the last query, the pooler's and the classifier's
    for name, seen in together.values.items():
        other = apart.values[name]
        assert (seen.low, seen.high, seen.rows) == (other.low, other.high, other.rows)
        np.testing.assert_allclose(seen.mean, other.mean, rtol=1e-6)
        assert seen.histogram.sum() == seen.rows * len(seen.channels)


def test_the_least_and_the_largest_number_are_those_of_the_text(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    one = tiny("bert")
    path = file_of(one, tmp_path / "model.onnx")
    (batch,) = one.batches((1, 9))
    found = observe(path, [batch]).values["gelu"]
    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("gelu"))
    onnx.save(model, tmp_path / "watched.onnx")
    values = OnnxModel(tmp_path / "watched.onnx").predict(batch)["gelu"]
    assert (found.low, found.high) == (values.min(), values.max())
    np.testing.assert_allclose(found.channels, np.abs(values).max(axis=(0, 1)))
    np.testing.assert_allclose(found.mean, values.mean(axis=(0, 1)), atol=1e-6)


def test_a_lone_outlier_widens_the_range_by_min_max_alone() -> None:
    numbers = np.append(np.random.default_rng(0).standard_normal(200_000), 100.0)
    seen = seen_of(numbers)
    assert seen.range_by("min-max").high == 100
    assert 3 < seen.range_by("percentile").high < 6
    assert 1 < seen.range_by("entropy").high < 50
    assert seen.range_by("percentile").low > -6


@pytest.mark.parametrize("numbers", [np.array([1.0, 2.0]), np.array([-3.0, -1.0]), np.zeros(4)])
@pytest.mark.parametrize("method", METHODS)
def test_zero_is_always_within(method: Any, numbers: np.ndarray) -> None:
    """Else zero could not be written exactly, and what masks and ReLU give would move."""
    found = seen_of(numbers).range_by(method)
    assert found.low <= 0 <= found.high
    assert found.scale > 0


def test_zero_has_its_own_step() -> None:
    found = Range(-1.0, 3.0)
    assert found.zero == 64
    assert found.scale == pytest.approx(4 / 255)


def test_calibration_needs_text(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no text to calibrate on"):
        observe(file_of(tiny("bert"), tmp_path / "model.onnx"), [])


@pytest.mark.parametrize("target", ["x86-vnni", "arm64", "portable"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "modernbert", "albert"])
def test_static_int8_answers_nearly_like_fp32(
    family: str, target: Any, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    if family == "albert" and target in WIDE and machine_target() == "x86-avx2":
        pytest.skip("sums of weights that layers share are not exact on x86 without VNNI: docs/graph.md")
    one = tiny(family)
    path = file_of(one, tmp_path / "model.onnx", target)
    batches = one.batches((2, 5), (3, 33), (2, 60))
    seen = observe(path, batches)
    made = quantize_int8(path, tmp_path / "int8.onnx", target=target, ranges=seen.ranges("min-max"), means=seen.means)
    kinds = [node.op_type for node in onnx.load(made.path).graph.node]
    assert "QuantizeLinear" in kinds
    assert "DynamicQuantizeMatMul" not in kinds
    exact, small = OnnxModel(path), OnnxModel(made.path)
    for batch in batches:
        logits = exact.predict(batch)["logits"]
        assert np.abs(small.predict(batch)["logits"] - logits).mean() < 0.15 * max(logits.std(), 1)


def test_onnx_runtime_joins_static_portable_products(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """Left apart, weights would be widened at every call and multiplied in fp32."""
    import onnxruntime

    one = tiny("bert")
    path = file_of(one, tmp_path / "model.onnx", "portable")
    ranges = observe(path, one.batches((2, 9))).ranges("min-max")
    made = quantize_int8(path, tmp_path / "int8.onnx", target="portable", ranges=ranges)
    assert {entry.domain for entry in onnx.load(made.path).opset_import} == {""}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(made.path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "seen.onnx").graph.node]
    assert kinds.count("MatMulIntegerToFloat") == len(made.products) - 1
    assert kinds.count("DynamicQuantizeMatMul") == 1  # the pooler, whose input has two axes


def test_bias_correction_gives_the_exact_mean(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """b - E[x] (Wq - W): on average over the text, a product gives what it gave before its weights were rounded."""
    one = tiny("bert")
    path = file_of(one, tmp_path / "model.onnx")
    name = "bert.encoder.layer.0.intermediate.dense"
    seen = observe(path, one.batches((2, 9)))
    means = {key: np.full(value.mean.shape, 0.5, np.float32) for key, value in seen.values.items()}
    made = quantize_int8(path, tmp_path / "int8.onnx", means=means)
    stored = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(made.path).graph.initializer}
    exact = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}
    weight = stored[f"{name}.weight.int8"] * stored[f"{name}.weight.scale"]
    mean = np.full(32, 0.5)
    wanted = mean @ exact[f"{name}.weight"] + exact[f"{name}.bias"]
    assert np.abs(mean @ weight + exact[f"{name}.bias"] - wanted).max() > 1e-4  # without it
    np.testing.assert_allclose(mean @ weight + stored[f"{name}.bias.corrected"], wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "albert"])
def test_smoothing_changes_no_answer_in_fp32(family: str, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    one = tiny(family)
    path = file_of(one, tmp_path / "model.onnx")
    batches = one.batches((2, 5), (3, 33))
    seen = observe(path, batches)
    for each in seen.values.values():
        each.channels[3] *= 50  # every value is told to have an outlier
    names = smooth_outliers(path, tmp_path / "smoothed.onnx", seen)
    assert names
    exact, smoothed = OnnxModel(path), OnnxModel(tmp_path / "smoothed.onnx")
    for batch in batches:
        np.testing.assert_allclose(smoothed.predict(batch)["logits"], exact.predict(batch)["logits"], atol=1e-4)


def test_values_without_outliers_are_left_alone(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    one = tiny("bert")
    path = file_of(one, tmp_path / "model.onnx")
    seen = observe(path, one.batches((2, 9)))
    for each in seen.values.values():
        each.channels[:] = 1
    assert smooth_outliers(path, tmp_path / "smoothed.onnx", seen) == ()


def test_a_pre_norm_layer_is_smoothed_for_nothing(tiny: Callable[[str], Any], tmp_path: Path) -> None:
    """The factors go into the LayerNormalization in front: not one node more."""
    one = tiny("modernbert")
    path = file_of(one, tmp_path / "model.onnx")
    seen = observe(path, one.batches((2, 9)))
    nodes = onnx.load(path).graph.node
    norms = {node.output[0] for node in nodes if node.op_type == "LayerNormalization"}
    into_products = {name for name in norms if {node.op_type for node in nodes if name in node.input} == {"MatMul"}}
    for name, each in seen.values.items():
        each.channels[:] = 1
        each.channels[3] = 50 if name in into_products else 1
    names = smooth_outliers(path, tmp_path / "smoothed.onnx", seen)
    assert len(names) == 3  # two feed-forward blocks, and attention but for the first layer's
    smoothed = [node.op_type for node in onnx.load(tmp_path / "smoothed.onnx").graph.node]
    assert smoothed.count("Mul") == [node.op_type for node in nodes].count("Mul")
