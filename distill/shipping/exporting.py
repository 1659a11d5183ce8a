"""The stage that makes the ONNX files, each step proven against the one before."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distill import processes
from distill.candidates import Choice, fastest
from distill.encoders import FAMILIES, token_embedding
from distill.errors import ExportError
from distill.evaluation import TorchPredictor, agreement, evaluate
from distill.export.affine_norms import fold_affine_norms
from distill.export.blockwise import quantize_blocks_within
from distill.export.captioner import cut_captioner
from distill.export.dual import part
from distill.export.encoder_decoder import cut
from distill.export.graph import export_forms, trace
from distill.export.ladder import LadderResult, Learn, quantize_within
from distill.export.onnx_model import OnnxModel
from distill.export.parity import SHAPES, batches_of, check_parity
from distill.export.passes import DEFAULT, FUSED, Pass, passes_for
from distill.export.pieces import bytes_of, pieces, towers
from distill.export.precision import store_floats_within
from distill.export.quantize import LARGEST
from distill.heads import HEADS
from distill.learning import train_for_int8
from distill.readers import ImageReader
from distill.run import Run
from distill.shipping.stage import lengths_of, settings_of, shipped_file, target_of, versions
from distill.tasks import Batch, Encoded, Padding, Task
from distill.tasks.base import GraphSpec, Predictor
from distill.teacher import Checkpoint, load_checkpoint

CUTS = {"decoder": (cut, pieces), "captioner": (cut_captioner, pieces), "towers": (part, towers)}
"""By `Task.cut`: what writes the two files of a graph, and what they are called."""

ONE_PROCESS = (
    "Run the same command in one process: the last repair, training with int8's rounding, is left out in several."
)


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
        left = run.task.unfollowed(student.model)
        lines = [f"the bundle writes without its generation_config's {', '.join(left)}"] if left else []
        for line in lines:
            run.progress.say(line)
        graphs = graphs_of(run, files["student"])
        steps = _export(run, run.teacher, {files["teacher"]: passes_for(target_of(run))}, "export of the teacher")
        exported = _export(run, student, dict(graphs.values()), "export of the student")
        choice = _quantize(run, student, {name: path for name, (path, _) in graphs.items()}, files["student-int8"])
        for (name, (path, _)), facts in zip(graphs.items(), exported, strict=True):
            if name == choice.graph:
                os.replace(path, files["student"])
                steps.append(facts)
            else:
                path.unlink()
        steps.append(_quantized(run, student, choice.result, files["student"], files["student-int8"]))
        if run.task.cut:
            write, names = CUTS[run.task.cut]
            for name, path in files.items():
                write(path, *names(shipped_file(run, name)))
        return {
            "verification": steps,
            "tried": choice.table(),
            "bytes": {name: bytes_of(shipped_file(run, name)) for name in files},
            "summary": lines,
        }

    inputs: dict[str, Any] = {
        "train": run.train_inputs(run.objective()[0]),
        "export": run.recipe.export.model_dump(mode="json"),
    }
    if run.recipe.export.target == "auto":
        inputs["timed"] = [target_of(run), *lengths_of(run)]
    return run.ledger.once("export", inputs, work, makes=list(files.values()))


def try_export(run: Run) -> None:
    """Traces the student before it has learnt, where its family is none of those that this package knows.

    What cannot be traced is then said before hours of training, not after them.

    Raises:
        ExportError: It cannot be traced.
    """
    student = run.student.model
    if run.task.cut or student.config.model_type in FAMILIES:
        return

    def work() -> dict[str, Any]:
        with run.progress.stage("Trying the ONNX export"):
            trace(*_shipped(run, student, run.encode(run.teacher, run.splits.validation)))
        return {}

    run.ledger.once("trial", {"config": json.loads(student.config.to_json_string())}, work)


def _metadata(run: Run, checkpoint: Checkpoint) -> dict[str, str]:
    settings = settings_of(run, checkpoint)
    rules = run.task.rules(checkpoint.model) | run.task.around(checkpoint.tokenizer)
    table = token_embedding(checkpoint.model) if "text" in HEADS[run.task.name].reads else None
    seen = dict(checkpoint.tokenizer.config) if isinstance(checkpoint.tokenizer, ImageReader) else {}
    return {
        **({"distill.settings": json.dumps(settings)} if settings else {}),
        **({"distill.rules": json.dumps(rules)} if rules else {}),
        **({"distill.preprocessing": json.dumps(seen, sort_keys=True)} if seen else {}),
        **({"distill.prefix": run.recipe.data.prefix} if run.recipe.data.prefix else {}),
        "distill.format": "1",
        "distill.task": run.task.name,
        "distill.labels": json.dumps(run.teacher.labels, ensure_ascii=False),
        **({"distill.vocabulary": str(len(table.weight))} if table is not None else {}),
        "distill.max_length": str(run.longest),
        "distill.recipe": run.recipe.fingerprint(),
        "distill.versions": json.dumps(versions(), sort_keys=True),
        "distill.target": target_of(run),
    }


def graphs_of(run: Run, path: Path) -> dict[str, tuple[Path, tuple[Pass, ...]]]:
    """By name, the forms of the student's graph, their files and passes: one without a name but with target `auto`."""
    if run.recipe.export.target != "auto" or run.recipe.export.weights != "int8":
        return {"": (path, passes_for(target_of(run)))}
    return {
        "separate heads": (path.with_name("separate.onnx"), DEFAULT),
        "fused attention": (path.with_name("fused.onnx"), FUSED),
    }


