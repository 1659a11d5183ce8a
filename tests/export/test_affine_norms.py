"""Norms that are a scale and a shift vanish into the products around them, and nothing else changes."""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MobileBertConfig,
    MobileBertForMaskedLM,
    MobileBertForSequenceClassification,
    MobileBertForTokenClassification,
)

from distill.export.affine_norms import fold_affine_norms
from distill.export.graph import export_graph
from distill.tasks import TASKS


def mobilebert(kind=MobileBertForSequenceClassification, **changes):
    """Norms as training leaves them: scales and shifts that are not 1 and 0."""
    shape = {
        "vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "embedding_size": 12,
        "true_hidden_size": 8, "intra_bottleneck_size": 8, "intermediate_size": 16, "num_feedforward_networks": 3,
        "max_position_embeddings": 24, "num_labels": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = kind(MobileBertConfig(**(shape | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def answers(model):
    ids = torch.randint(5, 60, (6, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize(
    "kind", [MobileBertForSequenceClassification, MobileBertForTokenClassification, MobileBertForMaskedLM]
)
@pytest.mark.parametrize("changes", [{}, {"num_feedforward_networks": 1}, {"trigram_input": False}])
def test_the_same_answers_without_a_norm(kind, changes):
    model = mobilebert(kind, **changes)
    folded = fold_affine_norms(model)
    assert folded is not model
    names = [name for name, _ in folded.base_model.named_parameters() if "LayerNorm" in name]
    assert names == []
    torch.testing.assert_close(answers(folded), answers(model), rtol=1e-4, atol=1e-4)


def test_the_model_itself_stays_as_it_was():
    model = mobilebert()
    before = copy.deepcopy(model.state_dict())
    fold_affine_norms(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "model",
    [
        mobilebert(normalization_type="layer_norm"),
        mobilebert(use_bottleneck_attention=True),
        mobilebert(key_query_shared_bottleneck=False),
        mobilebert(trigram_input=False, embedding_size=24),
        BertForSequenceClassification(
            BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
        ),
    ],
    ids=["layer norm", "thin attention", "wide attention", "no product behind the table", "bert"],
)
def test_other_models_are_given_back(model):
    assert fold_affine_norms(model) is model


def test_a_scale_near_nothing_is_left_alone():
    model = mobilebert()
    with torch.no_grad():
        model.mobilebert.encoder.layer[1].output.LayerNorm.weight[3] = 1e-6
    assert fold_affine_norms(model) is model


def test_the_exported_graph_has_fewer_steps(tmp_path):
    import onnx

    spec = TASKS["text-classification"].graph(("input_ids", "attention_mask"))
    model = mobilebert()
    export_graph(model, spec, tmp_path / "as_is.onnx")
    export_graph(fold_affine_norms(model), spec, tmp_path / "folded.onnx")
    steps = [
        sum(node.op_type == "Mul" for node in onnx.load(tmp_path / name).graph.node)
        for name in ("as_is.onnx", "folded.onnx")
    ]
    assert steps[1] < steps[0] - 20
