"""The stages that ship: export, bundle, bench, report. What they report is measured on the files they made."""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from distill import processes
from distill.bench import bench as measure_latency
from distill.candidates import Choice, fastest, machine_target
from distill.errors import DataError
from distill.evaluation import Evaluation, TorchPredictor, agreement, disagreements, evaluate
from distill.export.affine_norms import fold_affine_norms
from distill.export.blockwise import quantize_blocks_within
from distill.export.bundle import Contents, write_bundle
from distill.export.encoder_decoder import cut
from distill.export.graph import export_graph
from distill.export.ladder import LadderResult, Learn, quantize_within
from distill.export.parity import SHAPES, batches_of, check_parity
from distill.export.passes import DEFAULT, FUSED, Pass, passes_for
from distill.export.pieces import bytes_of, pieces
from distill.export.precision import store_floats_within
from distill.export.quantize import LARGEST, Target
from distill.export.runtime import QUANTIZED, Bundle, OnnxModel, open_graph
from distill.export.verify import Verification, verify_bundle
from distill.fields import INPUTS, TARGETS
from distill.files import write_json
from distill.learning import train_for_int8
from distill.machine import describe_machine
from distill.recipe import Recipe
from distill.report import write_report
from distill.rows import Columns, name_labels, usable_rows
from distill.run import Run, encode_rows, texts_of
from distill.tables import read_table
from distill.tasks import TASKS, Batch, Encoded, Padding, Task
from distill.tasks.base import Predictor
from distill.teacher import Checkpoint, load_checkpoint, load_config, load_reader, padding_of

