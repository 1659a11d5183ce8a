"""The same sentences through every client: how often each answers as Python on this machine does.

    python benchmarks/clients/agreement.py BUNDLE TEXTS.csv [--rows 500] [--node FOLDER] [--arm64 FOLDER] [--json FILE]

TEXTS.csv has the sentence in its first column. FOLDER of --node has a node_modules with tests/clients/package.json's
packages; FOLDER of --arm64 is what arm64.sh filled. A client that is not there is left out of the table.
"""

from __future__ import annotations

import argparse
import csv
import functools
import http.server
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.export.bundle import golden_vectors
from distill.export.demo_page import PACKAGES, write_demo_page
from distill.export.runtime import Bundle
from distill.machine import describe_machine

CLIENTS = Path(__file__).resolve().parents[2] / "tests" / "clients"
ASK = (
    "import json, sys; from distill.export.runtime import Bundle; bundle = Bundle.load(sys.argv[1]);"
    "texts = json.load(sys.stdin); ids = [row['input_ids'] for row in bundle.encode(texts)];"
    "print(json.dumps([ids, [bundle(text).to_json() for text in texts]]))"
)


ARM = {"neoverse-n1": "dot products", "max,sme=off": "i8mm and SVE"}
"""qemu's models to the kernels that ONNX Runtime then takes. Its SME kernels give wrong sums under qemu 7.2, of a lone
MatMulInteger as well: whether on real cores too cannot be told here, so `distill verify` is to be run on one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--node", type=Path)
    parser.add_argument("--arm64", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with options.texts.open(encoding="utf-8", newline="") as file:
        texts = [row[0] for row in list(csv.reader(file))[1 : options.rows + 1]]
    native = golden_vectors(Bundle.load(options.bundle), texts)
    rows = []
    if options.node:
        package = json.loads((CLIENTS / "package.json").read_text(encoding="utf-8"))["dependencies"]
        name = f"Node, transformers.js {package['@huggingface/transformers']}"
        rows.append({"client": name, **node(options.bundle, texts, native, options.node)})
    command = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if command:
        said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.split()
        name = f"{said[0]} {said[1]}, onnxruntime-web {PACKAGES['onnxruntime-web']}"
        rows.append({"client": name, **chromium(options.bundle, native, command)})
    if options.arm64:
        for cpu, kernels in ARM.items():
            found = arm64(options.bundle, texts, native, options.arm64, cpu)
            rows.append({"client": f"Python on arm64, {kernels} (qemu -cpu {cpu})", **found})
    result = {
        "native": f"Python {platform.python_version()}, onnxruntime {version('onnxruntime')}",
        "sentences": len(texts),
        "machine": describe_machine(),
        "clients": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{len(texts)} sentences; beside {result['native']} on this machine\n")
    print("| client | same tokens | same label | largest difference of a probability |\n|---|---:|---:|---:|")
    for row in rows:
        share = f"{row['labels'] / len(texts):.1%}"
        print(f"| {row['client']} | {row['tokens']} | {row['labels']} ({share}) | {row['worst']:.4f} |")


def compare(native: list[dict[str, Any]], ids: list[list[int]], probabilities: list[list[float]]) -> dict[str, Any]:
    best = [row.index(max(row)) for row in probabilities]
    worst = max(
        abs(one - other)
        for line, row in zip(native, probabilities, strict=True)
        for one, other in zip(line["probabilities"], row, strict=True)
    )
    return {
        "tokens": sum(line["ids"] == row for line, row in zip(native, ids, strict=True)),
        "labels": sum(
            line["probabilities"].index(max(line["probabilities"])) == label
            for line, label in zip(native, best, strict=True)
        ),
        "worst": worst,
    }


def node(bundle: Path, texts: list[str], native: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """transformers.js as tests/clients asks it."""

    def ask(task: str) -> list[Any]:
        lines = "".join(json.dumps(text) + "\n" for text in texts)
        command = ["node", str(CLIENTS / "node.mjs"), str(bundle), task]
        environment = {**os.environ, "CLIENTS": str(folder)}
        done = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    labels = Bundle.load(bundle).labels
    return compare(native, ask("encode"), [[found["all"][label] for label in labels] for found in ask("predict")])


def arm64(bundle: Path, texts: list[str], native: list[dict[str, Any]], folder: Path, cpu: str) -> dict[str, Any]:
    """The same runtime, in a Python for arm64."""
    python = folder / "root" / "usr" / "bin" / "python3.11"
    source = Path(__file__).resolve().parents[2]
    environment = {
        **os.environ,
        "PYTHONHOME": str(folder / "root" / "usr"),
        "PYTHONPATH": f"{folder / 'site'}:{source}",
    }
    command = ["qemu-aarch64-static", "-cpu", cpu, "-L", str(folder / "root"), str(python), "-c", ASK, str(bundle)]
    done = subprocess.run(command, input=json.dumps(texts), env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    ids, found = json.loads(done.stdout)
    return compare(native, ids, [list(said["probabilities"].values()) for said in found])


def chromium(bundle: Path, native: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """The demo page with these sentences as its golden texts: it compares for itself."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with tempfile.TemporaryDirectory() as place:
        page = write_demo_page(bundle, Path(place) / "page").parent
        lines = (json.dumps(line, ensure_ascii=False) for line in native)
        (page / "bundle" / "golden.jsonl").write_text("\n".join(lines), encoding="utf-8")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(page)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = runpy.run_path(str(CLIENTS / "conftest.py"))["Browser"](command, Path(place) / "profile")
        try:
            browser.begin()
            browser.open(f"http://127.0.0.1:{server.server_port}/index.html")
            browser.wait("document.getElementById('about').textContent.includes('ready in')")
            browser.click("#check")
            told = "document.getElementById('checked').textContent"
            said = browser.wait(f"/^(Yes|No|It failed)/.test({told}) && {told}")
        finally:
            browser.close()
            server.shutdown()
            server.server_close()
    found = re.search(r"texts (\d+) have the same tokens and (\d+) the same label; .* most ([\d.]+)\.$", said)
    if found is None:
        sys.exit(said)
    return {"tokens": int(found[1]), "labels": int(found[2]), "worst": float(found[3])}


if __name__ == "__main__":
    main()