def _shipped(run: Run, model: Any, encoded: Encoded) -> tuple[Any, GraphSpec]:
    """What of a model becomes a graph, and that graph's inputs and outputs."""
    shipped = fold_affine_norms(run.task.shipped(model))
    return shipped, run.task.exported(shipped, run.task.inputs_of(encoded))


def _export(
    run: Run, checkpoint: Checkpoint, forms: Mapping[Path, tuple[Pass, ...]], step: str
) -> list[dict[str, Any]]:
    """PyTorch to ONNX, checked on real text at several lengths and batch sizes and on the whole validation set."""
    encoded = run.encode(checkpoint, run.splits.validation)
    with run.progress.stage(f"ONNX {step}"):
        export_forms(*_shipped(run, checkpoint.model, encoded), forms, metadata=_metadata(run, checkpoint))
    reference = TorchPredictor(checkpoint.model, run.task)
    tolerance = 1e-3 * run.task.spread(encoded)
    return [_check(run, checkpoint, encoded, reference, OnnxModel(path), step, tolerance=tolerance) for path in forms]


def _quantize(run: Run, checkpoint: Checkpoint, graphs: Mapping[str, Path], path: Path) -> Choice:
    """fp32 to int8 by the ladder: plain dynamic first, more care where it loses too much, refused past `max_drop`.

    Of several graphs, the form and the graph that are fastest here.
    """
    task, padding, export = run.task, checkpoint.padding, run.recipe.export
    encoded = run.encode(checkpoint, run.splits.validation)
    train = run.splits.train
    sample = run.encode(checkpoint, train.select(range(min(len(train), 4096))))

    chosen, source = settings_of(run, checkpoint), graphs.get("")

    def measure(file: Path) -> float:
        model = task.judge(OnnxModel(file), checkpoint.model)
        return evaluate(model, encoded, task, padding, settings=chosen).metrics[task.metric]

    limits: dict[str, Any] = {"measure": measure, "max_drop": export.max_drop, "relative": task.relative}
    if export.weights != "int8" and source is not None:
        with run.progress.stage(f"Storing weights in {export.weights}"):
            limits |= {"metadata": {**_metadata(run, checkpoint), "distill.weights": export.weights}}
            if export.weights in ("fp16", "fp32"):
                return Choice("", store_floats_within(source, path, half=export.weights == "fp16", **limits), ())
            limits |= {"bits": int(export.weights[-1]), "tables": export.embeddings}
            return Choice("", quantize_blocks_within(source, path, **limits), ())
    settings: dict[str, Any] = {
        **limits,
        "batches": spread(task, sample, padding, rows=256),
        "target": target_of(run),
        "metadata": _metadata(run, checkpoint),
        "repair": export.repair,
        "tables": export.embeddings,
        "learn": learner(run) if export.int8_steps and processes.alone() else None,
        "progress": run.progress,
    }
    try:
        if source is not None:
            with run.progress.stage("Quantising to int8"):
                return Choice("", quantize_within(source, path, **settings), ())
        return fastest(graphs, path, lengths=lengths_of(run), ships=cutter(task), **settings)
    except ExportError as error:
        if export.repair and export.int8_steps and not processes.alone():
            error.fix = f"{ONE_PROCESS} {error.fix}"
        raise