LIBRARIES = ("distill", "torch", "transformers", "onnx", "onnxruntime", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run makes."""
    return {name: version(name) for name in LIBRARIES}


def export(run: Run) -> dict[str, Any]:
    """Exports student and teacher to ONNX, quantises the student, and proves every step against the one before.

    Raises:
        ExportError: Every int8 form loses more than `export.max_drop` points of the metric on the validation data.
    """
    folder = run.work / "onnx"
    files = {name: folder / f"{name}.onnx" for name in ("teacher", "student", "student-int8")}

    def work() -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        student = load_checkpoint(str(run.folder / "student"), run.task)
        passes = passes_for(_target(run))
        steps = [
            _export(run, run.teacher, files["teacher"], "export of the teacher", passes),
            _export(run, student, files["student"], "export of the student", passes),
        ]
        choice = _quantize(run, student, files["student"], files["student-int8"])
        steps.append(_quantized(run, student, choice.result, files["student"], files["student-int8"]))
        if run.task.cut:
            for name, path in files.items():
                cut(path, *pieces(_shipped(run, name)))
        return {
            "verification": steps,
            "tried": choice.table(),
            "bytes": {name: bytes_of(_shipped(run, name)) for name in files},
        }

    inputs = {"train": run.train_inputs(run.objective()[0]), "export": run.recipe.export.model_dump(mode="json")}
    return run.ledger.once("export", inputs, work, makes=list(files.values()))


def _shipped(run: Run, name: str) -> Path:
    """Where the graph is as it ships: as it was traced and quantised, or what it was cut into."""
    folder = run.work / "onnx"
    return (folder / "cut" if run.task.cut else folder) / f"{name}.onnx"


def _target(run: Run) -> Target:
    """What the file is shaped for; this machine where the recipe leaves it open."""
    return machine_target() if run.recipe.export.target == "auto" else run.recipe.export.target


def _settings(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """What was chosen for this model on validation data."""
    models = (run.ledger.facts("evaluate") or {})["models"]
    return dict(models["teacher" if checkpoint is run.teacher else "student"]["settings"])


def _metadata(run: Run, checkpoint: Checkpoint) -> dict[str, str]:
    settings, rules = _settings(run, checkpoint), run.task.rules(checkpoint.model)
    return {
        **({"distill.settings": json.dumps(settings)} if settings else {}),
        **({"distill.rules": json.dumps(rules)} if rules else {}),
        "distill.format": "1",
        "distill.task": run.task.name,
        "distill.labels": json.dumps(run.teacher.labels, ensure_ascii=False),
        "distill.max_length": str(run.longest),
        "distill.recipe": run.recipe.fingerprint(),
        "distill.versions": json.dumps(versions(), sort_keys=True),
        "distill.target": _target(run),
    }


def _export(run: Run, checkpoint: Checkpoint, path: Path, step: str, passes: tuple[Pass, ...]) -> dict[str, Any]:
    """PyTorch to ONNX, checked on real text at several lengths and batch sizes and on the whole validation set."""
    encoded = run.encode(checkpoint, run.splits.validation)
    with run.progress.stage(f"ONNX {step}"):
        shipped = fold_affine_norms(run.task.shipped(checkpoint.model))
        export_graph(
            shipped,
            run.task.exported(shipped, run.task.inputs_of(encoded)),
            path,
            metadata=_metadata(run, checkpoint),
            passes=passes,
        )
    reference = TorchPredictor(checkpoint.model, run.task)
    return _check(run, checkpoint, encoded, reference, OnnxModel(path), step, tolerance=1e-3)


def _quantize(run: Run, checkpoint: Checkpoint, source: Path, path: Path) -> Choice:
    """fp32 to int8 by the ladder: plain dynamic first, more care where it loses too much, refused past `max_drop`.

    With target `auto`, the form that is fastest here; `source` is then the fp32 graph that it was made from.
    """
    task, padding, export = run.task, checkpoint.padding, run.recipe.export
    encoded = run.encode(checkpoint, run.splits.validation)
    train = run.splits.train
    sample = run.encode(checkpoint, train.select(range(min(len(train), 4096))))

    chosen = _settings(run, checkpoint)

    def measure(file: Path) -> float:
        model = task.judge(OnnxModel(file), checkpoint.model)
        return evaluate(model, encoded, task, padding, settings=chosen).metrics[task.metric]

    limits: dict[str, Any] = {"measure": measure, "max_drop": export.max_drop, "relative": task.relative}
    if export.weights != "int8":
        with run.progress.stage(f"Storing weights in {export.weights}"):
            limits |= {"metadata": {**_metadata(run, checkpoint), "distill.weights": export.weights}}
            if export.weights in ("fp16", "fp32"):
                return Choice("", store_floats_within(source, path, half=export.weights == "fp16", **limits), ())
            return Choice("", quantize_blocks_within(source, path, bits=int(export.weights[-1]), **limits), ())
    settings: dict[str, Any] = {
        **limits,
        "batches": spread(task, sample, padding, rows=256),
        "target": _target(run),
        "metadata": _metadata(run, checkpoint),
        "learn": learner(run) if export.int8_steps and processes.alone() else None,
        "progress": run.progress,
    }
    if export.target != "auto":
        with run.progress.stage("Quantising to int8"):
            return Choice("", quantize_within(source, path, **settings), ())
    graphs = {"separate heads": source.with_name("separate.onnx"), "fused attention": source.with_name("fused.onnx")}
    for name, passes in (("separate heads", DEFAULT), ("fused attention", FUSED)):
        _export(run, checkpoint, graphs[name], f"export of the student, {name}", passes)
    choice = fastest(graphs, path, lengths=_lengths(run), **settings)
    os.replace(graphs.pop(choice.graph), source)
    for left in graphs.values():
        left.unlink()
    return choice


def learner(run: Run) -> Learn:
    """Trains the student on with int8's rounding and exports it, where the ladder asks for that."""
    target = _target(run)

    def learn(path: Path, exact: Sequence[str]) -> None:
        run.progress.say(f"no repair of the int8 file is good enough: {run.recipe.export.int8_steps} steps of training")
        trained = train_for_int8(run, largest=LARGEST[target], exact=exact)
        passes = DEFAULT if run.recipe.export.target == "auto" else passes_for(target)
        _export(run, trained, path, "export of the student trained in int8", passes)

    return learn


def _quantized(run: Run, checkpoint: Checkpoint, found: LadderResult, source: Path, path: Path) -> dict[str, Any]:
    """What quantising found out, and how the file answers beside the fp32 one."""
    encoded = run.encode(checkpoint, run.splits.validation)
    if len(found.rungs) > 1:
        first, last = found.rungs[0], found.rungs[-1]
        line = f"plain int8 loses {first.drop:.2f} points; taken instead: {last.form}, which loses {last.drop:.2f}"
        run.progress.say(line + (f" ({', '.join(last.kept[:3])})" if last.kept else ""))
    facts = _check(run, checkpoint, encoded, OnnxModel(source), OnnxModel(path), _step(run), tolerance=math.inf)
    components = [asdict(component) for component in found.graph.components]
    return {**facts, "components": components, "ladder": found.as_dict()}


def _step(run: Run) -> str:
    """What makes the file that ships."""
    weights = run.recipe.export.weights
    return "int8 quantisation" if weights == "int8" else f"storing of weights in {weights}"


def _lengths(run: Run) -> list[int]:
    """The recipe's lengths, as far as the model takes them."""
    longest = run.longest
    if not run.task.stretches:
        return [longest]
    return [length for length in run.recipe.bench.lengths if length <= longest] or [longest]


def _check(
    run: Run, checkpoint: Checkpoint, encoded: Encoded, one: Predictor, other: Predictor, step: str, *, tolerance: float
) -> dict[str, Any]:
    """Compares `other` with `one`, first at many shapes, then on the whole validation set."""
    task, padding = run.task, checkpoint.padding
    report = check_parity(one, other, sample_batches(task, encoded, padding), step=step, tolerance=tolerance)
    name = f"Checking the {step}"
    settings = _settings(run, checkpoint)
    one, other = (task.judge(each, checkpoint.model) for each in (one, other))
    after = evaluate(other, encoded, task, padding, settings=settings, progress=run.progress, name=name)
    before = evaluate(one, encoded, task, padding, settings=settings)
    return {
        **report.as_dict(),
        "metric": after.metrics[task.metric],
        "metric_before": before.metrics[task.metric],
        "agreement": agreement(before, after, task),
    }


def sample_batches(task: Task, encoded: Encoded, padding: Padding) -> list[Batch]:
    """Batches of real text: whole rows from the shortest to the longest, and cut ones of every shape in `SHAPES`."""
    order = np.argsort(encoded.lengths, kind="stable")
    picks = [order[:1], order[-1:], order[len(order) // 2 :][:3], order[:: max(1, len(order) // 8)][:8], order[-4:]]
    batches = [task.collate([encoded[int(row)] for row in rows], padding) for rows in picks]
    if not task.stretches:
        return batches
    shapes = [shape for shape in SHAPES if shape[1] <= encoded.lengths.max()]
    return batches + batches_of(batches[3], shapes=shapes, padding=padding.values.get("input_ids", 0))


def spread(task: Task, encoded: Encoded, padding: Padding, *, rows: int) -> list[Batch]:
    """Batches of up to 32 of `rows` rows that are spread evenly over the lengths."""
    order = np.argsort(encoded.lengths, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(rows, len(order))).astype(int))]
    parts = np.array_split(chosen, -(-len(chosen) // 32))
    return [task.collate([encoded[int(row)] for row in part], padding) for part in parts]


def bundle(run: Run) -> dict[str, Any]:
    """Assembles what ships, and verifies it as a stranger would."""
    folder = run.folder / "bundle"

    def work() -> dict[str, Any]:
        models = _models(run)
        with run.progress.stage("Writing the bundle"):
            write_bundle(
                folder,
                Contents(
                    name=run.recipe.name,
                    task=run.task.name,
                    labels=run.teacher.labels,
                    max_length=run.longest,
                    fp32_onnx=_shipped(run, "student"),
                    int8_onnx=_shipped(run, "student-int8"),
                    model_folder=run.folder / "student",
                    golden_texts=_golden(run),
                    metrics={role: _without_rows(facts) for role, facts in models.items()},
                    verification=(run.ledger.facts("export") or {})["verification"],
                    recipe_toml=run.recipe.to_toml(),
                    versions=versions(),
                    data_source=run.recipe.data.train,
                    ort=run.recipe.export.ort,
                    weights=run.recipe.export.weights,
                    beside=_beside(run.folder / "student"),
                ),
            )
            verdict = verify_bundle(folder)
        if not verdict.ok:
            raise verdict.error()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shipped = bytes_of(folder / QUANTIZED)
        line = f"bundle: {folder} is verified; the {run.recipe.export.weights} file has {shipped / 1e6:.1f} MB"
        run.progress.say(line)
        return {"models": models, "bytes": size, "int8_bytes": shipped, "verdict": verdict.to_json(), "summary": [line]}

    inputs = {"export": run.ledger.facts("export"), "evaluate": run.ledger.facts("evaluate")}
    return run.ledger.once("bundle", inputs, work, makes=[folder / "MANIFEST.json"])


def _beside(folder: Path) -> list[str]:
    """What a task wrote beside a model for other libraries: its steps, and a folder each."""
    named = [folder / name for name in ("modules.json", "sentence_bert_config.json")]
    return sorted(path.relative_to(folder).as_posix() for path in (*named, *folder.glob("*/*")) if path.is_file())


def _without_rows(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != "disagreements"}


def _golden(run: Run) -> list[Any]:
    """Texts of the validation data, evenly spread over the lengths."""
    rows = run.splits.validation
    encoded = run.encode(run.teacher, rows)
    order = encoded.sources[np.argsort(encoded.lengths, kind="stable")]
    wanted = min(run.recipe.export.golden, len(order))
    picks = sorted({int(row) for row in order[np.linspace(0, len(order) - 1, wanted).astype(int)]})
    return [run.task.golden(rows[row]) for row in picks]


def _models(run: Run) -> dict[str, Any]:
    """Measures on the test data of the PyTorch models, joined by the ONNX files'."""
    models = dict((run.ledger.facts("evaluate") or {})["models"])
    student = load_checkpoint(str(run.folder / "student"), run.task)
    metric, rows = run.task.metric, run.splits.test
    outputs = dict(np.load(run.work / "teacher_test.npz"))
    settings = models["teacher"]["settings"]
    teacher = Evaluation(models["teacher"]["metrics"], outputs, run.encode(run.teacher, rows), settings)
    for role, (file, checkpoint) in {
        "teacher-onnx": ("teacher", run.teacher),
        "student-onnx": ("student", student),
        "student-int8": ("student-int8", student),
    }.items():
        path = _shipped(run, file)
        encoded, name = run.encode(checkpoint, rows), f"Measuring {path.name}"
        settings, padding = models[role.split("-")[0]]["settings"], checkpoint.padding
        model = run.task.examine(open_graph(path), checkpoint.model)
        found = evaluate(model, encoded, run.task, padding, settings=settings, progress=run.progress, name=name)
        models[role] = {
            "metrics": found.metrics,
            "retention": found.metrics[metric] / teacher.metrics[metric] if teacher.metrics[metric] else None,
            "agreement": agreement(teacher, found, run.task),
            **run.groups(found),
            "bytes": bytes_of(path),
            "parameters": models[role.split("-")[0]]["parameters"],
        }
    models["student-int8"]["disagreements"] = disagreements(teacher, found, texts_of(rows, run.task), run.task)
    return models


def bench(run: Run) -> dict[str, Any]:
    """Measures teacher and student files side by side, interleaved, in one run."""
    settings = run.recipe.bench
    targets = [_shipped(run, "teacher"), _shipped(run, "student"), run.folder / "bundle" / QUANTIZED]

    def work() -> dict[str, Any]:
        report = measure_latency(
            targets,
            lengths=_lengths(run),
            batches=settings.batches,
            threads=settings.threads,
            runs=settings.runs,
            progress=run.progress,
        )
        columns, rows = report.table()
        run.progress.table("Latency", columns, rows)
        for note in report.notes():
            run.progress.say(note)
        return {"report": report.to_json()}

    inputs = {"bundle": run.ledger.facts("bundle"), "bench": settings.model_dump(mode="json")}
    return run.ledger.once("bench", inputs, work)


def report(run: Run) -> dict[str, Any]:
    """Writes results.json, report.md and report.html into the output folder."""

    def work() -> dict[str, Any]:
        results = collect(run)
        write_json(run.folder / "results.json", results)
        paths = write_report(results, run.folder)
        return {"summary": [f"report: {path}" for path in paths]}

    stages = {name: run.ledger.facts(name) for name in ("teacher", "train", "baseline", "export", "bundle", "bench")}
    made = [run.folder / name for name in ("results.json", "report.md", "report.html")]
    return run.ledger.once("report", stages, work, makes=made)


def collect(run: Run) -> dict[str, Any]:
    """Everything that was measured, in the one shape the report reads."""
    names = ("teacher", "label", "train", "baseline", "evaluate", "export", "bundle", "bench")
    facts = {name: run.ledger.facts(name) or {} for name in names}
    splits = run.splits
    curves = {"student": facts["train"]["curve"]}
    if facts["baseline"].get("curve"):
        curves["baseline"] = facts["baseline"]["curve"]
    if facts["teacher"].get("curve"):
        curves["teacher"] = facts["teacher"]["curve"]
    return {
        "name": run.recipe.name,
        "task": run.task.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": describe_machine(),
        "labels": run.teacher.labels,
        "data": {
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
            "unlabelled": len(run.free_text),
            "source": run.recipe.data.train,
        },
        "metric": run.task.metric,
        "weights": run.recipe.export.weights,
        "models": _model_rows(run, facts),
        "curves": curves,
        "layer_map": facts["train"]["layer_map"],
        "objective": facts["train"]["objective"],
        "disagreements": facts["bundle"]["models"]["student-int8"]["disagreements"],
        "verification": facts["export"]["verification"],
        "tried": facts["export"].get("tried") or [],
        "bench": facts["bench"]["report"],
        "stages": [{"name": name, "seconds": facts[name]["seconds"]} for name in names if "seconds" in facts[name]],
    }


ROLES = {
    "teacher": ("Teacher", "PyTorch"),
    "teacher-onnx": ("Teacher", "ONNX fp32"),
    "baseline": ("Same student, no distillation", "PyTorch"),
    "student": ("Student", "PyTorch"),
    "student-onnx": ("Student", "ONNX fp32"),
    "student-int8": ("Student", "ONNX int8"),
}


BENCHED = ("teacher-onnx", "student-onnx", "student-int8")
"""Roles of the files that are benchmarked, in order."""


def _model_rows(run: Run, facts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for role, (name, form) in ROLES.items():
        form = form.replace("int8", run.recipe.export.weights)
        if role in facts["bundle"]["models"]:
            rows.append({"role": role, "name": name, "format": form, **_without_rows(facts["bundle"]["models"][role])})
    report = facts["bench"]["report"]
    roles = dict(zip([target["name"] for target in report["targets"]], BENCHED, strict=True))
    timed: dict[bool, dict[str, dict[str, Any]]] = {False: {}, True: {}}
    for cell in report["cells"]:
        if (cell["batch"], cell["threads"]) == (report["cells"][0]["batch"], report["cells"][0]["threads"]):
            percentiles = {key: cell[key] for key in ("p50", "p90", "p99")}
            timed[cell["step"]].setdefault(roles[cell["target"]], {})[str(cell["length"])] = percentiles
    steps = timed[True]
    rows = [{**row, "latency_ms": timed[False].get(row["role"])} for row in rows]
    return [{**row, "token_latency_ms": steps[row["role"]]} if row["role"] in steps else row for row in rows]


def verify_with_data(folder: Path, source: str, verdict: Verification) -> Verification:
    """Adds the task's metric on labelled data to a verdict: what the shipped file reaches on this machine.

    Args:
        folder: The bundle; the recipe in it names the columns.
        source: Labelled data, as `data.train` takes it.
        verdict: What `verify_bundle` found.

    Raises:
        DataError: The data cannot be read, or holds a label that the bundle has not.
    """
    bundle = Bundle.load(folder)
    task = TASKS[bundle.task]
    columns = Recipe.parse(tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))).data
    if type(task).shipped is not Task.shipped:
        raise DataError(
            f"a {bundle.task} bundle ships without the head that its metric takes",
            where=source,
            fix="Leave --data away.",
        )
    kinds = INPUTS[task.inputs], TARGETS[task.target]
    named = Columns(columns.text, columns.text_pair or None, columns.label, columns.on_bad_row == "skip", *kinds)
    report: list[str] = []
    table = read_table(source, "test")
    sides = {"train": usable_rows(table, named, report)}
    _, sides = name_labels(sides, table.label_names.get(columns.label), bundle.labels, named.skip, report)
    tokenizer = load_reader(str(folder), task)
    encoded = encode_rows(task, sides["train"].dataset(), tokenizer, bundle.max_length, bundle.labels)
    padding = padding_of(tokenizer, load_config(str(folder)))
    found = evaluate(task.examine(bundle.model, None), encoded, task, padding, batch_size=1, settings=bundle.settings)
    right, rows = found.metrics[task.metric], len(sides["train"].texts)
    verdict.facts[task.metric] = right
    verdict.facts["rows"] = rows
    verdict.checks["data"] = (True, f"{task.metric} {right:.4f} on {rows:,} rows of {source}")
    return verdict
