"""The stages that measure and tell: latency of every file, then all numbers in one report."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from distill.bench import bench as measure_latency
from distill.export.runtime import QUANTIZED
from distill.files import write_json
from distill.ledger import FOLDER
from distill.machine import describe_machine
from distill.report import write_report
from distill.run import Run
from distill.shipping.stage import embeddings_of, lengths_of, shipped_file, stored_tables, versions, without_rows


def bench(run: Run) -> dict[str, Any]:
    """Measures teacher and student files side by side, interleaved, in one run."""
    settings = run.recipe.bench
    targets = [shipped_file(run, "teacher"), shipped_file(run, "student"), run.folder / "bundle" / QUANTIZED]

    def work() -> dict[str, Any]:
        report = measure_latency(
            targets,
            lengths=lengths_of(run),
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
        return {"summary": [f"report: {FOLDER}/{path.relative_to(run.folder).as_posix()}" for path in paths]}

    names = ("teacher", "train", "baseline", "export", "bundle", "bench")
    stages: dict[str, Any] = {name: run.ledger.facts(name) for name in names}
    stages |= {"with": [run.has_baseline, run.start]}
    made = [run.folder / name for name in ("results.json", "report.md", "report.html")]
    return run.ledger.once("report", stages, work, makes=made)


def collect(run: Run) -> dict[str, Any]:
    """Everything that was measured, in the one shape the report reads."""
    names = ("finetune", "teacher", "label", "train", "baseline", "evaluate", "export", "bundle", "bench")
    without = {"baseline": not run.has_baseline, "finetune": not run.start}  # of an earlier recipe
    facts = {name: {} if without.get(name) else run.ledger.facts(name) or {} for name in names}
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
            "measured": splits.measured,
            "unlabelled": len(run.free_text),
            "source": run.recipe.data.train,
        },
        "metric": run.task.metric,
        "weights": run.recipe.export.weights,
        "embeddings": embeddings_of(run),
        "tables": stored_tables(run),
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
        shipped = ", ".join(filter(None, (run.recipe.export.weights, embeddings_of(run) and "int4 embeddings")))
        form = form.replace("int8", shipped)
        if role in facts["bundle"]["models"]:
            rows.append({"role": role, "name": name, "format": form, **without_rows(facts["bundle"]["models"][role])})
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
