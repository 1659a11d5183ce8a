"""What the tests of the tasks share: a small pretrained-looking model, and shortened runs of the example recipes."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from distill.pipeline import compress
from distill.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def make_start(tmp_path_factory, make_tokenizer):
    """By texts: a BERT of 2 layers, 64 wide, random weights, whose tokenizer knows their frequent words."""
    from collections import Counter

    def make(texts, *, words=1500, positions=128, kind=BertModel, **changes):
        counts = Counter(word for text in texts for word in text.lower().split() if word.isascii())
        tokenizer = make_tokenizer([" ".join(word for word, _ in counts.most_common(words)), ". , ? ' - 0 1 2 3 4 5"])
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=positions,
            initializer_range=0.1,
            **changes,
        )
        folder = tmp_path_factory.mktemp("start")
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def run_example(tmp_path_factory):
    """By name and overrides: the example's recipe, shortened, through to the bundle."""

    def run(name, *overrides):
        folder = tmp_path_factory.mktemp(name)
        short = ["student.layers=1", "export.golden=6", "bench.lengths=[8]", "bench.runs=5", f'output="{folder}/run"']
        recipe = Recipe.load(ROOT / "examples" / f"{name}.toml", [*short, *overrides])
        return recipe, compress(recipe)

    return run


@pytest.fixture(scope="session")
def outputs_of():
    """By an ONNX file: the names of what it returns, in order. Clients look for the first, or for each by its name."""

    def read(path):
        return [value.name for value in onnx.load(path).graph.output]

    return read


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """By rows: a JSONL file of them."""

    def write(rows, name="rows"):
        path = tmp_path_factory.mktemp("data") / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def read_rows():
    """By path and how many: the rows of a JSONL file."""

    def read(path, most=None):
        with Path(path).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()][:most]

    return read


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's 1,797 handwritten digits: (1797, 8, 8) uint8, and their numbers as text."""
    found = load_digits()
    return np.rint(found.images * 255 / 16).astype(np.uint8), found.target.astype(str).tolist()


@pytest.fixture(scope="session")
def make_vit(tmp_path_factory):
    """By changes: a folder with a ViT of 4 layers, 48 wide, patches of 2 x 2 of 8 x 8 pixels, random weights."""

    def make(labels=10, side=8, **changes):
        torch.manual_seed(0)
        shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
        config = ViTConfig(image_size=8, patch_size=2, num_labels=labels, initializer_range=0.1, **{**shape, **changes})
        folder = tmp_path_factory.mktemp("vit")
        ViTForImageClassification(config).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def captions(digits):
    """What can be seen on each of `digits`: `a bold narrow handwritten three`, 39 different ones."""
    images, labels = digits
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    ink, columns = images.mean(axis=(1, 2)), (images.max(axis=1) > 64).sum(axis=1)
    strokes = np.digitize(ink, np.quantile(ink, [1 / 3, 2 / 3]))
    wide = columns > np.median(columns)
    return [
        f"a {('thin', 'plain', 'bold')[stroke]} {'wide' if broad else 'narrow'} handwritten {names[int(label)]}"
        for stroke, broad, label in zip(strokes, wide, labels, strict=True)
    ]
