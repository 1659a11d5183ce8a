"""Lighter steps are the same steps: equal gradients, equal answers, and a model that is as before afterwards."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

from distill.errors import TrainingError
from distill.features import TappedModel
from distill.recipe import TrainingRecipe
from distill.training.lighter import compiled, lighter, recomputed

TAPS = ["logits", "hidden.0", "hidden.2", "hidden.4", "query.1", "attention.3"]


def bert(layers=4, seed=0, dropout=0.1):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config).train()


def batch(length=9):
    torch.manual_seed(7)
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(5, 50, (3, length)), "attention_mask": mask}


def gradients(model, tapped):
    """Of a loss over every tap, the bytes that were kept for the way back, and the taps themselves."""
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = tapped(batch())
        loss = torch.stack([features[tap].square().mean() for tap in TAPS]).sum()
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found, sum(kept.values()), {name: value.detach() for name, value in features.items()}


@pytest.mark.parametrize("on_processor", [True, False])
def test_layers_computed_again_give_the_same_gradients_for_less_memory(on_processor):
    model = bert()
    tapped = TappedModel(model, TAPS)
    with lighter(model, TrainingRecipe(), on_processor=on_processor):
        plain, much, said = gradients(model, tapped)
    with lighter(model, TrainingRecipe(gradient_checkpointing=True), on_processor=on_processor):
        again, little, heard = gradients(model, tapped)
    assert little < much / 2
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], value) for name, value in plain.items())
    assert all(torch.equal(heard[tap], said[tap]) for tap in TAPS)
    assert not model.is_gradient_checkpointing


def test_layers_that_cannot_be_computed_again_are_refused():
    model = bert(1)
    model.supports_gradient_checkpointing = False
    with (
        pytest.raises(TrainingError, match="BertForSequenceClassification cannot compute its layers again"),
        recomputed(model),
    ):
        pass


def test_a_compiled_student_gives_the_same_taps_and_is_saved_as_ever(tmp_path):
    model = bert(dropout=0.0)
    tapped = TappedModel(model, TAPS)
    plain, _, said = gradients(model, tapped)
    with compiled(model, backend="aot_eager"):
        again, _, heard = gradients(model, tapped)
        longer = tapped(batch(13))["hidden.4"]
        assert longer.shape == (3, 13, 32)
        model.save_pretrained(tmp_path)
        assert not any("_orig_mod" in name for name in model.state_dict())
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value)
    for tap in TAPS:
        torch.testing.assert_close(heard[tap], said[tap])
    assert model._compiled_call_impl is None
    model.eval()
    kept = BertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(kept(**batch()).logits, model(**batch()).logits)


def test_threads_are_set_within_the_block_alone():
    before = torch.get_num_threads()
    with lighter(bert(1), TrainingRecipe(threads=before + 1), on_processor=True):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
