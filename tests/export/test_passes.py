"""Every pass alone, all of them, and any of them in any order: what the graph computes stays the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.export.passes import DEFAULT, FUSED, Pass, apply_passes, passes_for
from distill.export.passes.attention import merge_products, scale_into_query
from distill.export.passes.embeddings import fold_constant_rows, slice_positions
from distill.export.passes.first_token import first_token_early
from distill.export.passes.fused_attention import fused_attention
from distill.export.passes.gelu import one_gelu
from distill.export.passes.layout import sequence_first
from distill.export.passes.match import constant, node_before, numbers_of, products
from distill.export.passes.residual import residual_as_sum
from distill.export.passes.shapes import constant_shapes, gemm_as_product
from distill.export.passes.weights import share_equal_weights, weights_transposed

FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert", "albert")
EVERY = (*DEFAULT, Pass("fused attention", fused_attention), Pass("gemm as product", gemm_as_product))


def kinds(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph]


def same_answers(one: Any, model: Any) -> None:
    for batch in one.batches((1, 1), (3, 33)):
        expected = one.reference.predict(batch)
        got = model.predict(batch)
        for name in ("logits", "probabilities"):
            np.testing.assert_allclose(got[name], expected[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("each", EVERY, ids=lambda each: each.name)
def test_a_pass_alone_changes_no_answer(
    each: Pass, family: str, tiny: Callable[[str], Any], load: Callable[..., Any]
) -> None:
    one = tiny(family)
    graph = one.graph
    apply_passes(graph, [each])
    same_answers(one, load(graph))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_passes_in_any_order_change_no_answer(
    data: st.DataObject, tiny: Callable[[str], Any], load: Callable[..., Any]
) -> None:
    """Some twice, some never: a pass may rely on nothing that another one leaves behind."""
    one = tiny(data.draw(st.sampled_from(FAMILIES), label="family"))
    order = data.draw(st.lists(st.sampled_from(EVERY), max_size=2 * len(EVERY)), label="order")
    graph = one.graph
    apply_passes(graph, order)
    same_answers(one, load(graph))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_round_finds_nothing_to_do(family: str, tiny: Callable[[str], Any]) -> None:
    graph = tiny(family).graph
    apply_passes(graph, DEFAULT)
    assert not any(apply_passes(graph, DEFAULT).values())


def test_shapes_are_written_down(tiny: Callable[[str], Any]) -> None:
    graph = tiny("bert").graph
    assert constant_shapes(graph) == 8  # four a layer: query, key, value, output
    targets = [node.inputs[1].const_value.numpy().tolist() for node in graph.graph if node.op_type == "Reshape"]
    assert targets == ([[0, 0, 4, 8]] * 3 + [[0, 0, 32]]) * 2


def test_query_key_and_value_become_one_product(tiny: Callable[[str], Any]) -> None:
    graph = tiny("bert").graph
    assert merge_products(graph) == 2
    names = [name for name in graph.graph.initializers if "+" in name]
    assert "bert.encoder.layer.1.attention.self.query+key+value.weight" in names
    assert graph.graph.initializers[names[0]].shape.numpy() == (32, 96)


def test_weights_left_untransposed_are_products_too(tiny: Callable[[str], Any], load: Callable[..., Any]) -> None:
    """The exporter leaves large weights that layers share as Transpose(weight): such a product would stay in fp32."""
    one = tiny("albert")
    graph = one.graph
    before = [numbers_of(found.weight).tobytes() for found in products(graph.graph)]
    for found in products(graph.graph):
        flipped = constant(graph.graph, numbers_of(found.weight).T, f"{found.weight.name}.flipped")
        transpose = node_before(found.matmul, "Transpose", [flipped], perm=[1, 0])
        found.matmul.replace_input_with(1, transpose.outputs[0])
    assert not products(graph.graph)
    ready = [Pass("transposed", weights_transposed), Pass("shared", share_equal_weights)]
    assert apply_passes(graph, ready)["transposed"] == len(before)
    assert len(products(graph.graph)) == len(before)
    assert len({found.weight for found in products(graph.graph)}) == len(set(before))
    same_answers(one, load(graph))


def test_weights_that_layers_share_are_not_stored_twice(tiny: Callable[[str], Any]) -> None:
    """The last layer's query runs on one token, so a merge would need another company of the same weights there."""
    graph = tiny("albert").graph
    before = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    apply_passes(graph, DEFAULT)
    assert sum(value.const_value.nbytes for value in graph.graph.initializers.values()) < before * 1.05


@pytest.mark.parametrize("merged", [False, True])
def test_the_scale_goes_into_the_weights_of_the_query(merged: bool, tiny: Callable[[str], Any]) -> None:
    graph = tiny("bert").graph
    if merged:
        merge_products(graph)
    assert "Mul" in kinds(graph)
    assert apply_passes(graph, [Pass("scale", scale_into_query)]) == {"scale": 2}
    assert "Mul" not in kinds(graph)


