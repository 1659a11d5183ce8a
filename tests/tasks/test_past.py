"""Decoders whose graph remembers: step by step it answers as PyTorch does on the whole text."""

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from distill.export.graph import export_forms
from distill.export.onnx_model import OnnxModel
from distill.export.passes import DEFAULT, FUSED
from distill.export.quantize import quantize_dynamic_int8
from distill.heads.generation import Rules, beam, greedy
from distill.tasks import TASKS

TASK = TASKS["causal-lm"]
FORMS = {"traced": (), "shaped": DEFAULT, "fused": FUSED}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def llama():  # two heads of keys for four of queries, rotations, no biases
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, num_key_value_heads=2, max_position_embeddings=64, **SMALL))


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=300, num_key_value_heads=2, max_position_embeddings=64, **SMALL))


@pytest.fixture(scope="module", params=[gpt2, llama, qwen2], ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture(scope="module")
def graphs(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("past")
    forms = {folder / f"{name}.onnx": passes for name, passes in FORMS.items()}
    export_forms(model, TASK.exported(model, ["input_ids", "attention_mask"]), forms)
    return folder


@pytest.fixture(scope="module", params=FORMS)
def graph(graphs, request):
    return OnnxModel(graphs / f"{request.param}.onnx")


def read_in_parts(graph, ids, parts):
    said, past, at = [], None, 0
    for count in parts:
        logits, past = graph.read(ids[:, at : at + count], past)
        said.append(logits)
        at += count
    return np.concatenate(said, axis=1), past


@pytest.mark.parametrize("rows", [1, 3])
def test_a_text_read_in_parts_is_a_text_read_at_once(model, graph, rows):
    ids = np.random.default_rng(rows).integers(0, 300, (rows, 12))
    said, past = read_in_parts(graph, ids, (1, 5, 1, 1, 4))
    with torch.no_grad():
        output = model(torch.from_numpy(ids), use_cache=True)
    np.testing.assert_allclose(said, output.logits.numpy(), atol=1e-4)
    last = output.past_key_values.layers[-1]
    np.testing.assert_allclose(past["past_key_values.1.key"], last.keys.numpy(), atol=1e-4)
    np.testing.assert_allclose(past["past_key_values.1.value"], last.values.numpy(), atol=1e-4)


def test_padding_on_the_left_is_not_seen(model, graph):
    ids = np.random.default_rng(0).integers(0, 300, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)  # as transformers and transformers.js number them
    said = graph.predict({"input_ids": ids, "attention_mask": mask, "position_ids": positions})["logits"]
    with torch.no_grad():
        alone = model(torch.from_numpy(ids[1:, 4:])).logits.numpy()
    np.testing.assert_allclose(said[1:, 4:], alone, atol=1e-4)


def test_names_are_those_that_clients_feed(model, graph):
    named = [value.name for value in graph.session.get_inputs()]
    assert named[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert named[3:] == [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    returned = [value.name for value in graph.session.get_outputs()]
    assert returned == ["logits", *(f"present.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value"))]
    assert graph.outputs == ("logits",)
    heads = getattr(model.config, "num_key_value_heads", 4)
    assert set(graph.memory.values()) == {(heads, 0, 8)}


def test_it_writes_what_transformers_writes(model, graph):
    prompt = np.random.default_rng(1).integers(3, 300, (1, 6))
    tokens = torch.from_numpy(prompt)
    known = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(tokens, attention_mask=torch.ones_like(tokens), **known)[0, 6:].tolist()
    assert greedy(graph.step, prompt, Rules(max_new_tokens=10))[0] == wanted
    wanted = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_beams=3, **known)[0, 6:].tolist()
    assert beam(graph.step, prompt[0].tolist(), Rules(max_new_tokens=10, beams=3))[0][0] == wanted


def test_int8_remembers_too(model, graph, tmp_path):
    path = tmp_path / "int8.onnx"
    quantize_dynamic_int8(graph.path, path)
    ids = np.random.default_rng(0).integers(0, 300, (1, 12))
    said, _ = read_in_parts(OnnxModel(path), ids, (6, 1, 1, 4))
    with torch.no_grad():
        whole = model(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(said - whole).max() < 0.2 * np.ptp(whole)
