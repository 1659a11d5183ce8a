"""`make bench`: every benchmark, one after the other, results in runs/benchmarks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUNDLE = Path("runs/demo/run/bundle")


def main() -> None:
    if not BUNDLE.is_dir():
        run("-m", "distill.cli", "demo")
    run(str(HERE / "startup.py"), str(BUNDLE))
    run(str(HERE / "latency.py"))
    run(str(HERE / "sst2.py"))


def run(*words: str) -> None:
    print("$", "python", *words, flush=True)
    subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    main()
