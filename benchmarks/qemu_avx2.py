"""Does the `x86-avx2` file answer alike on a processor without VNNI? 500 real sentences on an emulated Haswell.

    apt-get install qemu-user-static
    python benchmarks/qemu_avx2.py RUN/work/onnx/student.onnx RUN/bundle/tokenizer.json sentences.csv

RUN is a run with `export.target = "x86-avx2"`, whose graph has the passes that such files ship with.
Without VNNI, two products of uint8 and int8 are added in 16 bits, which overflows unless weights keep to 7 bits. The
file for `x86-vnni` is asked too: how far it goes astray is what the other one is for.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

EMULATOR = ("qemu-x86_64-static", "-cpu", "Haswell")
TARGETS = ("x86-avx2", "x86-vnni")


def main() -> None:
    if sys.argv[1] == "--worker":
        work(*map(Path, sys.argv[2:]))
        return
    arguments = parse()
    from distill.export.quantize import quantize_dynamic_int8

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.json"
        ids.write_text(json.dumps(encode(arguments.tokenizer, arguments.sentences, arguments.count)))
        exact = answers((), arguments.model, ids)
        for target in TARGETS:
            file = quantize_dynamic_int8(arguments.model, Path(folder) / f"{target}.onnx", target=target).path
            native, emulated = answers((), file, ids), answers(EMULATOR, file, ids)
            found[target] = {
                "agreement with the native run": agreement(native, emulated),
                "native agreement with fp32": agreement(exact, native),
                "emulated agreement with fp32": agreement(exact, emulated),
                "largest difference of a logit": float(np.abs(native - emulated).max()),
                "sentences": len(native),
            }
            print(target, json.dumps(found[target], indent=1))
    if arguments.out:
        from distill.files import write_json
        from distill.machine import describe_machine

        now = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"created": now, "machine": describe_machine(), "emulator": " ".join(EMULATOR)}
        write_json(arguments.out, facts | {"targets": found})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported fp32 graph")
    parser.add_argument("tokenizer", type=Path, help="its tokenizer.json")
    parser.add_argument("sentences", type=Path, help="a CSV with a column `text`")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    return parser.parse_args()


def encode(tokenizer: Path, sentences: Path, count: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(tokenizer))
    words.no_padding()
    with sentences.open(encoding="utf-8", newline="") as file:
        return [words.encode(row["text"]).ids[:128] for row, _ in zip(csv.DictReader(file), range(count), strict=False)]


def answers(prefix: tuple[str, ...], model: Path, ids: Path) -> np.ndarray:
    """Logits (N, labels), one sentence a call, from a process that runs under `prefix`."""
    out = ids.with_name("logits.npy")
    command = [*prefix, sys.executable, __file__, "--worker", model, ids, out]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)  # the emulator names every feature it has not
    if done.returncode:
        raise SystemExit(done.stderr)
    return np.load(out)


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    return float((one.argmax(-1) == other.argmax(-1)).mean())


def work(model: Path, ids: Path, out: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_inputs()]
    rows = []
    for sentence in json.loads(ids.read_text()):
        tokens = np.array([sentence], np.int64)
        zeros = np.zeros_like(tokens)
        feeds = {"input_ids": tokens, "attention_mask": zeros + 1, "token_type_ids": zeros}
        rows.append(session.run(["logits"], {name: feeds[name] for name in wanted})[0][0])
    np.save(out, np.stack(rows))


if __name__ == "__main__":
    main()
