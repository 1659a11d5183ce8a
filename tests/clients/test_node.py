"""The bundle in transformers.js on Node, unchanged: the same tokens, the same labels."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from distill.export.bundle import Contents, write_bundle
from distill.export.captioner import cut_captioner
from distill.export.clients import Facts, javascript, usage
from distill.export.dual import part
from distill.export.encoder_decoder import cut
from distill.export.graph import export_graph
from distill.export.pieces import pieces, towers
from distill.export.quantize import quantize_dynamic_int8
from distill.export.runtime import Bundle
from distill.export.strings import odd_strings
from distill.heads.images import encode_image
from distill.tasks import TASKS
from distill.teacher import load_checkpoint

HERE = Path(__file__).resolve().parent
TOLERANCE = 0.02  # of a probability: Node's ONNX Runtime is another build than Python's

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def clients() -> Path:
    """The folder with node_modules, installed once for each version of package.json."""
    for command in ("node", "npm"):
        if shutil.which(command) is None:
            pytest.skip(f"needs {command}, version 20 or newer")
    wanted = (HERE / "package.json").read_bytes()
    folder = Path.home() / ".cache" / "distill-tests" / f"node-{hashlib.sha256(wanted).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    beside = folder.with_name(f"{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    (beside / "package.json").write_bytes(wanted)
    no_gpu = {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
    done = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"],
        cwd=beside,
        env={**os.environ, **no_gpu},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        shutil.rmtree(beside)
        pytest.skip(f"npm cannot install the clients: {done.stderr.strip().splitlines()[-1:]}")
    try:
        beside.rename(folder)
    except OSError:  # another worker was faster
        shutil.rmtree(beside)
    return folder


@pytest.fixture
def node(clients: Path) -> Callable[..., list[Any]]:
    """By bundle, task and texts: what transformers.js answers."""

    def ask(bundle: Path, task: str, texts: list[Any]) -> list[Any]:
        lines = "".join(json.dumps(text) + "\n" for text in texts)
        done = subprocess.run(
            ["node", HERE / "node.mjs", bundle, task],
            input=lines,
            env={**os.environ, "CLIENTS": str(clients)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return ask


def test_fifty_sentences_get_the_same_labels(shared_bundle: Any, node: Callable[..., list[Any]]) -> None:
    """The pipeline that people use, given the bundle's folder and nothing else."""
    texts = [*shared_bundle.texts[:49], " ".join(shared_bundle.texts)]  # the last is longer than the model reads
    ours = Bundle.load(shared_bundle.folder).predict(texts, batch_size=1)
    theirs = node(shared_bundle.folder, "predict", texts)
    assert len(theirs) == 50
    assert len({answer["label"] for answer in theirs}) > 1
    for mine, other in zip(ours, theirs, strict=True):
        assert other["label"] == mine.label
        assert other["all"] == pytest.approx(mine.probabilities, abs=TOLERANCE)


def test_odd_labels_arrive(make_bundle: Callable[..., Any], tmp_path: Path, node: Callable[..., list[Any]]) -> None:
    labels = ["<b>bold</b>", 'quo"te\nline', "日本"]
    bundle = make_bundle(tmp_path / "odd", labels=labels)
    assert set(node(bundle.folder, "predict", ["where is my card"])[0]["all"]) == set(labels)


def test_every_token_gets_the_same_tag(tagger: Path, shared_bundle: Any, node: Callable[..., list[Any]]) -> None:
    bundle, texts = Bundle.load(tagger), shared_bundle.texts[:30]
    seen = set()
    for text, theirs in zip(texts, node(tagger, "tag", texts), strict=True):
        window = bundle.head.windows(bundle.tokenizer, [text])[0][0]
        rows = bundle.ask([window])[0]["probabilities"][1:-1]  # without [CLS] and [SEP]
        assert [one["entity"] for one in theirs] == [bundle.labels[best] for best in rows.argmax(-1)]
        assert [one["score"] for one in theirs] == pytest.approx(rows.max(-1), abs=TOLERANCE)
        seen |= {one["entity"] for one in theirs}
    assert len(seen) > 1


