"""A GPT-2-shaped teacher and its half as deep student on WikiText-2: perplexity of each, and what the student costs.

    python benchmarks/language.py --data ../shared/data/wikitext2 --presets language forward-kl

Tokenizer (byte-level BPE) and teacher (4 layers) are made here from the training text alone. A tenth of its lines, by
content, chooses checkpoints and, of several presets, the one that is shown first; dev.txt is only reported on. The
baseline is the same student, with what it inherits from the teacher, trained on the text alone for as many steps. A run
that is killed goes on.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from distill import Recipe, compress
from distill.candidates import machine_target
from distill.display import Display
from distill.files import read_json, write_json
from distill.machine import describe_machine
from distill.pipeline import finetune

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


def recipe_of(name: str, options: argparse.Namespace, **sections: Any) -> Recipe:
    """Text in parts of 64 tokens."""
    data = {
        "train": str(options.data / "train.txt"),
        "test": str(options.data / "dev.txt"),
        "max_length": 64,
        "on_bad_row": "skip",
    }
    common = {"name": name, "task": "causal-lm", "output": str(options.output / name), "data": data}
    return Recipe.parse({**common, **sections})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/wikitext2"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/language"))
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--teacher-epochs", type=float, default=0, help="as many as the students' where 0")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--pieces", type=int, default=2000)
    parser.add_argument("--dropout", type=float, help="of the students and the baseline, in place of the teacher's")
    parser.add_argument("--presets", nargs="+", default=["language"], help="one student each, and a baseline beside")
    options = parser.parse_args()
    start = options.output / "start"
    if not (start / "config.json").exists():
        make_start(options.data / "train.txt", start, options)
    steps = {"learning_rate": options.learning_rate}
    first = {"start": str(start), "finetune": {**steps, "epochs": options.teacher_epochs or options.epochs}}
    with Display(Console(stderr=True)) as display:
        checkpoint = finetune(recipe_of("teacher", options, teacher=first), progress=display).folder / "teacher"
    students = {}
    for preset in options.presets:
        recipe = recipe_of(
            preset,
            options,
            teacher={"checkpoint": str(checkpoint)},
            student={"card": "layers-4", "layers": 2, "dropout": options.dropout},
            objective={"preset": preset},
            training={**steps, "epochs": options.epochs, "baseline": preset == options.presets[0]},
            export={"target": machine_target()},
            bench={"lengths": [32], "runs": 50},
        )
        with Display(Console(stderr=True)) as display:
            folder = compress(recipe, progress=display).folder
        results: dict[str, Any] = read_json(folder / "results.json")
        curve = read_json(folder / "work/state/train.json")["facts"]["curve"]
        validation = max(point["likelihood"] for point in curve if "likelihood" in point)
        students[preset] = {"validation": validation, "stages": results["stages"], "models": shown(results["models"])}
    best = sorted(students, key=lambda preset: -students[preset]["validation"])
    asked = ("epochs", "teacher_epochs", "learning_rate", "width", "pieces", "dropout")
    sizes = {name: getattr(options, name) for name in asked}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(
        options.output / "summary.json",
        {
            "created": created,
            "machine": describe_machine(),
            **sizes,
            "students": {name: students[name] for name in best},
        },
    )
    for preset in best:
        for row in students[preset]["models"]:
            measured, size = row["metrics"], row["bytes"] / 1e6
            said = f"perplexity {measured['perplexity']:.2f} accuracy {measured['accuracy']:.4f} {size:.1f} MB"
            print(f"{preset:12} {row['role']:14} {said}")


def shown(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the summary keeps of each model."""
    kept = ("role", "metrics", "bytes", "parameters", "latency_ms", "token_latency_ms")
    return [{key: row.get(key) for key in kept} for row in models]


if __name__ == "__main__":
    main()