def cutter(task: Task) -> Callable[[Path], Path] | None:
    """Writes the two files of a graph beside it, and says where; None for a task whose graph is one file."""
    if not task.cut:
        return None
    write, names = CUTS[task.cut]

    def cut_beside(path: Path) -> Path:
        beside = path.parent / "cut" / path.name
        write(path, *names(beside))
        return beside

    return cut_beside


def learner(run: Run) -> Learn:
    """Trains the student on with int8's rounding and exports it, where the ladder asks for that."""
    target = target_of(run)

    def learn(path: Path, exact: Sequence[str]) -> None:
        run.progress.say(f"no repair of the int8 file is good enough: {run.recipe.export.int8_steps} steps of training")
        trained = train_for_int8(run, largest=LARGEST[target], exact=exact)
        passes = DEFAULT if run.recipe.export.target == "auto" else passes_for(target)
        _export(run, trained, {path: passes}, "export of the student trained in int8")

    return learn


def _quantized(run: Run, checkpoint: Checkpoint, found: LadderResult, source: Path, path: Path) -> dict[str, Any]:
    """What quantising found out, and how the file answers beside the fp32 one."""
    encoded = run.encode(checkpoint, run.splits.validation)
    for line in filter(None, (found.said(run.recipe.export.max_drop), *_token_table(run, found))):
        run.progress.say(line)
    facts = _check(run, checkpoint, encoded, OnnxModel(source), OnnxModel(path), _step(run), tolerance=math.inf)
    components, tables = ([asdict(each) for each in some] for some in (found.graph.components, found.graph.tables))
    return {**facts, "components": components, "tables": tables, "ladder": found.as_dict()}


def _token_table(run: Run, found: LadderResult) -> list[str]:
    """What became of the table of the tokens where it was to be in int4."""
    if run.recipe.export.embeddings != "int4":
        return []
    lines = [
        f"{table.name} in int4: {table.bytes / 1e6:.2f} MB in place of {table.int8_bytes / 1e6:.2f} in int8, "
        f"off by {table.error:.1%} of its numbers"
        for table in found.graph.tables
        if table.bits == 4
    ]
    return lines or ["embeddings in int4 lose more than export.max_drop: they are stored in int8"]


def _step(run: Run) -> str:
    """What makes the file that ships."""
    weights = run.recipe.export.weights
    return "int8 quantisation" if weights == "int8" else f"storing of weights in {weights}"


def _check(
    run: Run, checkpoint: Checkpoint, encoded: Encoded, one: Predictor, other: Predictor, step: str, *, tolerance: float
) -> dict[str, Any]:
    """Compares `other` with `one`, first at many shapes, then on the whole validation set."""
    task, padding = run.task, checkpoint.padding
    report = check_parity(one, other, sample_batches(task, encoded, padding), step=step, tolerance=tolerance)
    name = f"Checking the {step}"
    settings = settings_of(run, checkpoint)
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
