"""What each objective is worth: every preset on three data sets, three seeds, students of four layers and half the FFN.

    python benchmarks/quality.py --data ../shared/data

A teacher of six layers (all-MiniLM-L6-v2 with a head) is fine-tuned once on each set. Its students have four of its
layers and half of their feed-forward neurons, fitted to it as every student is, and 4,000 rows, three epochs and one
learning rate for every objective, `none` included. A tenth of each training file chooses the epoch; the test file is
only reported on. A run that is killed goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distill import Recipe
from distill.cards import load_student_card
from distill.demo import packaged_model
from distill.display import Display
from distill.evaluation import TorchPredictor, evaluate
from distill.files import read_json, write_json
from distill.learning import label, train
from distill.ledger import claim
from distill.machine import describe_machine
from distill.objectives.presets import PRESETS
from distill.pipeline import finetune
from distill.run import Run
from distill.student.build import Student, build_student
from distill.teacher import load_checkpoint

Row = tuple[str, str]
ROWS = 4000
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{preset: (preset, {}) for preset in PRESETS},
    "none, from the pretrained model": ("none", {"init": "copy"}),
    "none, copied from the teacher": ("none", {"init": "copy"}),
    "logits, pieces in use": ("logits", {"vocabulary": "used"}),
    "logits, 8,000 pieces": ("logits", {"vocabulary": 8000}),
    "labels+logits, 8,000 pieces": ("labels+logits", {"vocabulary": 8000}),
}
"""Row of the table: the objective's preset, and what is special about the student. The first of the `copy` rows is what
there is without any teacher: layers of the pretrained model, a new head, labels."""

FINETUNE: dict[str, dict[str, float]] = {
    "sst2": {"epochs": 3},
    "banking77": {"epochs": 6, "learning_rate": 2e-4},  # 5e-5 leaves 77 classes half learnt
    "snips": {"epochs": 2},
}
"""How each set's teacher is made."""


def read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def read_intents(path: Path) -> list[Row]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(" ".join(line["tokens"]), line["intent"]) for line in lines]


def load(data: Path, name: str) -> tuple[list[Row], list[Row]]:
    """Training and test rows."""
    if name == "snips":
        return read_intents(data / "snips/train.jsonl"), read_intents(data / "snips/test.jsonl")
    return read_csv(data / name / "train.csv"), read_csv(data / name / ("dev.csv" if name == "sst2" else "test.csv"))


def prepare(data: Path, folder: Path, name: str, most: int) -> dict[str, str]:
    """Writes train, validation, students' training rows and test rows; by a hash of the text, so always the same."""
    rows, test = load(data, name)
    rows = sorted(set(rows), key=lambda row: hashlib.sha256(row[0].encode()).digest())
    held = len(rows) // 10
    parts = {"validation": rows[:held], "train": rows[held:], "transfer": rows[held:][: most or None], "test": test}
    return {part: str(write_csv(folder / f"{part}.csv", some)) for part, some in parts.items()}


