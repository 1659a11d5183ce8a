"""How long the command line and the runtime take to start: medians of fresh processes.

python benchmarks/startup.py BUNDLE [--python PATH/TO/BASE/INSTALL/bin/python]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

LOAD = (
    "import time; start = time.perf_counter();"
    "from distill.export.runtime import Bundle; Bundle.load({bundle!r})('a fine film');"
    "print(time.perf_counter() - start)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    command = [options.python, "-m", "distill.cli"]
    found = {
        "distill --help": [timed([*command, "--help"]) for _ in range(options.runs)],
        "distill predict": [timed([*command, "predict", options.bundle, "a fine film"]) for _ in range(options.runs)],
        "Bundle.load and first answer, after interpreter start": [
            float(output([options.python, "-c", LOAD.format(bundle=options.bundle)])) for _ in range(options.runs)
        ],
    }
    print(json.dumps({name: round(statistics.median(times), 3) for name, times in found.items()}, indent=1))


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    output(command)
    return time.perf_counter() - start


def output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
