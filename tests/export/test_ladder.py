"""The gate is real: a model that plain int8 ruins is either repaired or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import ExportError
from distill.export.graph import write
from distill.export.ladder import quantize_within, rank_products
from distill.export.passes import apply_passes
from distill.export.runtime import OnnxModel

OUTLIER = "bert.encoder.layer.0.output.dense.weight"


@pytest.fixture
def planted(tiny: Callable[[str], Any], tmp_path: Path) -> Path:
    """A graph in which one product reads a channel a thousand times larger than the others.

    The channel's weights are as much smaller, so that fp32 answers as before; in int8 one scale must serve all channels
    of the product's input, and everything but the outlier is rounded to nothing.
    """
    import onnx_ir as ir

    graph = tiny("bert").graph
    apply_passes(graph)
    weight = graph.graph.initializers[OUTLIER]
    numbers = weight.const_value.numpy().copy()
    gelu = next(use.node for use in weight.uses()).inputs[0].producer()
    factors = np.ones(numbers.shape[0], np.float32)
    factors[5] = 1000
    scale = ir.Value(name="factors", const_value=ir.tensor(factors), type=ir.TensorType(ir.DataType.FLOAT))
    graph.graph.register_initializer(scale)
    mul = ir.node("Mul", [gelu.outputs[0], scale])
    graph.graph.insert_after(gelu, mul)
    weight.uses()[0].node.replace_input_with(0, mul.outputs[0])
    weight.const_value = ir.tensor(numbers / factors[:, None], name=OUTLIER)
    return write(graph, tmp_path / "planted.onnx", {}, {}).path


@pytest.fixture
def batches(tiny: Callable[[str], Any]) -> list[dict[str, np.ndarray]]:
    return tiny("bert").batches((64, 9), (64, 17))


@pytest.fixture
def agreement(planted: Path, batches: Sequence[Any]) -> Callable[[Path], float]:
    """Share of rows that get the fp32 graph's answer: a metric of which fp32 reaches 1."""

    def answers(path: Path) -> np.ndarray:
        model = OnnxModel(path)
        return np.concatenate([model.predict(batch)["logits"].argmax(-1) for batch in batches])

    wanted = answers(planted)
    return lambda path: float((answers(path) == wanted).mean())


def test_the_culprit_is_found_and_kept(
    planted: Path, batches: Sequence[Any], agreement: Callable[[Path], float], tmp_path: Path
) -> None:
    result = quantize_within(planted, tmp_path / "int8.onnx", measure=agreement, max_drop=0.5, batches=batches)
    assert result.rungs[0].drop > 5
    assert result.rungs[-1].drop <= 0.5
    assert result.sensitivity[0].name == OUTLIER
    assert result.sensitivity[0].error > 5 * result.sensitivity[1].error
    assert OUTLIER in result.graph.kept
    assert 100 * (1 - agreement(result.graph.path)) == pytest.approx(result.rungs[-1].drop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int8.onnx", "planted.onnx"]
    assert result.as_dict()["rungs"][0]["kept"] == ()


def test_what_cannot_be_repaired_is_not_written(
    planted: Path, batches: Sequence[Any], agreement: Callable[[Path], float], tmp_path: Path
) -> None:
    def strict(path: Path) -> float:
        return agreement(path) if path == planted else min(agreement(path), 0.9)

    with pytest.raises(ExportError, match=rf"int8 loses 10\.00 points at best .*max_drop = 0\.5; .*{OUTLIER}"):
        quantize_within(planted, tmp_path / "int8.onnx", measure=strict, max_drop=0.5, batches=batches)
    assert [path.name for path in tmp_path.iterdir()] == ["planted.onnx"]


def test_a_file_that_is_good_enough_at_once_is_not_searched_for(
    planted: Path, agreement: Callable[[Path], float], tmp_path: Path
) -> None:
    result = quantize_within(planted, tmp_path / "int8.onnx", measure=agreement, max_drop=100, batches=[])
    assert len(result.rungs) == 1
    assert not result.sensitivity


def test_sensitivity_needs_text(planted: Path) -> None:
    with pytest.raises(ExportError, match="there is no text to measure sensitivity on"):
        rank_products(planted, [])
