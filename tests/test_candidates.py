"""The fastest file of those that are good enough, chosen by measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, CLIPModel, MarianConfig, MarianMTModel

from distill.candidates import fastest, machine_target
from distill.errors import ExportError
from distill.export.dual import part
from distill.export.encoder_decoder import cut
from distill.export.graph import export_forms, export_graph
from distill.export.onnx_model import OnnxModel
from distill.export.passes import DEFAULT, FUSED
from distill.export.pieces import pieces, towers
from distill.export.runtime import open_graph
from distill.shipping.exporting import cutter
from distill.tasks import TASKS
from distill.tasks.text_classification import TextClassification


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two forms of one tiny model."""
    folder = tmp_path_factory.mktemp("sources")
    shape: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model("bert", **shape, intermediate_size=64)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    spec = TextClassification().graph(["input_ids", "attention_mask"])
    sources = {name: folder / f"{name}.onnx" for name in ("separate", "fused")}
    export_forms(model, spec, {sources["separate"]: DEFAULT, sources["fused"]: FUSED})
    return sources


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    ids = np.random.default_rng(0).integers(3, 99, (4, 12))
    return [{"input_ids": ids, "attention_mask": np.ones_like(ids)}]


def static(path: Path) -> bool:
    return "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}


def choose(
    sources: dict[str, Path], path: Path, measure: Callable[[Path], float], batches: Sequence[Any], **changes: Any
) -> Any:
    settings = {"max_drop": 0.5, "target": machine_target(), "lengths": [4, 8], **changes}
    return fastest(sources, path, measure=measure, batches=batches, **settings)


def test_the_fastest_is_kept(sources: dict[str, Path], batches: Any, tmp_path: Path) -> None:
    choice = choose(sources, tmp_path / "int8.onnx", lambda path: 1.0, batches)
    assert [each.graph for each in choice.tried] == ["separate"] * 3 + ["fused"] * 3
    products = [float(np.prod(list(each.latency_ms.values()))) for each in choice.tried]
    assert [each.chosen for each in choice.tried] == [product == min(products) for product in products]
    (chosen,) = [each for each in choice.tried if each.chosen]
    assert choice.graph == chosen.graph
    assert chosen.form.startswith("static") == static(tmp_path / "int8.onnx")
    assert choice.result.graph.bytes == (tmp_path / "int8.onnx").stat().st_size
    assert OnnxModel(tmp_path / "int8.onnx").metadata["distill.target"] == machine_target()
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]


def test_what_loses_too_much_is_not_even_timed(sources: dict[str, Path], batches: Any, tmp_path: Path) -> None:
    def only_dynamic(path: Path) -> float:
        return 0.9 if static(path) else 1.0

    choice = choose(sources, tmp_path / "int8.onnx", only_dynamic, batches)
    assert [each.good for each in choice.tried] == [True, False, False] * 2
    assert [bool(each.latency_ms) for each in choice.tried] == [True, False, False] * 2
    assert not static(tmp_path / "int8.onnx")
    assert choice.table()[1]["drop"] == pytest.approx(10)


def test_where_none_is_good_enough_the_ladder_goes_on(sources: dict[str, Path], batches: Any, tmp_path: Path) -> None:
    def none(path: Path) -> float:
        return 1.0 if path in sources.values() else 0.9

    with pytest.raises(ExportError, match=r"int8 loses 10\.00 points at best"):
        choose(sources, tmp_path / "int8.onnx", none, batches)
    assert not list(tmp_path.iterdir())

    def half_in_fp32(path: Path) -> float:
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        return 1.0 if path in sources.values() or kinds.count("MatMul") > 5 else 0.9

    choice = choose(sources, tmp_path / "int8.onnx", half_in_fp32, batches)
    assert not any(each.chosen for each in choice.tried)
    assert choice.result.rungs[-1].kept


def test_without_repair_no_form_is_calibrated(sources: dict[str, Path], batches: Any, tmp_path: Path) -> None:
    choice = choose(sources, tmp_path / "int8.onnx", lambda path: 1.0, batches, repair=False)
    assert [each.form for each in choice.tried] == ["dynamic"] * 2
    with pytest.raises(ExportError, match=r"plain int8 loses 10\.00 points, .* repairs are switched off"):
        choose(
            sources,
            tmp_path / "none.onnx",
            lambda path: 1.0 if path in sources.values() else 0.9,
            batches,
            repair=False,
        )
    assert not (tmp_path / "none.onnx").exists()


