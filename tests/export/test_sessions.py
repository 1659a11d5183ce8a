"""Sums of bytes are exact on every processor, for files that were made for processors where they are."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from distill.errors import BundleError
from distill.export import sessions
from distill.export.onnx_model import OnnxModel
from distill.export.passes.fused_attention import OPSET
from distill.export.quantize import LARGEST, Target, quantize_dynamic_int8
from distill.export.sessions import PRECISE, PRODUCT, WIDE, overflows
from distill.export.single_file import metadata_of
from distill.export.text import TextModel
from distill.machine import describe_machine

K, N = 64, 2000
"""N is more than the labels whose product stays in fp32."""


@pytest.fixture
def fp32(tmp_path: Path) -> Path:
    """A product whose weights are all as large as they come: pairs of them overflow 16 bits."""
    signs = np.where(np.random.default_rng(0).random((K, N)) < 0.5, -0.5, 0.5).astype(np.float32)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", N])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y])
    graph.initializer.append(numpy_helper.from_array(signs, "w"))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def in_integers(x: np.ndarray, path: Path) -> np.ndarray:
    """The product of the file's own int8 weights in 64 bits, x rounded as DynamicQuantizeLinear does."""
    stored = {value.name: numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}
    low, high = min(0.0, float(x.min())), float(x.max())
    scale = np.float32((high - low) / 255)
    zero = round(-low / scale)
    numbers = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64) - zero
    return (numbers @ stored["w.int8"].astype(np.int64)) * np.float64(scale) * stored["w.scale"]


@pytest.mark.parametrize("target", LARGEST)
def test_products_are_exact_on_this_machine(target: Target, fp32: Path, tmp_path: Path) -> None:
    """Without VNNI, ONNX Runtime's own choice is off by as much as the numbers are large."""
    made = quantize_dynamic_int8(fp32, tmp_path / "int8.onnx", target=target)
    x = np.random.default_rng(1).random((3, K), np.float32)
    np.testing.assert_allclose(OnnxModel(made.path).predict({"x": x})["y"], in_integers(x, made.path), atol=1e-4)


def test_a_processor_with_vnni_does_not_overflow() -> None:
    """Asked of ONNX Runtime, since what processors have is not told everywhere; the graph it is asked with is this."""
    a, b, y = (
        helper.make_tensor_value_info(name, dtype, shape)
        for name, dtype, shape in (
            ("a", TensorProto.UINT8, ["m", "k"]),
            ("b", TensorProto.INT8, ["k", "n"]),
            ("y", TensorProto.INT32, ["m", "n"]),
        )
    )
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "g", [a, b], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=5)
    model.producer_name = ""
    assert onnx.load_from_string(PRODUCT) == model
    flags = set(describe_machine()["flags"])
    if not flags:
        pytest.skip("what this processor has is not told here")
    assert overflows() == ("avx2" in flags and not flags & {"avx512_vnni", "avx_vnni", "amx_int8"})


@pytest.mark.parametrize("overflow", [True, False])
def test_the_switch_is_set_where_wide_weights_overflow(
    overflow: bool, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that keeps weights to 7 bits is exact without it; processors with AMX are slow with it."""
    monkeypatch.setattr(sessions, "overflows", lambda: overflow)
    assert {target for target, largest in LARGEST.items() if largest > 63} == set(WIDE)
    for target in LARGEST:
        made = quantize_dynamic_int8(fp32, tmp_path / f"{target}.onnx", target=target)
        options = OnnxModel(made.path).session.get_session_options()
        if target in WIDE and overflow:
            assert options.get_session_config_entry(PRECISE) == "1"
        else:
            with pytest.raises(Exception, match="does not have configuration"):
                options.get_session_config_entry(PRECISE)


@pytest.mark.parametrize("target", WIDE)
def test_weights_that_several_products_share_load_everywhere(target: Target, fp32: Path, tmp_path: Path) -> None:
    """On x86 without VNNI ONNX Runtime 1.32 refuses such a file with the switch."""
    model = onnx.load(fp32)
    model.graph.node.append(helper.make_node("MatMul", ["x2", "w"], ["y2"]))
    model.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, ["B", K]))
    model.graph.output.append(helper.make_tensor_value_info("y2", TensorProto.FLOAT, ["B", N]))
    onnx.save(model, tmp_path / "shared.onnx")
    made = quantize_dynamic_int8(tmp_path / "shared.onnx", tmp_path / "int8.onnx", target=target)
    x = np.random.default_rng(1).random((3, K), np.float32)
    found = OnnxModel(made.path).predict({"x": x, "x2": x})
    np.testing.assert_array_equal(found["y"], found["y2"])


def test_metadata_is_read_before_there_is_a_session(fp32: Path, tmp_path: Path) -> None:
    said = {"distill.labels": '["schön", "häßlich"]', "empty": ""}
    made = quantize_dynamic_int8(fp32, tmp_path / "int8.onnx", target="wasm", metadata=said)
    assert metadata_of(made.path) == metadata_of(made.path.read_bytes()) == {**said, "distill.target": "wasm"}
    assert metadata_of(made.path) == OnnxModel(made.path).metadata
    assert metadata_of(fp32) == {}


def test_metadata_that_breaks_off(tmp_path: Path) -> None:
    broken = bytes([14 << 3 | 2, 2, 1 << 3 | 2, 0xFF])  # an entry whose key has no length
    with pytest.raises(BundleError, match="its metadata cannot be read"):
        metadata_of(broken)
    (tmp_path / "broken.onnx").write_bytes(broken)
    with pytest.raises(BundleError, match=r"broken\.onnx: its metadata cannot be read"):
        metadata_of(tmp_path / "broken.onnx")


def test_a_text_model_sums_as_its_bundle_does(fp32: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_extensions", reason='needs pip install "distill[text]"')
    made = quantize_dynamic_int8(fp32, tmp_path / "int8.onnx", target="arm64")
    x = np.random.default_rng(1).random((3, K), np.float32)
    session: onnxruntime.InferenceSession = TextModel(made.path).session
    np.testing.assert_allclose(session.run(None, {"x": x})[0], in_integers(x, made.path), atol=1e-4)


def test_the_oldest_runtime_allowed_knows_what_files_are_made_of() -> None:
    """ONNX Runtime 1.23 is the first that takes opset 23 with Attention; an older one refuses every file for x86."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    (least,) = [line.split(">=")[1] for line in project["dependencies"] if line.startswith("onnxruntime>=")]
    assert OPSET == 23
    assert tuple(map(int, least.split("."))) >= (1, 23)