def test_the_last_layer_runs_on_one_token(tiny: Callable[[str], Any], load: Callable[..., Any]) -> None:
    one = tiny("bert")
    graph = one.graph
    apply_passes(graph, [Pass("shapes", constant_shapes), Pass("first token", first_token_early)])
    for node in graph.graph:
        if node.op_type in ("Gelu", "Softmax"):
            node.outputs[0].shape = None
            graph.graph.outputs.append(node.outputs[0])
    (batch,) = one.batches((2, 7))
    outputs = load(graph).predict(batch)
    assert [value.shape for name, value in outputs.items() if "gelu" in name] == [(2, 7, 64), (2, 1, 64)]
    assert [value.shape for name, value in outputs.items() if "softmax" in name] == [(2, 4, 7, 7), (2, 4, 1, 7)]


def test_token_types_that_are_always_zero_are_folded(build_model: Callable[..., Any], load: Callable[..., Any]) -> None:
    """Where they are an input they matter: the second sentence of a pair has type 1."""
    from distill.export.graph import trace
    from distill.tasks.text_classification import TextClassification

    model = build_model("bert", num_hidden_layers=1)
    graph = trace(model, TextClassification().graph(["input_ids", "attention_mask"]))
    lookups = kinds(graph).count("Gather")
    changes = apply_passes(graph, [Pass("rows", fold_constant_rows)])
    assert changes == {"rows": 1}
    assert kinds(graph).count("Gather") == lookups - 1
    assert not [name for name in graph.graph.initializers if "token_type" in name]
    rng = np.random.default_rng(0)
    batch = {"input_ids": rng.integers(3, 99, (2, 9)), "attention_mask": np.ones((2, 9), np.int64)}
    import torch

    with torch.no_grad():
        expected = model(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits.numpy()
    np.testing.assert_allclose(load(graph).predict(batch)["logits"], expected, atol=1e-4)


def test_token_types_that_are_given_are_not_folded(tiny: Callable[[str], Any]) -> None:
    assert fold_constant_rows(tiny("bert").graph) == 0


def test_positions_are_cut_off_not_looked_up(tiny: Callable[[str], Any]) -> None:
    graph = tiny("bert").graph
    assert slice_positions(graph) == 1
    assert slice_positions(tiny("roberta").graph) == 0  # its positions depend on where padding stands


def test_gelu_by_tanh_is_one_node(tiny: Callable[[str], Any]) -> None:
    graph = tiny("albert").graph
    assert kinds(graph).count("Pow") == 2
    assert apply_passes(graph, [Pass("gelu", one_gelu)]) == {"gelu": 2}
    assert kinds(graph).count("Gelu") == 2
    assert "Pow" not in kinds(graph)


@pytest.mark.parametrize(
    "family, turned", [("bert", 1), ("roberta", 1), ("albert", 1), ("modernbert", 0), ("deberta-v2", 0)]
)
def test_the_sequence_comes_first_where_heads_are_multiplied_at_once(
    family: str, turned: int, tiny: Callable[[str], Any]
) -> None:
    graph = tiny(family).graph
    constant_shapes(graph)
    assert sequence_first(graph) == turned
    assert sequence_first(graph) == 0
    if turned:
        perms = [list(node.attributes["perm"].as_ints()) for node in graph.graph if node.op_type == "Transpose"]
        heads = [perm for perm in perms if len(perm) == 4]
        assert heads.count([1, 2, 0, 3]) == 4  # queries and values of two layers
        assert heads.count([1, 2, 3, 0]) == 2  # keys
        assert heads.count([2, 0, 1, 3]) == 2  # what comes out
        assert len([perm for perm in perms if len(perm) == 3]) == 0  # nothing is copied to get there


def test_onnx_runtime_then_moves_no_heads(tiny: Callable[[str], Any], load: Callable[..., Any], tmp_path: Path) -> None:
    graph = tiny("bert").graph
    apply_passes(graph)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "seen.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(load(graph).path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "seen.onnx").graph.node]
    assert kinds.count("FusedMatMul") == 4  # scores and weighted values of two layers
    assert kinds.count("Transpose") == 4  # ids twice, and what comes out of two attentions
    assert "SkipLayerNormalization" not in kinds


def test_residuals_are_sums(tiny: Callable[[str], Any]) -> None:
    graph = tiny("bert").graph
    assert residual_as_sum(graph) == 5  # embeddings, and two a layer
    embeddings = next(node for node in graph.graph if node.op_type == "Sum")
    assert len(embeddings.inputs) == 3  # words, types, positions


@pytest.mark.parametrize(
    "family, fused",
    [("bert", 2), ("roberta", 2), ("mpnet", 2), ("albert", 2), ("modernbert", 0), ("deberta-v2", 0)],
)
def test_attention_is_one_node_where_heads_are_multiplied_at_once(
    family: str, fused: int, tiny: Callable[[str], Any], load: Callable[..., Any]
) -> None:
    one = tiny(family)
    graph = one.graph
    before = kinds(graph).count("Expand")
    assert apply_passes(graph, FUSED)["fused attention"] == fused
    assert kinds(graph).count("Attention") == fused
    assert kinds(graph).count("Expand") <= before + 1  # one mask for all layers that need one row a query
    assert graph.graph.opset_imports[""] == (23 if fused else 20)
    same_answers(one, load(graph))


def test_files_for_phones_and_browsers_keep_to_the_older_opset(tiny: Callable[[str], Any]) -> None:
    for target, opset in {"arm64": 20, "wasm": 20, "portable": 20, "x86-vnni": 23, "x86-avx2": 23}.items():
        graph = tiny("bert").graph
        apply_passes(graph, passes_for(target))
        assert graph.graph.opset_imports[""] == opset
