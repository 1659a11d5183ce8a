"""`make bench`: the benchmarks one after the other; their tables in runs/benchmarks/DATE.md, their numbers beside it.

    python benchmarks/run_all.py
    python benchmarks/run_all.py --only latency latency-4-layers

Peers that cannot live beside transformers 5 get environments of their own, made here once: `.venv-openvino` and
`.venv-optimum`. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from distill.machine import describe_machine

HERE = Path(__file__).parent
ROOT = Path("runs/benchmarks")
BUNDLE = Path("runs/demo/run/bundle")
TEACHER = ROOT / "sst2/seed-0/teacher"
SST2 = Path("../shared/data/sst2")

TORCH = os.environ.get("TORCH", f"torch=={version('torch')}")
"""As in the Makefile: named first, so that pip does not fetch another build."""

PEERS = {"openvino": [["openvino", "nncf"]], "optimum": [[TORCH], ["optimum-onnx[onnxruntime]"]]}
"""What each environment gets, step by step."""


def commands() -> dict[str, list[str]]:
    """By name: what is run, in this order. `OUT` is that one's JSON file."""
    peers = [word for name in PEERS for word in (f"--{name}", str(python_of(name)))]
    latency = ["latency.py", *peers, "--out", "OUT"]
    return {
        "demo": ["-m", "distill.cli", "demo"],
        "startup": ["startup.py", str(BUNDLE)],
        "latency": [*latency, "--two-threads", "--compile"],
        "latency-4-layers": [*latency, "--layers", "4"],
        "latency-relu": [*latency, "--relu"],
        "latency-batch-32": [*latency, "--batch", "32", "--rounds", "5"],
        "families": ["families.py"],
        "sst2": ["sst2.py", "--data", str(SST2)],
        "training": ["training.py", "--teacher", str(TEACHER), "--data", str(SST2)],
        "tasks": ["tasks.py"],
        "language": ["language.py"],
        "translation": ["translation.py"],
    }


def python_of(peer: str) -> Path:
    """The Python of a peer's environment."""
    return Path(f".venv-{peer}") / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make_environments() -> None:
    """Those that are not there yet, or were not finished."""
    for name, steps in PEERS.items():
        folder, python = Path(f".venv-{name}"), python_of(name)
        if (folder / "complete").exists():
            continue
        print(f"making {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in steps:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "complete").touch()


def main() -> None:
    names = list(commands())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    wanted = parser.parse_args().only
    if any(name.startswith("latency") for name in wanted):
        make_environments()
    ROOT.mkdir(parents=True, exist_ok=True)
    day = datetime.now(UTC).date().isoformat()
    page = ROOT / f"{day}.md"
    if not page.exists():
        page.write_text(f"# {day}\n\n```json\n{json.dumps(describe_machine(), indent=1)}\n```\n", encoding="utf-8")
    failed = [name for name in wanted if not measure(name, page, ROOT / f"{day}-{name}.json")]
    print(f"tables: {page}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; what they said stands above")


def measure(name: str, page: Path, out: Path) -> bool:
    """Runs one and adds what it printed to the page; whether it ended well. The others go on."""
    words = commands()[name]
    script = [str(HERE / words[0]), *words[1:]] if words[0].endswith(".py") else words
    command = [str(out) if word == "OUT" else word for word in script]
    print("$ python", *command, flush=True)
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        printed = list(echo(process.stdout or ()))
    with page.open("a", encoding="utf-8") as file:
        file.write(f"\n## {name}\n\n`python {' '.join(command)}`, exit code {process.returncode}\n\n")
        file.write(f"```\n{''.join(printed)}```\n")
    return process.returncode == 0


def echo(lines: Iterable[str]) -> Iterable[str]:
    """Each line, shown as it comes."""
    for line in lines:
        print(line, end="", flush=True)
        yield line


if __name__ == "__main__":
    main()
