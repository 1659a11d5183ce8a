"""Two processes of one thread each beside one process of one thread: the same rows a step, whole runs in turns.

    python benchmarks/processes.py RECIPE.toml --rounds 3 --rows 32

Each round labels and trains once with two processes of `rows / 2` rows each, once with one of `rows`, and once with two
runs of one process at the same time that know nothing of each other: what two processes could reach here at most. Their
order turns from round to round. Speeds are what a run says of its own training, labelling and measuring left out. The
losses are the same only of a teacher and a student without dropout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distill.files import write_json
from distill.machine import describe_machine

WAYS = ("one", "two", "apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32, help="rows a step, of all processes together")
    parser.add_argument("--set", action="append", default=[], help="as in the distill command")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/processes"))
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        ways = WAYS[number % 3 :] + WAYS[: number % 3]
        done = {way: measure(options, f"{number + 1}-{way}", way) for way in ways}
        rounds.append(done)
        print(
            f"round {number + 1}: " + ", ".join(f"{way} {done[way]['samples']:.1f} samples/s" for way in WAYS),
            flush=True,
        )
    ratio, most = (statistics.median(one[way]["samples"] / one["one"]["samples"] for one in rounds) for way in WAYS[1:])
    apart = max(map(losses_apart, rounds))
    print(
        f"two processes: {ratio:.2f} times one, two runs at once {most:.2f} times (medians of {len(rounds)}); ", end=""
    )
    print(f"losses at most {apart:.1e} apart")
    facts = {"ratio": ratio, "ratio_of_two_runs": most, "losses_apart": apart, "rounds": rounds}
    write_json(options.output / "processes.json", {"machine": describe_machine(), "rows": options.rows, **facts})


def measure(options: argparse.Namespace, name: str, way: str) -> dict[str, Any]:
    """Samples a second of all processes together, and the losses."""
    if way != "apart":
        return run(options, name, 2 if way == "two" else 1)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda side: run(options, f"{name}-{side}", 1), ("left", "right")))
    return {**found[0], "samples": sum(one["samples"] for one in found)}


def run(options: argparse.Namespace, name: str, count: int) -> dict[str, Any]:
    """The same of one run."""
    folder = options.output / name
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


def losses_apart(one: dict[str, Any]) -> float:
    """How far apart the loss curves of one process and of two are."""
    return max(abs(a - b) for a, b in zip(one["one"]["losses"], one["two"]["losses"], strict=True))


if __name__ == "__main__":
    main()
