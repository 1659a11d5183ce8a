from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from distill.errors import ExportError
from distill.export.graph import drop_unread_inputs, export_graph, write
from distill.export.onnx_model import OnnxModel
from distill.export.parity import SHAPES, check_parity
from distill.export.passes import DEFAULT, apply_passes
from distill.tasks.text_classification import TextClassification

FAMILIES = (
    "bert",
    "roberta",
    pytest.param("xlm-roberta", marks=pytest.mark.slow),  # roberta's graph once more
    "distilbert",
    "electra",
    "mpnet",
    "deberta-v2",
    "modernbert",
    "albert",
)
SPEC = TextClassification().graph(["input_ids", "attention_mask", "token_type_ids"])


@pytest.fixture
def finished(tiny: Callable[[str], Any], tmp_path: Path) -> Callable[..., OnnxModel]:
    """By family: the file that `export_graph` writes, from the trace that all tests share."""

    def finish(family: str) -> OnnxModel:
        graph = tiny(family).graph
        changes = apply_passes(graph, DEFAULT)
        drop_unread_inputs(graph)
        return OnnxModel(write(graph, tmp_path / f"{family}.onnx", {}, changes).path)

    return finish


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_answers_like_the_model_at_every_shape(
    family: str, tiny: Callable[[str], Any], finished: Callable[..., OnnxModel]
) -> None:
    """An axis specialised while tracing, or a mask that hides the wrong keys, shows at one of these shapes."""
    one = tiny(family)
    batches = one.batches(*SHAPES, (2, 150))
    report = check_parity(one.reference, finished(family), batches, step="export", tolerance=1e-4, agreement=1.0)
    assert len(report.batches) == len(SHAPES) + 1
    assert np.concatenate([one.reference.predict(batch)["logits"] for batch in batches]).std() > 0.05  # they differ


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "deberta-v2", "mpnet"])
def test_a_row_of_padding_alone_stays_finite(
    family: str, tiny: Callable[[str], Any], finished: Callable[..., OnnxModel]
) -> None:
    """Softmax over nothing but -inf is NaN; one such row in a batch must not poison it, nor change the others."""
    one = tiny(family)
    (batch,) = one.batches((3, 9))
    model = finished(family)
    before = model.predict(batch)["logits"]
    batch["attention_mask"][1] = 0
    batch["input_ids"][1] = one.padding
    after = model.predict(batch)
    assert np.isfinite(after["logits"]).all()
    assert np.isfinite(after["probabilities"]).all()
    np.testing.assert_allclose(after["logits"][[0, 2]], before[[0, 2]], atol=1e-5)


def test_padding_does_not_change_an_answer(tiny: Callable[[str], Any], finished: Callable[..., OnnxModel]) -> None:
    one = tiny("bert")
    (batch,) = one.batches((1, 11))
    padded = {name: np.pad(values, ((0, 0), (0, 23))) for name, values in batch.items()}
    model = finished("bert")
    np.testing.assert_allclose(model.predict(padded)["logits"], model.predict(batch)["logits"], atol=1e-5)


def test_export_writes_one_quiet_described_file(
    build_model: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("bert", num_hidden_layers=1).train()
    path = tmp_path / "deep" / "model.onnx"
    with caplog.at_level(logging.WARNING):
        made = export_graph(model, SPEC, path, metadata={"distill.task": "text-classification", "distill.format": "1"})
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert (made.path, made.bytes) == (path, path.stat().st_size)
    session = OnnxModel(path).session
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
        "token_type_ids": ["batch", "length"],
        "logits": ["batch", 3],
        "probabilities": ["batch", 3],
    }
    assert made.outputs == ("logits", "probabilities")
    assert session.get_modelmeta().custom_metadata_map == {
        "distill.task": "text-classification", "distill.format": "1"
    }  # fmt: skip
    onnx.checker.check_model(path, full_check=True)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert "bert.encoder.layer.0.intermediate.dense.weight" in {
        value.name for value in onnx.load(path).graph.initializer
    }


@pytest.mark.parametrize("positions", [16, 3])
def test_a_model_of_few_positions_is_traced_too(
    positions: int, build_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = build_model("bert", num_hidden_layers=1, max_position_embeddings=positions).eval()
    graph = OnnxModel(export_graph(model, SPEC, tmp_path / "model.onnx").path)
    for rows, length in ((1, positions), (3, 2), (1, 1)):
        ids = np.arange(rows * length).reshape(rows, length) % 7
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        with torch.no_grad():
            wanted = model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits
        np.testing.assert_allclose(graph.predict(batch)["logits"], wanted, atol=1e-5)


def test_a_model_of_two_positions_is_refused(build_model: Callable[..., Any], tmp_path: Path) -> None:
    model = build_model("bert", num_hidden_layers=1, max_position_embeddings=2)
    with pytest.raises(ExportError, match=r"BertForSequenceClassification has 2 positions, .* at least 3"):
        export_graph(model, SPEC, tmp_path / "model.onnx")


def test_the_mask_functions_of_transformers_are_put_back(build_model: Callable[..., Any], tmp_path: Path) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    before = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    # The cause is said, not the error that wraps it.
    said = r"BertForSequenceClassification cannot be traced: (?!Failed to export)[^\x1b]+$"
    with pytest.raises(ExportError, match=said):
        export_graph(
            build_model("bert", num_hidden_layers=1), replace(SPEC, head=_reads_numbers), tmp_path / "model.onnx"
        )
    assert ALL_MASK_ATTENTION_FUNCTIONS["eager"] is before
    assert not list(tmp_path.iterdir())


def _reads_numbers(output: Any) -> tuple[Any, ...]:
    return (output.logits if output.logits.sum() > 0 else -output.logits, output.logits)


def test_inputs_that_nothing_reads_are_left_out(tiny: Callable[[str], Any]) -> None:
    graph = tiny("distilbert").graph
    onnx_input = onnx.helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, ["batch", "length"])
    proto = onnx.load_from_string(tiny("distilbert").file)
    proto.graph.input.append(onnx_input)
    import onnx_ir as ir

    graph = ir.from_proto(proto)
    drop_unread_inputs(graph)
    assert [value.name for value in graph.graph.inputs] == ["input_ids", "attention_mask"]


def test_weights_that_are_not_fp32_are_refused(build_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"weights of BertForSequenceClassification are torch.bfloat16.*model\.float"):
        export_graph(build_model("bert").to(torch.bfloat16), SPEC, tmp_path / "model.onnx")


def test_a_model_too_big_for_one_file_is_refused_before_tracing(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(
            BertConfig(vocab_size=600_000, hidden_size=960, num_hidden_layers=1, num_attention_heads=12)
        )
    with pytest.raises(ExportError, match=r"2\.\d GB of weights do not fit into one ONNX file"):
        export_graph(model, SPEC, tmp_path / "model.onnx")


def test_a_model_elsewhere_than_on_the_cpu_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=1))
    with pytest.raises(ExportError, match=r"the model is on meta.*model\.cpu\(\)"):
        export_graph(model, SPEC, tmp_path / "model.onnx")
