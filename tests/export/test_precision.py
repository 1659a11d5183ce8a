"""Files in other precisions than int8, and ORT's own format."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from distill.errors import BundleError, ExportError
from distill.export.graph import write
from distill.export.onnx_model import OnnxModel
from distill.export.ort_format import write_ort, write_ort_files
from distill.export.passes import apply_passes, passes_for
from distill.export.precision import halve_weights, quantize_weights, store_floats_within
from distill.export.quantize import quantize_dynamic_int8


@pytest.fixture
def fp32(tiny: Callable[[str], Any], tmp_path: Path) -> Path:
    graph = tiny("bert").graph
    apply_passes(graph)
    return write(graph, tmp_path / "model.onnx", {"distill.format": "1"}, {}).path


def logits(path: Path, one: Any) -> np.ndarray:
    model = OnnxModel(path)
    return np.concatenate([model.predict(batch)["logits"] for batch in one.batches((1, 5), (3, 33))])


def logits_as_any_program_gets_them(path: Path, one: Any) -> np.ndarray:
    """Without the option that makes sums exact on x86 without VNNI: an .ort file is past what it changes."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], batch)[0] for batch in one.batches((1, 5), (3, 33))])


def test_half_precision_halves_the_file_and_keeps_the_answers(
    fp32: Path, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    made = halve_weights(fp32, tmp_path / "half.onnx")
    exact = logits(fp32, tiny("bert"))
    assert np.abs(logits(made.path, tiny("bert")) - exact).max() < 0.01 * exact.std()
    stored = {value.name: value for value in onnx.load(made.path).graph.initializer}
    halves = sum(int(np.prod(value.dims)) for value in stored.values() if value.data_type == onnx.TensorProto.FLOAT16)
    before = onnx.load(fp32).graph.initializer
    numbers = sum(int(np.prod(value.dims)) for value in before if value.data_type == onnx.TensorProto.FLOAT)
    assert halves > 0.9 * numbers
    assert OnnxModel(made.path).metadata == {"distill.format": "1", "distill.weights": "fp16"}


def test_half_precision_refuses_what_it_cannot_hold(fp32: Path, tmp_path: Path) -> None:
    model = onnx.load(fp32)
    weight = next(value for value in model.graph.initializer if value.name.endswith("intermediate.dense.weight"))
    numbers = onnx.numpy_helper.to_array(weight).copy()
    numbers[0, 0] = 1e6
    weight.CopyFrom(onnx.numpy_helper.from_array(numbers, weight.name))
    onnx.save(model, tmp_path / "large.onnx")
    with pytest.raises(ExportError, match=r"intermediate\.dense\.weight holds 1e\+06"):
        halve_weights(tmp_path / "large.onnx", tmp_path / "half.onnx")
    assert not (tmp_path / "half.onnx").exists()


@pytest.mark.parametrize("bits, error", [(8, 0.05), (4, 0.6)])
def test_weights_alone_in_few_bits(
    bits: Any, error: float, fp32: Path, tiny: Callable[[str], Any], tmp_path: Path
) -> None:
    made = quantize_weights(fp32, tmp_path / "few.onnx", bits=bits, block=32)
    exact = logits(fp32, tiny("bert"))
    off = np.sqrt(np.mean((logits(made.path, tiny("bert")) - exact) ** 2)) / exact.std()
    assert 0 < off < error
    nodes = onnx.load(made.path).graph.node
    used = {attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"}
    assert used == {bits}
    assert [node.op_type for node in nodes].count("MatMulNBits") >= 8
    assert any("word_embeddings" in table.name and table.bits == 8 for table in made.tables)
    assert made.bytes < fp32.stat().st_size


def test_four_bits_are_less_than_eight(fp32: Path, tmp_path: Path) -> None:
    four, eight = (quantize_weights(fp32, tmp_path / f"{bits}.onnx", bits=bits) for bits in (4, 8))
    assert four.bytes < eight.bytes


def test_a_file_without_products_is_refused(fp32: Path, tmp_path: Path) -> None:
    small = quantize_dynamic_int8(fp32, tmp_path / "int8.onnx", target="portable")
    model = onnx.load(small.path)
    kept = [node for node in model.graph.node if node.op_type in ("Shape", "Cast")][:1]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(kept[0].output[0]))
    onnx.save(model, tmp_path / "none.onnx")
    with pytest.raises(ExportError, match="no product with weights is in it"):
        quantize_weights(tmp_path / "none.onnx", tmp_path / "few.onnx")


@pytest.mark.parametrize("target", ["arm64", "x86-vnni", "portable"])
def test_the_ort_file_answers_as_the_onnx_file(target: Any, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    one = tiny("bert")
    graph = one.graph
    apply_passes(graph, passes_for(target))
    source = write(graph, tmp_path / "model.onnx", {"distill.format": "1"}, {}).path
    small = quantize_dynamic_int8(source, tmp_path / "int8.onnx", target=target)
    made = write_ort(small.path, tmp_path / "phone", x86=target.startswith("x86"))
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    given = logits_as_any_program_gets_them(made.path, one)
    np.testing.assert_allclose(given, logits_as_any_program_gets_them(small.path, one), atol=1e-5)
    assert session.get_modelmeta().custom_metadata_map == OnnxModel(small.path).metadata
    assert any(line.startswith("com.microsoft;1;") and "MatMul" in line for line in made.operators)
    assert sorted(path.name for path in (tmp_path / "phone").iterdir()) == ["int8.ort", "required_operators.config"]


def test_what_is_no_model_cannot_be_converted(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match=r"no\.onnx: ONNX Runtime cannot convert it"):
        write_ort(tmp_path / "no.onnx", tmp_path / "phone")


@pytest.mark.parametrize("half", [True, False])
def test_floats_on_request_pass_the_gate_or_are_refused(half: bool, fp32: Path, tmp_path: Path) -> None:
    path = tmp_path / "ships.onnx"

    def measure(file: Path) -> float:
        return 0.9 if file == fp32 else 0.88

    limits: dict[str, Any] = {"half": half, "measure": measure, "metadata": {"distill.target": "arm64"}}
    result = store_floats_within(fp32, path, max_drop=2.5, **limits)
    name = "fp16" if half else "fp32"
    assert [(rung.form, round(rung.drop, 6)) for rung in result.rungs] == [(f"weights in {name}", 2.0)]
    assert OnnxModel(path).metadata == {
        "distill.format": "1",
        "distill.target": "arm64",
        "distill.weights": name,
    }
    assert result.graph.target == "arm64"
    assert not result.graph.products
    assert "bert.encoder.layer.0.output.dense.weight" in result.graph.kept
    with pytest.raises(ExportError, match=f"weights in {name} lose 2.00 points, more than max_drop = 1"):
        store_floats_within(fp32, path, max_drop=1.0, **limits)
    assert not path.exists()


@pytest.mark.parametrize("half", [True, False])
def test_a_metric_that_is_no_number_is_refused(half: bool, fp32: Path, tmp_path: Path) -> None:
    """NaN is larger than nothing: asked whether it lost too much, a file of NaN once answered no."""

    def measure(file: Path) -> float:
        return 0.9 if file == fp32 else float("nan")

    with pytest.raises(ExportError, match="lose nan points, more than max_drop = 100"):
        store_floats_within(fp32, tmp_path / "ships.onnx", half=half, measure=measure, max_drop=100)
    assert not (tmp_path / "ships.onnx").exists()


def test_the_runtime_loads_ort_files(fp32: Path, tiny: Callable[[str], Any], tmp_path: Path) -> None:
    small = quantize_dynamic_int8(fp32, tmp_path / "int8.onnx", target="arm64")
    made = write_ort(small.path, tmp_path / "phone")
    expected = logits_as_any_program_gets_them(small.path, tiny("bert"))
    np.testing.assert_allclose(logits(made.path, tiny("bert")), expected, atol=1e-5)
    broken = tmp_path / "broken.ort"
    broken.write_bytes(made.path.read_bytes()[:500])
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it"):
        OnnxModel(broken)


def test_two_files_that_ship_together_share_one_list_of_operators(tmp_path: Path) -> None:
    """A runtime that was reduced to the decoder's operators could not read the encoder."""
    for kind in ("Sin", "Sigmoid"):
        value = onnx.helper.make_tensor_value_info
        node = onnx.helper.make_node(kind, ["x"], ["y"])
        ends = [[value(name, onnx.TensorProto.FLOAT, [None])] for name in ("x", "y")]
        graph = onnx.helper.make_graph([node], kind, *ends)
        opsets = [onnx.helper.make_opsetid("", 20)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / f"{kind}.onnx")
    made = write_ort_files([tmp_path / "Sin.onnx", tmp_path / "Sigmoid.onnx"], tmp_path / "phone")
    lines = (tmp_path / "phone/required_operators.config").read_text().splitlines()
    assert tuple(lines) == made[0].operators == made[1].operators
    assert {name for line in lines for name in line.split(";")[2].split(",")} == {"Sin", "Sigmoid"}
    assert sorted(path.name for path in (tmp_path / "phone").glob("*.ort")) == ["Sigmoid.ort", "Sin.ort"]


@pytest.mark.parametrize("x86", [True, False])
def test_only_x86_gets_operators_that_it_alone_has(x86: bool, tmp_path: Path) -> None:
    """ONNX Runtime blocks the channels of convolutions for x86 (`com.microsoft.nchwc`); browsers and phones cannot."""
    value, random = onnx.helper.make_tensor_value_info, np.random.default_rng(0)
    weights = onnx.numpy_helper.from_array(random.standard_normal((32, 3, 8, 8), np.float32), "w")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], strides=[8, 8])
    ends = [[value("x", onnx.TensorProto.FLOAT, [1, 3, 32, 32])], [value("y", onnx.TensorProto.FLOAT, [1, 32, 4, 4])]]
    graph = onnx.helper.make_graph([node], "patches", *ends, initializer=[weights])
    opsets = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "patches.onnx")
    made = write_ort(tmp_path / "patches.onnx", tmp_path / "phone", x86=x86)
    assert any("nchwc" in line for line in made.operators) == (x86 and platform.machine() == "x86_64")