@pytest.fixture
def tagger(shared_bundle: Any, tmp_path: Path) -> Path:
    """A bundle of random weights that tags tokens."""
    torch.manual_seed(0)
    labels = ["O", "B-card", "I-card"]
    config = shared_bundle.model.config
    model = BertForTokenClassification(
        BertConfig.from_dict({**config.to_dict(), "id2label": dict(enumerate(labels)), "label2id": None})
    ).eval()
    work = tmp_path / "work"
    model.save_pretrained(work)
    shared_bundle.tokenizer.save_pretrained(work)
    metadata = {"distill.format": "1", "distill.task": "token-classification", "distill.max_length": "48"}
    metadata["distill.labels"] = json.dumps(labels)
    spec = TASKS["token-classification"].graph(["input_ids", "attention_mask", "token_type_ids"])
    export_graph(model, spec, work / "model.onnx", metadata=metadata)
    quantize_dynamic_int8(work / "model.onnx", work / "int8.onnx", target="portable", metadata=metadata)
    write_bundle(
        tmp_path / "tagger",
        Contents(
            name="tagger",
            task="token-classification",
            labels=labels,
            max_length=48,
            fp32_onnx=work / "model.onnx",
            int8_onnx=work / "int8.onnx",
            model_folder=work,
            golden_texts=shared_bundle.texts[:3],
            metrics={},
            verification=[],
            recipe_toml='name = "tagger"\n',
            versions={"distill": "0"},
        ),
    )
    return tmp_path / "tagger"


def test_a_language_model_writes_the_same(writer: Path, node: Callable[..., list[Any]]) -> None:
    """Keys and values go round in transformers.js as they do here."""
    prompts = ["where is my card", "the card has not arrived and", "i"]
    ours = [one.text for one in Bundle.load(writer).predict(prompts, new_tokens=8)]
    assert len(set(ours)) == 3
    assert node(writer, "write", prompts) == ours


@pytest.fixture
def writer(shared_bundle: Any, tmp_path: Path) -> Path:
    """A bundle of random weights that writes, whose tokens are those of GPT-2: bytes and what was learnt of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    learn = trainers.BpeTrainer(vocab_size=400, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(shared_bundle.texts, learn)
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0, **sizes)
    ).eval()
    work, task = tmp_path / "work", TASKS["causal-lm"]
    model.save_pretrained(work)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
    whole.save_pretrained(work)
    metadata = {"distill.format": "1", "distill.task": "causal-lm", "distill.max_length": "48", "distill.labels": "[]"}
    metadata["distill.rules"] = json.dumps(task.rules(model))
    spec = task.exported(model, ["input_ids", "attention_mask"])
    export_graph(model, spec, work / "model.onnx", metadata=metadata)
    quantize_dynamic_int8(work / "model.onnx", work / "int8.onnx", target="portable", metadata=metadata)
    facts = {"metrics": {}, "verification": [], "recipe_toml": 'name = "writer"\n', "versions": {"distill": "0"}}
    files = {"fp32_onnx": work / "model.onnx", "int8_onnx": work / "int8.onnx", "model_folder": work}
    named = {"name": "writer", "task": "causal-lm", "labels": [], "max_length": 48}
    write_bundle(tmp_path / "writer", Contents(**named, **files, **facts, golden_texts=shared_bundle.texts[:3]))
    return tmp_path / "writer"


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_a_translator_writes_the_same(
    kind: str, shared_bundle: Any, tmp_path: Path, node: Callable[..., list[Any]]
) -> None:
    """The first, empty past, and keys and values of the encoder's states taken from the past for each further token."""
    folder = translator(kind, shared_bundle, tmp_path)
    prompts = ["where is my card", "the card has not arrived and", "i"]
    ours = [one.text for one in Bundle.load(folder).predict(prompts)]
    assert len(set(ours)) > 1
    assert node(folder, "rewrite", prompts) == ours


def translator(kind: str, shared_bundle: Any, folder: Path) -> Path:
    """A bundle of random weights that makes texts of texts."""
    from transformers import MarianConfig, MarianMTModel, T5Config, T5ForConditionalGeneration

    tokenizer, task = shared_bundle.tokenizer, TASKS["seq2seq"]
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": tokenizer.sep_token_id}
    torch.manual_seed(0)
    if kind == "t5":
        sizes = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_model": 32, "d_kv": 8, "d_ff": 64}
        model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids, initializer_factor=3.0))
    else:
        halves = ("encoder", "decoder")
        sizes = {f"{half}_{what}": size for half in halves for what, size in (("layers", 2), ("attention_heads", 4))}
        sizes |= {f"{half}_ffn_dim": 64 for half in halves} | {
            "d_model": 32,
            "max_position_embeddings": 64,
            "init_std": 0.1,
        }
        config = MarianConfig(vocab_size=len(tokenizer), **sizes, **ids, tie_word_embeddings=False)
        model = MarianMTModel(config)  # were its tables tied, random weights would say one word for ever
    model.eval().generation_config.max_new_tokens = 8
    work = folder / "work"
    for part_of_it in (model, tokenizer):
        part_of_it.save_pretrained(work)
    metadata = {"distill.format": "1", "distill.task": task.name, "distill.max_length": "48", "distill.labels": "[]"}
    metadata["distill.rules"] = json.dumps(task.rules(model))
    spec = task.exported(model, ["input_ids", "attention_mask"])
    export_graph(model, spec, work / "whole.onnx", metadata=metadata)
    cut(work / "whole.onnx", *pieces(work / "cut/whole.onnx"))
    facts = {"metrics": {}, "verification": [], "recipe_toml": 'name = "writer"\n', "versions": {"distill": "0"}}
    files = {"fp32_onnx": work / "cut/whole.onnx", "int8_onnx": work / "cut/whole.onnx", "model_folder": work}
    named = {"name": "writer", "task": task.name, "labels": [], "max_length": 48}
    write_bundle(folder / "writer", Contents(**named, **files, **facts, golden_texts=[("my card", "a card")]))
    return folder / "writer"


