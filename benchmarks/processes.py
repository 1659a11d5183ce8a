"""Two processes of one thread each beside one process of one thread: the same rows a step, whole runs in turns.

    python benchmarks/processes.py RECIPE.toml --pairs 3 --rows 32

Each pair labels and trains once with two processes of `rows / 2` rows each and once with one of `rows`; which of them
begins changes from pair to pair. Speeds are what a run says of its own training, labelling and measuring left out. The
losses are the same only of a teacher and a student without dropout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from distill.files import write_json
from distill.machine import describe_machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="rows a step, of all processes together")
    parser.add_argument("--set", action="append", default=[], help="as in the distill command")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/processes"))
    options = parser.parse_args()
    pairs = []
    for number in range(options.pairs):
        order = (1, 2) if number % 2 == 0 else (2, 1)
        pair = {count: run(options, number, count) for count in order}
        pairs.append({"one": pair[1], "two": pair[2], "ratio": pair[2]["samples"] / pair[1]["samples"]})
        print(f"pair {number + 1}: {pair[1]['samples']:.1f} and {pair[2]['samples']:.1f} samples/s", flush=True)
    ratio = statistics.median(pair["ratio"] for pair in pairs)
    apart = max(pair["losses_apart"] for pair in map(compared, pairs))
    print(f"two processes: {ratio:.2f} times one (median of {len(pairs)}); losses at most {apart:.1e} apart")
    facts = {"machine": describe_machine(), "rows": options.rows, "ratio": ratio, "losses_apart": apart, "pairs": pairs}
    write_json(options.output / "processes.json", facts)


def run(options: argparse.Namespace, number: int, count: int) -> dict[str, object]:
    """Samples a second of all processes together, and the losses."""
    folder = options.output / f"{number + 1}-by-{count}"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    wanted = [f"training.batch_size={options.rows // count}", "training.baseline=false", *options.set]
    settings = [word for value in wanted for word in ("--set", value)]
    command = [sys.executable, *launcher, "-m", "distill.cli", "train", str(options.recipe), *settings]
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    done = subprocess.run([*command, "--output", str(folder)], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    facts = json.loads((folder / "work" / "state" / "train.json").read_text())["facts"]
    losses = [point["loss"] for point in facts["curve"] if "loss" in point]
    return {"samples": count * facts["speed"]["samples_per_second"], "seconds": facts["seconds"], "losses": losses}


def compared(pair: dict) -> dict[str, float]:
    """How far apart the loss curves are."""
    both = zip(pair["one"]["losses"], pair["two"]["losses"], strict=True)
    return {"losses_apart": max(abs(one - other) for one, other in both)}


if __name__ == "__main__":
    main()
