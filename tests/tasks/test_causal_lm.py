"""Language models: measures by hand, long texts in parts, and one whole path on Wikipedia's text."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers import pipeline as transformers_pipeline

from distill.data.splits import load_splits
from distill.errors import DataError
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.tasks import TASKS, Padding, find_task

TASK = TASKS["causal-lm"]


def learn_tokenizer(texts, size):
    """Byte-level BPE, as GPT-2 has it, learnt from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


@pytest.fixture(scope="module")
def lines(shared_data):
    def read(name, most):
        text = (shared_data / "wikitext2" / f"{name}.txt").read_text(encoding="utf-8")
        return [line.strip() for line in text.splitlines() if len(line.split()) > 10][:most]

    return {"train": read("train", 250), "validation": read("dev", 30)}


@pytest.fixture(scope="module")
def start(lines, tmp_path_factory):
    """GPT-2 of 2 layers, 64 wide, random weights."""
    tokenizer = learn_tokenizer(lines["train"], 800)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    folder = tmp_path_factory.mktemp("gpt")
    model = GPT2LMHeadModel(config)
    model.generation_config.repetition_penalty = 1.2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_measures_by_hand(start):
    tokenizer = AutoTokenizer.from_pretrained(start)
    encoded = TASK.encode({"text": ["one two"], "label": [None]}, tokenizer, 64)
    ids = encoded.ragged["input_ids"]
    batch = TASK.collate([encoded[0]], Padding({"input_ids": 0}))
    logits = np.zeros((1, len(ids), 800), np.float32)
    logits[0, 0, ids[1]] = math.log(799)  # half of the probability; the others share the rest evenly
    said = TASK.digest({"logits": logits}, batch)
    outputs = {name: value[0] for name, value in said.items()}
    measured = TASK.metrics(outputs, encoded)
    surprise = (math.log(2) + (len(ids) - 2) * math.log(800)) / (len(ids) - 1)
    assert measured["perplexity"] == pytest.approx(math.exp(surprise), rel=1e-5)
    assert measured["likelihood"] == pytest.approx(math.exp(-surprise), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(1 / (len(ids) - 1))
    assert TASK.told(outputs, encoded)[0][1] == pytest.approx(math.exp(surprise), rel=1e-5)


def test_a_long_text_is_read_in_parts(start, lines):
    tokenizer = AutoTokenizer.from_pretrained(start)
    whole = tokenizer(lines["train"][0])["input_ids"]
    encoded = TASK.encode({"text": lines["train"][:1], "label": [None]}, tokenizer, 16)
    assert encoded.ragged["input_ids"].tolist() == whole
    assert encoded.lengths.max() == 16
    assert set(encoded.sources) == {0}
    assert (encoded.ragged["labels"] == -100).sum() == len(encoded)


def test_a_text_without_a_token_moves_no_label(start):
    tokenizer = AutoTokenizer.from_pretrained(start)
    encoded = TASK.encode({"text": ["one two", "", "a b"], "label": [None] * 3}, tokenizer, 16)
    assert encoded.sources.tolist() == [0, 2]
    for row in (0, 1):
        assert encoded[row]["labels"].tolist() == [*encoded[row]["input_ids"][1:].tolist(), -100]


def test_behind_a_text_that_ends_its_end_is_asked_for(start):
    tokenizer = AutoTokenizer.from_pretrained(start)
    texts = ["one two three four five six seven eight nine", "a b", "a b", f"a b{tokenizer.eos_token}"]
    limit = len(tokenizer(texts[0])["input_ids"]) - 1
    encoded = TASK.encode({"text": texts, "label": [True, True, False, True]}, tokenizer, limit)
    plain = TASK.encode({"text": texts, "label": [None] * 4}, tokenizer, limit)
    assert encoded.sources.tolist() == [0, 0, 1, 2, 3]
    assert encoded.ragged["input_ids"].tolist() == plain.ragged["input_ids"].tolist()
    end = tokenizer.eos_token_id
    assert [encoded[row]["labels"][-1] for row in range(5)] == [-100, end, end, -100, -100]
    assert encoded[4]["labels"][-2] == end
    assert (encoded.ragged["labels"] != plain.ragged["labels"]).sum() == 2
    tokenizer.eos_token = None
    assert (TASK.encode({"text": ["a b"], "label": [True]}, tokenizer, 16).ragged["labels"] == -100).sum() == 1


def test_rows_of_tables_end_and_lines_of_a_running_text_do_not(tmp_path, rows_file):
    (tmp_path / "lines.txt").write_text("\n".join(f"line {number}" for number in range(20)))
    table = rows_file([{"text": f"text {number}"} for number in range(20)])
    for large in (None, tmp_path / "large"):  # read at once, or part by part
        folder = tmp_path / "lines"
        folder.mkdir(exist_ok=True)
        (folder / "more.txt").write_text("one more\nand one")
        unlabelled = [tmp_path / "lines.txt"] if large is None else [folder]
        splits = load_splits(table, unlabelled=unlabelled, target=TASK.target, folder=large)
        assert set(splits.train["label"]) == set(splits.validation["label"]) == {True}
        assert set(splits.unlabelled["label"]) == {False}
    assert set(load_splits(tmp_path / "lines.txt", target=TASK.target).train["label"]) == {False}


def test_a_language_model_is_no_embedder():
    assert find_task("auto", ["GPT2LMHeadModel"]) is TASK


def test_an_empty_text_is_named(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("\n".join(["text", *(f"text {number}" for number in range(20)), '""', "more"]))
    with pytest.raises(DataError, match=r"row 21: 'text' is (empty|missing)"):
        load_splits(path, target=TASK.target)


@pytest.fixture(scope="module")
def finished(lines, start, run_example, rows_file):
    files = {name: rows_file([{"text": text} for text in texts], name) for name, texts in lines.items()}
    return run_example(
        "causal-lm",
        *(f'data.{name}="{path}"' for name, path in files.items()),
        f'teacher={{start="{start}", finetune={{epochs=2, learning_rate=3e-3}}}}',
        "training={epochs=2, learning_rate=2e-3, baseline=false}",
        "data.max_length=32",
        "export.max_drop=2",
    )


@pytest.mark.slow
def test_a_language_model_goes_the_whole_way(finished, outputs_of):
    _, result = finished
    remembered = [f"present.{layer}.{kind}" for layer in range(1) for kind in ("key", "value")]
    assert outputs_of(result.bundle / "onnx/model_quantized.onnx") == ["logits", *remembered]
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert models["teacher"]["metrics"]["perplexity"] < 400  # by chance 800
    assert models["student"]["metrics"]["perplexity"] < 400
    assert models["student-int8"]["retention"] > 0.9
    assert models["student-onnx"]["metrics"]["perplexity"] == pytest.approx(
        models["student"]["metrics"]["perplexity"], rel=1e-3
    )
    assert verify_bundle(result.bundle).ok
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    assert bundle.model.outputs == ("logits",)
    text = "The first season of the series"
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "student")
    model = AutoModelForCausalLM.from_pretrained(result.folder / "student").eval()
    tokens = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, labels=tokens["input_ids"])
    said = bundle(text)
    chances = output.logits[0, -1].softmax(-1)
    assert said.next[0][0] == tokenizer.decode([int(chances.argmax())])
    assert said.next[0][1] == pytest.approx(float(chances.max()), abs=1e-4)
    assert said.perplexity == pytest.approx(math.exp(float(output.loss)), rel=1e-3)
    assert len(said.next) == 5
    write = transformers_pipeline("text-generation", model=str(result.folder / "student"))
    written = write(text, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert bundle.predict([text], new_tokens=8)[0].text == written != ""
    whole, longest = bundle.encode([text])[0]["input_ids"], bundle.rules["context"]
    more = write(text, max_new_tokens=longest - len(whole), do_sample=False, return_full_text=False)[0]
    assert (
        bundle.predict([text], new_tokens=longest)[0].text == more["generated_text"]
    )  # the prompt is not cut for room
    bench = json.loads((result.folder / "results.json").read_text())["bench"]
    assert {cell["step"] for cell in bench["cells"]} == {True, False}


@pytest.mark.slow
def test_a_language_model_learns_where_a_text_ends(finished, lines):
    _, result = finished
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "student")
    model = AutoModelForCausalLM.from_pretrained(result.folder / "student").eval()
    behind, within = [], []
    for text in lines["validation"]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, -32:]
        with torch.no_grad():
            chances = model(ids).logits[0].softmax(-1)[:, tokenizer.eos_token_id]
        behind.append(float(chances[-1]))
        within.append(float(chances[:-1].mean()))
    assert np.mean(behind) > 3 * np.mean(within)