KNOWN = {
    "Han beyond the basic plane is one word": "𠀀𠀁",
    "a capital sigma at a word's end is lowered to a final one": "ΟΔΟΣ",
    "a sign newer than Unicode 8 is an accent": "a \u0eba b",
    "a text that is cut loses its [SEP]": "very long " * 500,
}
"""Where transformers.js 4.3.1 splits a text otherwise than tokenizers does. docs/bundle.md tells people."""


def same(letter: str) -> bool:
    """Not one of those that `KNOWN` names."""
    return letter not in "Σ\u0c3c\u0eba" and letter < "\U00010000"


@pytest.fixture
def real_tokenizer(minilm_folder: Path, own_bundle: Path) -> Path:
    """A bundle with a real vocabulary of 30,522 pieces."""
    shutil.copyfile(minilm_folder / "tokenizer.json", own_bundle / "tokenizer.json")
    return own_bundle


def test_the_tokens_of_every_script_are_ours(real_tokenizer: Path, node: Callable[..., list[Any]]) -> None:
    """One id that differs is one wrong answer in somebody's app."""
    ours, texts = Bundle.load(real_tokenizer), [text for text in odd_strings(5000) if all(map(same, text))]
    rows = [row["input_ids"] for row in ours.encode(texts)]
    whole = [(text, row) for text, row in zip(texts, rows, strict=True) if len(row) < ours.max_length]
    assert len(whole) > 3000
    theirs = node(real_tokenizer, "encode", [text for text, _ in whole])
    assert [text for (text, mine), other in zip(whole, theirs, strict=True) if mine != other] == []
    assert len({identity for _, row in whole for identity in row}) > 500  # not all unknown


@pytest.mark.parametrize("text", KNOWN.values(), ids=KNOWN.keys())
def test_what_transformers_js_is_known_to_do_otherwise(
    text: str, real_tokenizer: Path, node: Callable[..., list[Any]]
) -> None:
    """Fails when a newer transformers.js agrees: then the line in docs/bundle.md goes, and the case above widens."""
    ours = Bundle.load(real_tokenizer).encode([text])[0]["input_ids"]
    theirs = node(real_tokenizer, "encode", [text])[0]
    assert theirs != ours
    if len(ours) == 48:
        assert theirs[:-1] == ours[:-1]  # as long as ours, and alike but for the end


def test_the_tokens_of_pairs_are_ours(shared_bundle: Any, node: Callable[..., list[Any]]) -> None:
    texts = shared_bundle.texts
    pairs = [(texts[row], texts[-row]) for row in range(40)]
    ours = [row["input_ids"] for row in Bundle.load(shared_bundle.folder).encode(pairs)]
    assert node(shared_bundle.folder, "encode", pairs) == ours


