"""A GPT-2-shaped teacher and its half as deep student on WikiText-2: perplexity of each, and what the student costs.

    python benchmarks/language.py --data ../shared/data/wikitext2

Tokenizer (byte-level BPE, 2,000 pieces) and teacher (4 layers, 128 wide) are made here from the training text alone. A
tenth of its lines, by content, chooses checkpoints; dev.txt is only reported on. The baseline is the same student, with
what it inherits from the teacher, trained on the text alone for as many steps. A run that is killed goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from distill import Recipe, compress
from distill.display import Display
from distill.files import write_json

END = "<|endoftext|>"


def make_start(text: Path, folder: Path, options: argparse.Namespace) -> None:
    """A tokenizer learnt from the text, and a model with random weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=options.pieces, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.read_text(encoding="utf-8").splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": options.width, "n_layer": 4, "n_head": 4}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0, **sizes)
    ).save_pretrained(folder)


def recipe_of(options: argparse.Namespace, start: Path) -> Recipe:
    """Text in parts of 64 tokens; student and baseline see it equally often."""
    rate = {"epochs": options.epochs, "learning_rate": 1e-3}
    finetune = {**rate, "epochs": options.teacher_epochs or options.epochs}
    return Recipe.parse(
        {
            "name": "language",
            "task": "causal-lm",
            "output": str(options.output / "run"),
            "teacher": {"start": str(start), "finetune": finetune},
            "student": {"card": "layers-4", "layers": 2},
            "data": {
                "train": str(options.data / "train.txt"),
                "test": str(options.data / "dev.txt"),
                "max_length": 64,
                "on_bad_row": "skip",
            },
            "objective": json.loads(options.objective),
            "training": rate,
            "bench": {"lengths": [32], "runs": 50},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/wikitext2"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/language"))
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--teacher-epochs", type=float, default=0, help="as many as the students' where 0")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--pieces", type=int, default=2000)
    parser.add_argument("--objective", default="{}", help="a recipe's `objective`, as JSON")
    options = parser.parse_args()
    start = options.output / "start"
    if not (start / "config.json").exists():
        make_start(options.data / "train.txt", start, options)
    with Display(Console(stderr=True)) as display:
        result = compress(recipe_of(options, start), progress=display)
    results: dict[str, Any] = json.loads((result.folder / "results.json").read_text())
    summary = {
        "created": results["created"],
        "machine": results["machine"],
        "stages": results["stages"],
        "models": [
            {key: row.get(key) for key in ("role", "metrics", "bytes", "parameters", "latency_ms", "token_latency_ms")}
            for row in results["models"]
        ],
    }
    write_json(options.output / "summary.json", summary)
    for row in summary["models"]:
        measured = row["metrics"]
        print(f"{row['role']:14} perplexity {measured['perplexity']:.2f} accuracy {measured['accuracy']:.4f}", end=" ")
        print(f"{row['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