def write_csv(path: Path, rows: Iterable[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def teach(name: str, files: dict[str, str], folder: Path) -> Path:
    """The fine-tuned teacher of a set; one that is there stays."""
    if (folder / "teacher/teacher/model.safetensors").exists():
        return folder / "teacher/teacher"
    recipe = Recipe.parse(
        {
            "name": f"{name}-teacher",
            "output": str(folder / "teacher"),
            "teacher": {"start": str(packaged_model()), "finetune": FINETUNE[name]},
            "data": {key: files[key] for key in ("train", "validation", "test")} | {"max_length": 64},
        }
    )
    with Display(Console(stderr=True)) as display:
        return finetune(recipe, progress=display).folder / "teacher"


def distil(
    name: str, variant: str, seed: int, files: dict[str, str], teacher: Path, folder: Path, starts: dict[str, Student]
) -> dict[str, Any]:
    """Trains one student and measures it before and after, on validation and on test data.

    Where a student starts does not depend on the objective, and here not on the seed: `starts` keeps it by set.
    """
    preset, special = VARIANTS[variant]
    plain = variant.replace(",", "").replace(" ", "-")
    kept = read_json(folder / f"{plain}-{seed}.json")
    if kept:
        return kept
    recipe = Recipe.parse(
        {
            "name": f"{name}-{plain}-{seed}",
            "output": str(folder / "runs" / f"{plain}-{seed}"),
            "seed": seed,
            "teacher": {"checkpoint": str(teacher)},
            "student": {"card": "layers-4", "intermediate_size": 768, **special},
            "objective": {"preset": preset},
            "data": {"train": files["transfer"], "validation": files["validation"], "test": files["test"]}
            | {"max_length": 64},
            "training": {"epochs": 3, "freeze_embeddings": True, "checkpoint_seconds": 1e6},
        }
    )
    with claim(recipe, replace=True) as ledger, Display(Console(stderr=True)) as display:
        run = Run(recipe, ledger, display)
        run.work.mkdir(parents=True, exist_ok=True)
        shared = folder / "caches" / preset
        shared.mkdir(parents=True, exist_ok=True)
        if not (run.work / "cache").exists():
            (run.work / "cache").symlink_to(shared.resolve())
        start = f"{name} {special} {'pretrained' in variant}"
        if "pretrained" in variant:
            starts.setdefault(start, from_pretrained(run))
        if start in starts:
            run.student = starts[start]
        starts[start] = run.student
        label(run)
        facts = train(run)
        student = load_checkpoint(str(run.folder / "student"), run.task)
        measured = {}
        for split, rows in (("validation", run.splits.validation), ("test", run.splits.test)):
            encoded = run.encode(student, rows)
            predictor = TorchPredictor(student.model, run.task)
            measured[split] = evaluate(predictor, encoded, run.task, student.padding).metrics
            if variant == next(iter(VARIANTS)) and seed == 0:
                measured[f"teacher_{split}"] = evaluate(
                    TorchPredictor(run.teacher.model, run.task),
                    run.encode(run.teacher, rows),
                    run.task,
                    student.padding,
                ).metrics
    result = {"set": name, "row": variant, "seed": seed, "before": facts["before"], **measured}
    write_json(folder / f"{plain}-{seed}.json", result)
    return result


def from_pretrained(run: Run) -> Student:
    """The same shape, cut from the pretrained model by the strength of its neurons, with a new head."""
    model = load_checkpoint(str(packaged_model()), run.task, labels=run.teacher.labels).model
    wanted = run.recipe.student
    shape = {"intermediate_size": wanted.intermediate_size}
    return build_student(model, load_student_card(wanted.card), overrides=shape, seed=run.recipe.seed)


def table(results: list[dict[str, Any]], split: str) -> str:
    """Mean and standard deviation of the accuracy over the seeds, in points, as Markdown."""
    sets = list(dict.fromkeys(result["set"] for result in results))
    lines = [f"| objective | {' | '.join(sets)} |", f"|{'---|' * (len(sets) + 1)}"]
    for row in dict.fromkeys(result["row"] for result in results):
        cells = []
        for name in sets:
            mine = [r for r in results if r["set"] == name and r["row"] == row]
            values = [100 * r[split]["accuracy"] for r in mine]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/quality"))
    parser.add_argument("--sets", nargs="+", default=list(FINETUNE), choices=list(FINETUNE))
    parser.add_argument("--rows", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students-rows", type=int, default=ROWS, help="that students learn from; 0 takes all")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[dict[str, Any]] = []
    starts: dict[str, Student] = {}
    for seed in options.seeds:
        for name in options.sets:
            folder = options.output / name
            files = prepare(options.data, folder, name, options.students_rows)
            teacher = teach(name, files, folder)
            results += [distil(name, variant, seed, files, teacher, folder, starts) for variant in options.rows]
            print(table(results, "test"), flush=True)
    summary = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "rows": options.students_rows,
        "results": results,
    }
    write_json(options.output / "summary.json", summary)
    print(f"\nValidation:\n\n{table(results, 'validation')}\n\nTest:\n\n{table(results, 'test')}")


if __name__ == "__main__":
    main()
