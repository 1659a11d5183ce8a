"""The same strings through every tokenizer: how many get other ids than from Hugging Face's tokenizers.

    python benchmarks/clients/tokens.py BUNDLE TEXTS ... [--count 100000] [--node FOLDER] [--json FILE]

Half of the strings are sentences from TEXTS (first column of CSV, all texts of JSONL, lines of anything else); the rest
are made of every script, signs, accents, control characters and pieces of the vocabulary (distill/export/strings.py).
FOLDER of --node has a node_modules with the packages of tests/clients/package.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import json
import os
import random
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from distill.errors import ExportError
from distill.export.runtime import Bundle
from distill.export.strings import odd_strings
from distill.export.text import build_token_model, other_ids
from distill.machine import describe_machine

CLIENTS = Path(__file__).resolve().parents[2] / "tests" / "clients"
BATCH = 1000
REASONS: dict[str, Callable[[str, int, int], bool]] = {
    "longer than the maximum": lambda text, length, most: length == most,
    "U+20000 and up": lambda text, length, most: any(letter >= "\U00020000" for letter in text),
    "capital sigma": lambda text, length, most: "Σ" in text,
    "U+0C3C or U+0EBA": lambda text, length, most: bool({"\u0c3c", "\u0eba"} & set(text)),
    "U+10000 to U+1FFFF": lambda text, length, most: any(letter >= "\U00010000" for letter in text),
}
"""What a text has that is split otherwise; the first that fits is counted. Not proof that it is the cause."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--node", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    real = sentences(options.texts, options.count // 2)
    texts = [*real, *odd_strings(options.count - len(real), sorted(bundle.tokenizer.get_vocab()))]
    wanted = reference(options.bundle, texts, bundle.max_length)
    found = [row["input_ids"] for begin in range(0, len(texts), BATCH) for row in bundle.encode(texts[begin:][:BATCH])]
    rows = [count("distill's runtime", texts, wanted, found, bundle.max_length, len(real))]
    if options.node:
        package = json.loads((CLIENTS / "package.json").read_text(encoding="utf-8"))["dependencies"]
        name = f"transformers.js {package['@huggingface/transformers']} on Node"
        rows.append(count(name, texts, wanted, node(options.bundle, texts, options.node), bundle.max_length, len(real)))
    with contextlib.suppress(ExportError):
        other = set(other_ids(bundle, build_token_model(bundle), texts))
        inside = [None if text in other else ids for text, ids in zip(texts, found, strict=True)]
        name = f"in the graph, onnxruntime-extensions {version('onnxruntime-extensions')}"
        rows.append(count(name, texts, wanted, inside, bundle.max_length, len(real)))
    result = {
        "reference": f"tokenizers {version('tokenizers')} through transformers {version('transformers')}",
        "strings": len(texts),
        "sentences": len(real),
        "pieces": len({identity for row in wanted for identity in row}),
        "machine": describe_machine(),
        "clients": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(texts)} strings, {len(real)} of them sentences; beside {result['reference']}\n")
    print("| tokenizer | other ids, sentences | other ids, made strings | what these texts have |\n|---|---:|---:|---|")
    for row in rows:
        has = ", ".join(f"{reason} {number}" for reason, number in row["reasons"].items())
        print(f"| {row['client']} | {row['sentences']} | {row['made']} | {has} |")


def sentences(paths: list[Path], most: int) -> list[str]:
    """Different ones of all files, in an order that is the same each time."""
    found: list[str] = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                found += [row[0] for row in list(csv.reader(file))[1:]]
            elif path.suffix == ".jsonl":
                found += [text for line in file for text in json.loads(line).values() if isinstance(text, str)]
            else:
                found += [line.strip() for line in file if line.strip()]
    found = sorted(set(found))
    random.Random(0).shuffle(found)
    return found[:most]


def reference(bundle: Path, texts: list[str], max_length: int) -> list[list[int]]:
    """As people tokenize with transformers, cut at the bundle's length."""
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    rows: list[list[int]] = []
    for begin in range(0, len(texts), BATCH):
        some = texts[begin : begin + BATCH]
        rows += tokenizer(some, truncation=True, max_length=max_length)["input_ids"]
    return rows


def node(bundle: Path, texts: list[str], folder: Path) -> list[list[int]]:
    """transformers.js as tests/clients asks it."""
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    command = ["node", str(CLIENTS / "node.mjs"), str(bundle), "encode"]
    environment = {**os.environ, "CLIENTS": str(folder)}
    done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def count(client: str, texts: list[str], wanted: list[Any], found: list[Any], most: int, real: int) -> dict[str, Any]:
    """How many differ, among sentences and made strings, why as far as it shows, and examples of what is left."""
    other = [place for place, (one, two) in enumerate(zip(wanted, found, strict=True)) if one != two]
    reasons: collections.Counter[str] = collections.Counter()
    examples = []
    for place in other:
        text = texts[place]
        why = next((name for name, fits in REASONS.items() if fits(text, len(wanted[place]), most)), "unexplained")
        reasons[why] += 1
        if why == "unexplained" and len(examples) < 8:
            examples.append(text[:200])
    in_sentences = sum(place < real for place in other)
    return {
        "client": client,
        "sentences": in_sentences,
        "made": len(other) - in_sentences,
        "reasons": dict(reasons.most_common()),
        "examples": examples,
    }


if __name__ == "__main__":
    main()