@pytest.mark.slow
def test_a_llama_learns_from_what_it_writes_itself(lines, tmp_path, run_example, rows_file):
    """Grouped keys, rotations, no biases; half of the batches its own, judged by a live teacher; weights in blocks."""
    tokenizer = learn_tokenizer(lines["train"], 500)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    files = {name: rows_file([{"text": text} for text in texts[:80]], name) for name, texts in lines.items()}
    _, result = run_example(
        "causal-lm",
        *(f'data.{name}="{path}"' for name, path in files.items()),
        f'teacher={{start="{tmp_path}/start", finetune={{epochs=2, learning_rate=3e-3}}}}',
        "training={epochs=2, learning_rate=2e-3, baseline=false}",
        'objective={preset="jsd", on_policy={share=0.5}}',
        "data.max_length=32",
        'export={weights="blocks-8", max_drop=5, golden=4}',
    )
    assert not list(result.folder.glob("work/cache/shard-*"))  # the teacher answered live
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert models["student"]["metrics"]["perplexity"] < 250  # by chance 500
    assert models["student-int8"]["retention"] > 0.9
    assert verify_bundle(result.bundle).ok
    text = "The first season of the series"
    model = AutoModelForCausalLM.from_pretrained(result.folder / "student").eval()
    tokens = tokenizer(text, return_tensors="pt")
    written = model.generate(**tokens, do_sample=False, max_new_tokens=8)[0, tokens["input_ids"].shape[1] :]
    said = Bundle.load(result.bundle, file="onnx/model.onnx").predict([text], new_tokens=8)[0]
    assert said.text == tokenizer.decode(written, skip_special_tokens=True)
