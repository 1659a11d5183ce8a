"""The two files that an encoder-decoder ships in say what the model says, in one pass, token by token, by beams."""

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from distill.errors import BundleError
from distill.export.encoder_decoder import cut
from distill.export.graph import export_graph
from distill.export.pieces import bytes_of, files_of, pieces
from distill.export.quantize import quantize_dynamic_int8
from distill.export.runtime import open_graph
from distill.heads.generation import Rules
from distill.tasks import TASKS

IDS = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
SHAPES = ((1, 4, 1), (3, 9, 6), (2, 17, 5))


def make_model(kind):
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes, **IDS)).eval()
    config, model = (BartConfig, BartForConditionalGeneration) if kind == "bart" else (MarianConfig, MarianMTModel)
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32}
    made = model(config(vocab_size=50, forced_eos_token_id=None, bos_token_id=3, init_std=0.4, **sizes, **IDS))
    return made.eval()


@pytest.fixture(
    scope="module",
    params=[pytest.param("t5", marks=pytest.mark.slow), pytest.param("bart", marks=pytest.mark.slow), "marian"],
)
def exported(request, tmp_path_factory):
    """A model, its one graph and where its two files are."""
    model, folder = make_model(request.param), tmp_path_factory.mktemp(request.param)
    whole, parts = folder / "whole.onnx", folder / "cut" / "model.onnx"
    export_graph(model, TASKS["seq2seq"].exported(model, ["input_ids", "attention_mask"]), whole)
    cut(whole, *pieces(parts))
    return model, whole, parts


def batch_of(rows, length, written):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(4, 50, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -1] = ids[-1, -1] = 0
    shown = torch.randint(4, 50, (rows, written), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shown}


@pytest.mark.parametrize("shape", SHAPES)
def test_both_files_say_what_the_model_says(exported, shape):
    model, whole, parts = exported
    batch = batch_of(*shape)
    with torch.no_grad():
        expected = model(**batch).logits.numpy()
    values = {name: value.numpy() for name, value in batch.items()}
    graph = open_graph(parts)
    np.testing.assert_allclose(open_graph(whole).predict(values)["logits"], expected, atol=2e-5)
    np.testing.assert_allclose(graph.predict(values)["logits"], expected, atol=2e-5)
    step, past, said = graph.stepper(values), None, []
    for place in range(shape[2]):
        logits, past = step(values["decoder_input_ids"][:, place : place + 1], past)
        said.append(logits)
    np.testing.assert_allclose(np.stack(said, axis=1), expected, atol=2e-5)


@pytest.mark.parametrize(("beams", "no_repeat"), [(1, 0), (3, 0), (1, 1), (3, 2)])
def test_they_write_what_the_model_writes(exported, beams, no_repeat):
    model, _, parts = exported
    batch = batch_of(3, 9, 1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options = {"num_beams": beams, "encoder_no_repeat_ngram_size": no_repeat, "max_new_tokens": 8}
    expected = []
    for row, length in zip(ids, mask.sum(1).tolist(), strict=True):  # one by one: `generate` counts padding as source
        new = model.generate(row[None, :length], do_sample=False, **options)[0].tolist()[1:]
        expected.append(new[: new.index(1) + 1] if 1 in new else new)
    rules = Rules(ends=(1,), max_new_tokens=8, beams=beams, no_repeat_source=no_repeat)
    sources = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    assert open_graph(parts).write(sources, rules) == expected


def test_the_decoder_is_fed_as_clients_feed_it(exported):
    _, _, parts = exported
    encoder, decoder = (onnx.load(file).graph for file in files_of(parts))
    assert {value.name for value in encoder.input} == {"input_ids", "attention_mask"}
    assert [value.name for value in encoder.output] == ["last_hidden_state"]
    names = {value.name for value in decoder.input}
    assert {"input_ids", "encoder_attention_mask", "encoder_hidden_states", "use_cache_branch"} < names
    assert "past_key_values.0.encoder.key" in names
    assert {name.replace("past_key_values", "present") for name in names if name.startswith("past")} == {
        value.name for value in decoder.output if value.name != "logits"
    }


def test_int8_is_cut_as_well(exported, tmp_path):
    _, whole, _ = exported
    quantize_dynamic_int8(whole, tmp_path / "int8.onnx", target="x86-vnni")
    parts = tmp_path / "cut" / "model_quantized.onnx"
    cut(tmp_path / "int8.onnx", *pieces(parts))
    assert [file.name for file in files_of(parts)] == [
        "encoder_model_quantized.onnx",
        "decoder_model_merged_quantized.onnx",
    ]
    values = {name: value.numpy() for name, value in batch_of(2, 9, 4).items()}
    one, two = open_graph(tmp_path / "int8.onnx"), open_graph(parts)
    np.testing.assert_allclose(two.predict(values)["logits"], one.predict(values)["logits"], atol=2e-5)
    assert bytes_of(parts) > 0


def test_half_a_pair_is_refused(exported, tmp_path):
    _, _, parts = exported
    decoder = tmp_path / pieces(parts)[1].name
    decoder.write_bytes(pieces(parts)[1].read_bytes())
    with pytest.raises(BundleError, match=r"encoder_model\.onnx: there is no such file"):
        open_graph(tmp_path / "model.onnx")
