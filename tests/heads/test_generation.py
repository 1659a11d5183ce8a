"""Greedy and beam search are transformers' own, over a step function of a tiny model of each kind."""

import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from distill.heads.generation import Rules, beam, greedy
from distill.tasks.writing import rules_of, unfollowed

END, PAD, START = 1, 0, 2


def make_model(kind, seed):
    torch.manual_seed(seed)
    ids = {"eos_token_id": END, "pad_token_id": PAD, "bos_token_id": 3}
    if kind == "t5":
        config = T5Config(
            vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=START, **ids
        )
        model = T5ForConditionalGeneration(config)
    elif kind == "bart":
        config = BartConfig(
            vocab_size=24,
            d_model=16,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            decoder_start_token_id=START,
            forced_eos_token_id=None,
            **ids,
        )
        model = BartForConditionalGeneration(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=64, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)  # answers that depend on what was written
    return model.eval()


def make_step(model, source=None):
    """A step over a PyTorch model: keys and values of every layer, and the encoder's states, are the past."""
    states = None if source is None else model.get_encoder()(source).last_hidden_state.detach().numpy()

    def step(ids, past):
        past = dict(past or ({} if states is None else {"encoder": states}))
        held = past.pop("encoder", None)
        layers = [
            (torch.from_numpy(past[f"key.{n}"]), torch.from_numpy(past[f"value.{n}"])) for n in range(len(past) // 2)
        ]
        given = {} if held is None else {"encoder_outputs": (torch.from_numpy(held),)}
        name = "input_ids" if held is None else "decoder_input_ids"
        if held is None:
            cache = DynamicCache(layers) if layers else DynamicCache()
            given["past_key_values"] = cache
            with torch.no_grad():
                said = model(**{name: torch.from_numpy(ids)}, **given, use_cache=True)
            new = {}
            for number, layer in enumerate(said.past_key_values.layers):
                new |= {f"key.{number}": layer.keys.numpy(), f"value.{number}": layer.values.numpy()}
            return said.logits[:, -1].numpy(), new
        written = past.get("written")
        written = ids if written is None else np.concatenate([written, ids], axis=1)
        with torch.no_grad():
            said = model(**{name: torch.from_numpy(written)}, **given, use_cache=False)
        return said.logits[:, -1].numpy(), {"encoder": held, "written": written}

    return step


def cut(row, prompt):
    """The new ids of a generated row, with the end that closed it."""
    new = row.tolist()[prompt:]
    return new[: new.index(END) + 1] if END in new else new


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_and_beams_are_those_of_transformers(kind, seed):
    model = make_model(kind, seed)
    ids = torch.randint(4, 24, (2, 6), generator=torch.Generator().manual_seed(seed))
    prompts = ids.numpy() if kind == "gpt2" else np.full((2, 1), START)
    shared = {"max_new_tokens": 12, "min_length": 0, "pad_token_id": PAD}
    expected = [cut(row, prompts.shape[1]) for row in model.generate(ids, do_sample=False, num_beams=1, **shared)]
    rules = Rules(ends=(END,), max_new_tokens=12)
    source = None if kind == "gpt2" else ids
    assert greedy(make_step(model, source), prompts, rules) == expected
    for penalty, early in ((1.0, False), (0.6, False), (2.0, True), (0.0, False)):
        said = model.generate(
            ids[:1],
            do_sample=False,
            num_beams=4,
            num_return_sequences=4,
            length_penalty=penalty,
            early_stopping=early,
            return_dict_in_generate=True,
            output_scores=True,
            **shared,
        )
        rules = Rules(ends=(END,), max_new_tokens=12, beams=4, length_penalty=penalty, early_stopping=early)
        found = beam(make_step(model, None if source is None else ids[:1]), prompts[0].tolist(), rules)
        assert [text for text, _ in found] == [cut(row, prompts.shape[1]) for row in said.sequences]
        np.testing.assert_allclose([score for _, score in found], said.sequences_scores.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_rules_are_followed_as_transformers_follow_them(beams):
    model = make_model("bart", 1)
    ids = torch.arange(4, 10)[None]
    said = model.generate(
        ids,
        do_sample=False,
        num_beams=beams,
        max_new_tokens=10,
        min_new_tokens=6,
        forced_bos_token_id=7,
        forced_eos_token_id=END,
        bad_words_ids=[[9], [11]],
        no_repeat_ngram_size=2,
    )
    rules = Rules((END,), 10, min_new_tokens=6, first=7, last=END, never=(9, 11), no_repeat=2, beams=beams)
    step = make_step(model, ids)
    found = beam(step, [START], rules)[0][0] if beams > 1 else greedy(step, np.array([[START]]), rules)[0]
    assert found == cut(said[0], 1)
    assert found[0] == 7
    assert not {9, 11} & set(found)
    assert len(set(itertools.pairwise(found))) == len(found) - 1


OPTIONS = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 2},
    {"min_length": 8},  # behind the prompt
    {"min_new_tokens": 7},
    {"min_new_tokens": 7, "min_length": 10},
    {"bad_words_ids": [[END], *([one] for one in range(4, 14)), [14, 15]]},
    {"bad_words_ids": [[one, two] for one in range(4, 24) for two in (END, 5, 7, 9, 11, 13, 15)]},
    {"suppress_tokens": [4, 6, 8, 10, 12, 14, 16]},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "renormalize_logits": True, "min_length": 9},
]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
@pytest.mark.parametrize("kind", ["bart", "gpt2"])
def test_options_of_a_generation_config_do_what_they_do_in_transformers(kind, options, beams):
    """Model after model, up to one whose text the option changes: dropping it would be right for the others."""

    def write(rules):
        rules = Rules.of(json.loads(json.dumps(asdict(rules))))  # as a bundle keeps them
        if beams > 1:
            return beam(make_step(model, source), prompt, rules, read)[0][0]
        return greedy(make_step(model, source), np.array([prompt]), rules, None if read is None else [read])[0]

    for seed in range(8):
        model = make_model(kind, seed)
        ids = torch.randint(4, 24, (1, 36), generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([model.generate(ids, do_sample=False, max_new_tokens=12)[:, -12:], ids], dim=1)  # its own words
        source, read, prompt = (None, None, ids[0].tolist()) if kind == "gpt2" else (ids, ids[0].tolist(), [START])
        model.generation_config.update(max_new_tokens=12, num_beams=beams)
        if any(name.startswith("min_") for name in options):  # there must be an end to put off
            model.generation_config.update(eos_token_id=[END, write(rules_of(model))[2]])
        plain = rules_of(model)
        behind = {"min_length": len(prompt) + options["min_length"]} if "min_length" in options else {}
        model.generation_config.update(**{**options, **behind})
        found = write(rules_of(model))
        assert found == model.generate(ids, do_sample=False)[0].tolist()[len(prompt) :]
        if found != write(plain):
            return
    pytest.fail("the option changes nothing")


def test_options_that_are_not_followed_are_named():
    model = make_model("bart", 0)
    assert unfollowed(model) == []
    model.generation_config.update(do_sample=True, temperature=0.7, guidance_scale=1.0, max_time=2.0, num_beams=4)
    assert unfollowed(model) == ["do_sample = True", "max_time = 2.0"]
    model.generation_config.update(do_sample=False, max_time=None, early_stopping="never")
    assert unfollowed(model) == ["early_stopping = 'never'"]


def test_rules_come_from_plain_values():
    known = {"ends": [1], "beams": 4, "bad_words": [[2, 3]], "unknown": 3}
    assert Rules.of(known) == Rules(ends=(1,), beams=4, bad_words=((2, 3),))


def test_beams_that_may_not_go_on_are_given_as_they_are():
    """Every token but one is forbidden, and that one may not come twice."""

    def step(ids, past):
        return np.zeros((len(ids), 4)), {"row": np.zeros((len(ids), 1))}

    rules = Rules(never=(0, 1, 2), no_repeat=1, beams=2, max_new_tokens=5)
    assert [text for text, _ in beam(step, [0], rules)] == [[3]]