def test_the_javascript_of_the_readme_runs(shared_bundle: Any, clients: Path, tmp_path: Path) -> None:
    """As a person would paste it, but for the two places that it says to fill in."""
    folder = shared_bundle.folder
    block = re.search(r"```javascript\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    code = block[1].replace("a text", shared_bundle.texts[0])
    said = app(code, folder, clients, tmp_path)
    assert f"label: '{Bundle.load(folder)(shared_bundle.texts[0]).label}'" in said


def test_wide_weights_and_tokens_in_int4_are_read_alike(
    make_bundle: Callable[..., Any], tmp_path: Path, clients: Path
) -> None:
    """The README's lines with the option for exact sums, and the same file in WebAssembly, whose kernels are others."""
    bundle = make_bundle(tmp_path / "small", target="arm64", tables="int4")
    ours, texts = Bundle.load(bundle.folder), bundle.texts[:12]
    assert ours.model.metadata["distill.embeddings"] == "int4"
    block = re.search(r"```javascript\n(.*?)```", (bundle.folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    assert "x64quantprecision" in block[1]
    said, mine = app(block[1].replace("a text", texts[0]), bundle.folder, clients, tmp_path), ours(texts[0])
    assert f"label: '{mine.label}'" in said
    assert float(said.partition("score: ")[2].split()[0]) == pytest.approx(mine.probability, abs=TOLERANCE)
    lines = "".join(json.dumps(row["input_ids"]) + "\n" for row in ours.encode(texts))
    command, environment = ["node", HERE / "web.mjs", bundle.folder], {**os.environ, "CLIENTS": str(clients)}
    done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text, line in zip(texts, done.stdout.splitlines(), strict=True):
        wanted = list(ours(text).probabilities.values())
        np.testing.assert_allclose(json.loads(line), wanted, atol=TOLERANCE)


def test_the_javascript_of_a_bundle_for_pairs_runs(
    make_bundle: Callable[..., Any], tmp_path: Path, clients: Path
) -> None:
    """The pipeline takes single texts alone, so pairs have code of their own."""
    bundle = make_bundle(tmp_path / "pairs")
    ours = Bundle.load(bundle.folder)
    first = bundle.texts[0]
    second = min(bundle.texts, key=lambda text: ours(first, text).probabilities[ours(first).label])
    facts = Facts(
        ["arrival", "exchange", "password"], 48, ("input_ids", "attention_mask", "token_type_ids"), pairs=True
    )
    code = javascript(facts).replace("a text", first).replace("a second text", second)
    said, mine = app(code, bundle.folder, clients, tmp_path), ours(first, second)
    assert f"label: '{mine.label}'" in said
    assert float(said.partition("score: ")[2].split()[0]) == pytest.approx(mine.probability, abs=TOLERANCE)
    alone = ours(first).probabilities[mine.label]
    assert abs(mine.probability - alone) > 3 * TOLERANCE  # or a text that never arrived would not show


@pytest.fixture
def seer(tmp_path: Path) -> Path:
    """A bundle of random weights that puts images of 8 x 8 pixels into five classes."""
    torch.manual_seed(0)
    labels = ["zero", "one", "two", "three", "four"]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = ViTConfig(
        image_size=8, patch_size=2, id2label=dict(enumerate(labels)), label2id=None, initializer_range=0.3, **shape
    )
    model, work = ViTForImageClassification(config).eval(), tmp_path / "work"
    model.save_pretrained(work)
    ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(work)
    task = TASKS["image-classification"]
    metadata = {"distill.format": "1", "distill.task": task.name, "distill.max_length": "17"}
    metadata["distill.labels"] = json.dumps(labels)
    export_graph(model, task.exported(model, ["pixel_values"]), work / "model.onnx", metadata=metadata)
    quantize_dynamic_int8(work / "model.onnx", work / "int8.onnx", target="portable", metadata=metadata)
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    write_bundle(
        tmp_path / "seer",
        Contents(
            name="seer",
            task=task.name,
            labels=labels,
            max_length=17,
            fp32_onnx=work / "model.onnx",
            int8_onnx=work / "int8.onnx",
            model_folder=work,
            golden_texts=list(images),
            metrics={},
            verification=[],
            recipe_toml='name = "seer"\n',
            versions={"distill": "0"},
        ),
    )
    return tmp_path / "seer"


def test_images_get_the_same_labels(seer: Path, clients: Path, tmp_path: Path) -> None:
    """The README's own lines, on files: transformers.js reads preprocessor_config.json as we do."""
    bundle = Bundle.load(seer)
    images = np.random.default_rng(1).integers(0, 256, (200, 8, 8, 3), np.uint8)
    found = {bundle(image).label: image for image in images}
    assert len(found) > 1
    facts = Facts(bundle.labels, bundle.max_length, bundle.model.inputs, False, None, "image-classification")
    code = javascript(facts)
    assert code.strip() in usage(facts, ["JavaScript"])
    for number, image in enumerate(found.values()):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "one.png").write_bytes(encode_image(image))
        said, mine = app(code.replace("an-image.png", "one.png"), seer, clients, place), bundle(image)
        assert f"label: '{mine.label}'" in said
        assert float(said.partition("score: ")[2].split()[0]) == pytest.approx(mine.probability, abs=TOLERANCE)


@pytest.fixture
def pairer(make_clip: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle of random weights that compares images of 16 x 16 pixels with texts."""
    task = TASKS["image-text"]
    checkpoint = load_checkpoint(
        str(make_clip(["a bold handwritten three", "a red sign"], side=16, positions=24)), task
    )
    work = tmp_path / "work"
    checkpoint.save(work, task, 24)
    metadata = {"distill.format": "1", "distill.task": task.name, "distill.max_length": "24", "distill.labels": "[]"}
    export_graph(checkpoint.model, task.exported(checkpoint.model, []), work / "whole.onnx", metadata=metadata)
    quantize_dynamic_int8(work / "whole.onnx", work / "int8.onnx", target="portable", metadata=metadata)
    for name in ("whole", "int8"):
        part(work / f"{name}.onnx", *towers(work / "cut" / f"{name}.onnx"))
    facts = {"metrics": {}, "verification": [], "recipe_toml": 'name = "pairer"\n', "versions": {"distill": "0"}}
    files = {"fp32_onnx": work / "cut/whole.onnx", "int8_onnx": work / "cut/int8.onnx", "model_folder": work}
    named = {"name": "pairer", "task": task.name, "labels": [], "max_length": 24}
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    write_bundle(tmp_path / "pairer", Contents(**named, **files, **facts, golden_texts=[(image, "a red sign")]))
    return tmp_path / "pairer"


def test_an_image_and_a_text_are_as_alike(pairer: Path, clients: Path, tmp_path: Path) -> None:
    """The README's own lines: tokens, pixels and both files' vectors, in transformers.js and here."""
    bundle, seen = Bundle.load(pairer), set()
    block = re.search(r"```javascript\n(.*?)```", (pairer / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 16, 3), np.uint8)
    for number, (image, text) in enumerate(zip(images, ["a bold sign", "a Red three", "red"], strict=True)):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "one.png").write_bytes(encode_image(image))
        said = app(block[1].replace("an-image.png", "one.png").replace("a text", text), pairer, clients, place)
        mine = bundle(str(place / "one.png"), text).similarity
        assert float(said.partition("similarity: ")[2].split()[0]) == pytest.approx(mine, abs=TOLERANCE)
        seen.add(round(mine, 3))
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["gpt2", "trocr"])
def test_captions_are_written_alike(
    kind: str,
    make_captioner: Callable[..., Any],
    caption_words: Callable[..., Any],
    clients: Path,
    tmp_path: Path,
) -> None:
    """The README's own lines write what we write: pixels, the first, empty past, and each one after it."""
    task, words = (
        TASKS["image-captioning"],
        caption_words(["a bold thin narrow wide one two three four five"]),
    )
    model, work = make_captioner(len(words), kind=kind, decoder=32, layers=2).eval(), tmp_path / "work"
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(2.0)  # or every image were given the same words
        model.get_output_embeddings().weight[:4] = 0.0  # or none at all
    model.generation_config.max_new_tokens = 8
    for part_of_it in (model, words, ViTImageProcessorPil(size={"height": 8, "width": 8})):
        part_of_it.save_pretrained(work)
    metadata = {"distill.format": "1", "distill.task": task.name, "distill.max_length": "12", "distill.labels": "[]"}
    metadata["distill.rules"] = json.dumps(task.rules(model))
    export_graph(model, task.exported(model, []), work / "whole.onnx", metadata=metadata)
    cut_captioner(work / "whole.onnx", *pieces(work / "cut/whole.onnx"))
    facts = {"metrics": {}, "verification": [], "recipe_toml": 'name = "writer"\n', "versions": {"distill": "0"}}
    files = {"fp32_onnx": work / "cut/whole.onnx", "int8_onnx": work / "cut/whole.onnx", "model_folder": work}
    named = {"name": "writer", "task": task.name, "labels": [], "max_length": 12}
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    write_bundle(tmp_path / "writer", Contents(**named, **files, **facts, golden_texts=[(images[0], "a bold three")]))
    bundle, seen = Bundle.load(tmp_path / "writer"), set()
    block = re.search(r"```javascript\n(.*?)```", (bundle.folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert block is not None
    for number, image in enumerate(images):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "one.png").write_bytes(encode_image(image))
        said, mine = app(block[1].replace("an-image.png", "one.png"), bundle.folder, clients, place), bundle(image).text
        assert f"generated_text: '{mine}'" in said
        seen.add(mine)
    assert len(seen) > 1


def app(code: str, folder: Path, clients: Path, place: Path) -> str:
    """What the README's JavaScript prints, given the two places that it says to fill in."""
    code = code.replace("PATH/TO/THE/PARENT/OF/THIS/FOLDER", str(folder.parent)).replace("THIS-FOLDER", folder.name)
    (place / "app.mjs").write_text(code, encoding="utf-8")
    (place / "node_modules").symlink_to(clients / "node_modules")
    done = subprocess.run(["node", "app.mjs"], cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
