"""Attention by another implementation for a while, part by part."""

import pytest
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, T5Config, T5ForConditionalGeneration

from distill.attending import attending

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SHAPE |= {"projection_dim": 8}


def clip():
    words = {**SHAPE, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 1}
    images = {**SHAPE, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=words, vision_config=images, projection_dim=8))
    model.vision_model.set_attn_implementation("eager")
    return model


def t5():
    return T5ForConditionalGeneration(T5Config(d_model=16, num_layers=1, d_ff=16, num_heads=2, d_kv=8, vocab_size=20))


def said(model):
    return [part.config._attn_implementation for part in model.modules() if isinstance(part, PreTrainedModel)]


@pytest.mark.parametrize("make", [clip, t5])
def test_every_part_is_told_and_told_back(make):
    model = make()
    before = said(model)
    assert "sdpa" in before
    with attending(model, "eager", lambda own: own != "eager"):
        assert set(said(model)) == {"eager"}
    assert said(model) == before


def test_parts_that_are_not_meant_stay_as_they_are():
    model = clip()
    before = said(model)
    with attending(model, "flex_attention", lambda own: own == "sdpa"):
        assert said(model) == [{"sdpa": "flex_attention"}.get(own, own) for own in before]
        assert "eager" in said(model)
    assert said(model) == before


def test_an_error_leaves_nothing_behind():
    model = t5()
    before = said(model)
    with pytest.raises(ZeroDivisionError), attending(model, "eager", lambda own: True):
        raise ZeroDivisionError
    assert said(model) == before