def test_candidates_have_their_tokens_in_int4_where_that_is_asked(
    sources: dict[str, Path], batches: Any, tmp_path: Path
) -> None:
    choice = choose(sources, tmp_path / "int4.onnx", lambda path: 1.0, batches, tables="int4")
    assert [each.form.endswith("embeddings in int4") for each in choice.tried] == [True] * 6
    assert OnnxModel(tmp_path / "int4.onnx").metadata["distill.embeddings"] == "int4"

    def only_int8(path: Path) -> float:
        return 0.9 if OnnxModel(path).metadata.get("distill.embeddings") == "int4" else 1.0

    choice = choose(sources, tmp_path / "int8.onnx", only_int8, batches, tables="int4", lengths=[4])
    assert [each.good for each in choice.tried] == [False] * 6 + [True] * 6
    assert "distill.embeddings" not in OnnxModel(tmp_path / "int8.onnx").metadata
    with pytest.raises(ExportError, match=r"plain int8 with embeddings in int4 loses 10\.00 points"):
        choose(sources, tmp_path / "none.onnx", only_int8, batches, tables="int4", repair=False)


def test_an_encoder_and_its_decoder_are_timed_as_they_ship(tmp_path: Path) -> None:
    """The one graph that both are cut from takes a decoder's ids and past, which nobody could feed it."""
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    ids = {"vocab_size": 50, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 3, "decoder_start_token_id": 0}
    model = MarianMTModel(MarianConfig(**sizes, **ids, forced_eos_token_id=None)).eval()
    spec = TASKS["seq2seq"].exported(model, ["input_ids", "attention_mask"])
    sources = {
        name: export_graph(model, spec, tmp_path / f"{name}.onnx", passes=passes).path
        for name, passes in (("separate", DEFAULT), ("fused", FUSED))
    }
    read = np.random.default_rng(0).integers(4, 50, (3, 9))
    batch = {"input_ids": read, "attention_mask": np.ones_like(read), "decoder_input_ids": read[:, :4]}
    choice = choose(
        sources, tmp_path / "int8.onnx", lambda path: 1.0, [batch], ships=cutter(TASKS["seq2seq"]), repair=False
    )
    assert [set(each.latency_ms) for each in choice.tried] == [{4, 8}] * 2
    assert "decoder_input_ids" in OnnxModel(tmp_path / "int8.onnx").inputs  # what is kept is cut by the stage itself
    cut(tmp_path / "int8.onnx", *pieces(tmp_path / "cut" / "int8.onnx"))
    answers = open_graph(tmp_path / "cut" / "int8.onnx").predict(batch)["logits"]
    exact = OnnxModel(sources["separate"]).predict(batch)["logits"]
    assert np.abs(answers - exact).max() < 0.2 * np.ptp(exact)


def test_two_towers_are_timed_as_they_ship(make_clip: Callable[..., Path], tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(make_clip(["a red one", "blue two"], width=32, layers=1)).eval()
    task, side = TASKS["image-text"], model.config.vision_config.image_size
    sources = {
        name: export_graph(model, task.exported(model, []), tmp_path / f"{name}.onnx", passes=passes).path
        for name, passes in (("separate", DEFAULT), ("fused", FUSED))
    }
    rng = np.random.default_rng(0)
    ids = rng.integers(3, model.config.text_config.vocab_size - 2, (2, 6))
    ids[:, -1] = model.config.text_config.vocab_size - 1
    pixels = rng.standard_normal((2, 3, side, side)).astype(np.float32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}
    choice = choose(sources, tmp_path / "int8.onnx", lambda path: 1.0, [batch], ships=cutter(task), repair=False)
    assert [set(each.latency_ms) for each in choice.tried] == [{4, 8}] * 2
    part(tmp_path / "int8.onnx", *towers(tmp_path / "cut" / "int8.onnx"))
    answers = open_graph(tmp_path / "cut" / "int8.onnx").predict(batch)
    exact = OnnxModel(sources["fused"]).predict(batch)
    for name in ("text_embeds", "image_embeds"):
        assert np.abs(answers[name] - exact[name]).max() < 0.2
