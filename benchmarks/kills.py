"""A run that is killed at random moments ends with the weights of the undisturbed run, bit for bit.

    python benchmarks/kills.py RECIPE.toml --kills 25

Each kill is a SIGKILL after a random share of the time that the undisturbed run took. A run that ends before its kill
is compared, and a new one begun, until all kills are spent; checkpoints are asked for every `--checkpoint-seconds`.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from distill.files import sha256_file, write_json
from distill.machine import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-seconds", type=float, default=0.5)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/kills"))
    parser.add_argument("--out", type=Path, help="the JSON file; OUTPUT/summary.json")
    options = parser.parse_args()
    start = time.monotonic()
    finish(options, "undisturbed")
    took = time.monotonic() - start
    moments = random.Random(options.seed)
    wanted, killed, runs = weights(options.output / "undisturbed"), 0, 0
    while killed < options.kills:
        runs += 1
        name = f"disturbed-{runs}"
        while killed < options.kills:
            process = subprocess.Popen(command(options, name), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            try:
                code = process.wait(timeout=moments.uniform(0.1, 0.9) * took)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                continue
            if code:
                sys.exit(f"it failed with {code} after {killed} kills")
            break
        finish(options, name)
        if weights(options.output / name) != wanted:
            sys.exit(f"after {killed} kills {name} has other weights")
    facts = {"kills": killed, "runs": runs, "seconds_undisturbed": round(took, 1), "weights_bit_equal": True}
    print(json.dumps(facts, indent=1))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    settings = {"recipe": options.recipe.name, "seed": options.seed, "checkpoint_seconds": options.checkpoint_seconds}
    summary = {"created": created, "machine": describe_machine(), "settings": settings, **facts}
    write_json(options.out or options.output / "summary.json", summary)


def command(options: argparse.Namespace, name: str) -> list[str]:
    wanted = f"training.checkpoint_seconds={options.checkpoint_seconds}"
    run = [sys.executable, "-m", "distill.cli", "train", str(options.recipe), "--set", wanted]
    return [*run, "--output", str(options.output / name)]


def finish(options: argparse.Namespace, name: str) -> None:
    subprocess.run(command(options, name), check=True)


def weights(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.glob("*/model.safetensors"))}


if __name__ == "__main__":
    main()
