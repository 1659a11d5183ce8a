"""A translator and its students on Multi30k, English to German: BLEU of teacher, students and int8 files.

    python benchmarks/translation.py --data ../shared/data/multi30k

No pretrained weights: a T5-shaped teacher of 3 + 3 layers learns from the training file alone, with a Unigram tokenizer
learnt there too. Its students have two layers of its encoder and one of its decoder; one of them learns from targets
alone. A tenth of the training rows chooses the epoch; the validation file is only reported on. A killed run goes on.

    python benchmarks/translation.py --rows 3000 --unlabelled 8000 --targets gold teacher

has few pairs, and English sentences beside them that the teacher translates for its student; with `gold` a student has
the pairs as they are and those sentences, with `teacher` it never sees the pairs' own German.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from distill import Recipe, compress
from distill.candidates import machine_target
from distill.display import Display
from distill.files import write_json
from distill.machine import describe_machine
from distill.pipeline import finetune

SPECIAL = ["<pad>", "</s>", "<unk>"]


def read(path: Path, most: int | None = None) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()][:most]


def learn_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer that ends every text with </s>, as T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def prepare(options: argparse.Namespace) -> dict[str, str]:
    """Writes the rows and, where the teacher starts from none, an untrained model of its shape."""
    folder, every = options.output, read(options.data / "train.jsonl", options.rows + options.unlabelled)
    folder.mkdir(parents=True, exist_ok=True)
    rows, free = every[: options.rows], [{"en": row["en"]} for row in every[options.rows :]]
    files = {name: folder / f"{name}.jsonl" for name in ("train", "test", "unlabelled")}
    files["start"] = options.start or folder / "start"
    for name, part in (("train", rows), ("test", read(options.data / "val.jsonl")), ("unlabelled", free)):
        files[name].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), encoding="utf-8")
    if not (files["start"] / "model.safetensors").exists():
        tokenizer = learn_tokenizer([row[side] for row in rows for side in ("en", "de")], options.vocabulary)
        torch.manual_seed(0)
        shape = {"num_layers": 3, "num_decoder_layers": 3, "num_heads": 4, "d_model": options.width}
        inner = {"d_kv": options.width // 4, "d_ff": 2 * options.width, "vocab_size": len(tokenizer)}
        ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
        model = T5ForConditionalGeneration(T5Config(**shape, **inner, **ids, initializer_factor=0.5))
        model.generation_config.max_new_tokens = 48
        model.save_pretrained(files["start"])
        tokenizer.save_pretrained(files["start"])
    return {name: str(path) for name, path in files.items()}


def recipe_of(name: str, files: dict[str, str], options: argparse.Namespace, **sections: Any) -> Recipe:
    data = {"train": files["train"], "test": files["test"], "text": "en", "label": "de", "max_length": 48}
    if options.unlabelled and name != "teacher":
        data |= {"unlabelled": [files["unlabelled"]]}
    common = {"name": name, "task": "seq2seq", "output": str(options.output / name), "data": data}
    return Recipe.parse({**common, **sections})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/multi30k"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/translation"))
    parser.add_argument("--rows", type=int, default=29000)
    parser.add_argument("--unlabelled", type=int, default=0, help="rows behind those, of which only English is given")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--start", type=Path, help="what the teacher goes on from: the teacher of an earlier run")
    parser.add_argument("--teacher-epochs", type=float, default=0, help="as many as the students' where 0")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=6000)
    parser.add_argument("--targets", nargs="+", default=["gold"], help="what students learn from: gold, teacher")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    files = prepare(options)
    steps = {"epochs": options.epochs, "learning_rate": 2e-3, "batch_size": options.batch_size}
    first = steps | {"epochs": options.teacher_epochs or options.epochs}
    with Display(Console(stderr=True)) as display:
        teacher = recipe_of("teacher", files, options, teacher={"start": files["start"], "finetune": first})
        checkpoint = str(finetune(teacher, progress=display).folder / "teacher")
    rows: dict[str, Any] = {}
    for targets in options.targets:
        recipe = recipe_of(
            f"student-{targets}",
            files,
            options,
            teacher={"checkpoint": checkpoint},
            student={"layers": 2, "decoder_layers": 1},
            training={**steps, "baseline": options.baseline and targets == options.targets[0]},
            **({"objective": {"targets": targets}} if targets != "gold" else {}),
            export={"target": machine_target(), "max_drop": 2},
            bench={"lengths": [16], "runs": 50},
        )
        with Display(Console(stderr=True)) as display:
            result = compress(recipe, progress=display)
        models = json.loads((result.folder / "results.json").read_text(encoding="utf-8"))["models"]
        rows[targets] = {row["role"]: {**row["metrics"], "bytes": row["bytes"]} for row in models}
    asked = ("rows", "unlabelled", "epochs", "teacher_epochs", "batch_size", "width", "vocabulary")
    sizes = {name: getattr(options, name) for name in asked}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(
        options.output / "summary.json", {"created": created, "machine": describe_machine(), **sizes, "models": rows}
    )
    for targets, roles in rows.items():
        for role, facts in roles.items():
            print(f"{targets:8} {role:14} BLEU {facts['bleu']:.2f} chrF {facts['chrf']:.2f} {facts['perplexity']:.2f}")


if __name__ == "__main__":
    main()
