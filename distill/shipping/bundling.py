"""The stage that writes the bundle, and the check of a bundle on data that has labels."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.fields import INPUTS, TARGETS
from distill.data.rows import Columns, Rows, name_labels, usable_rows
from distill.data.tables import Table, read_table
from distill.encoding import encode_rows, texts_of
from distill.errors import DataError
from distill.evaluation import Evaluation, agreement, disagreements, evaluate
from distill.export.bundle import Contents, write_bundle
from distill.export.pieces import bytes_of
from distill.export.runtime import QUANTIZED, Bundle, open_graph
from distill.export.verify import Verification, verify_bundle
from distill.ledger import FOLDER
from distill.recipe import DataRecipe, Recipe
from distill.run import Run
from distill.shipping.stage import shipped_file, versions, without_rows
from distill.tasks import TASKS, Task
from distill.teacher import load_checkpoint, load_config, load_reader, padding_of


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
                    fp32_onnx=shipped_file(run, "student"),
                    int8_onnx=shipped_file(run, "student-int8"),
                    model_folder=run.folder / "student",
                    golden_texts=_golden(run),
                    metrics={role: without_rows(facts) for role, facts in models.items()},
                    verification=(run.ledger.facts("export") or {})["verification"],
                    recipe_toml=run.recipe.to_toml(),
                    versions=versions(),
                    data_source=run.recipe.data.train,
                    measured_on=run.splits.measured,
                    ort=run.recipe.export.ort,
                    weights=run.recipe.export.weights,
                    prefix=run.recipe.data.prefix,
                    beside=_beside(run.folder / "student"),
                ),
            )
            verdict = verify_bundle(folder)
        if not verdict.ok:
            raise verdict.error()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shipped = bytes_of(folder / QUANTIZED)
        line = f"{FOLDER}/bundle is verified; the {run.recipe.export.weights} file has {shipped / 1e6:.1f} MB"
        run.progress.say(f"bundle: {line.replace(FOLDER, str(run.folder))}")
        told = {"verdict": verdict.to_json(), "summary": [f"bundle: {line}"]}
        return {"models": models, "bytes": size, "int8_bytes": shipped, **told}

    facts = {"export": run.ledger.facts("export"), "evaluate": run.ledger.facts("evaluate")}
    inputs = {"name": run.recipe.name, **facts}
    return run.ledger.once("bundle", inputs, work, makes=[folder / "MANIFEST.json"])


def _beside(folder: Path) -> list[str]:
    """What a task wrote beside a model for other libraries: its steps, and a folder each."""
    named = [folder / name for name in ("modules.json", "sentence_bert_config.json")]
    return sorted(path.relative_to(folder).as_posix() for path in (*named, *folder.glob("*/*")) if path.is_file())


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
        path = shipped_file(run, file)
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


def verify_with_data(folder: Path, source: str, verdict: Verification) -> Verification:
    """Adds the task's metric on labelled data to a verdict: what the shipped file reaches on this machine.

    Args:
        folder: The bundle; the recipe in it names the columns.
        source: Labelled data, as `data.train` takes it.
        verdict: What `verify_bundle` found.

    Raises:
        DataError: The data cannot be read, or holds a label that the bundle has not, or the task's metric takes more
            than the bundle.
    """
    bundle = Bundle.load(folder)
    task = TASKS[bundle.task]
    if type(task).shipped is not Task.shipped:
        raise DataError(
            f"a {bundle.task} bundle ships without the head that its metric takes",
            where=source,
            fix="Leave --data away.",
        )
    if task.follows:
        raise DataError(
            f"a {bundle.task} bundle is measured against its teacher, which does not ship with it",
            where=source,
            fix="Leave --data away; report.html of its run has the measures.",
        )
    columns = Recipe.parse(tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))).data
    table = read_table(source, "test")
    try:
        rows = labelled_rows(bundle, columns, table)
    except DataError as error:
        pair = f", data.text_pair {columns.text_pair!r}" if columns.text_pair else ""
        label = f", data.label {columns.label!r}" if TARGETS[task.target].column else ""
        raise DataError(
            error.what,
            where=error.where,
            fix=f"Mend the file: the bundle was made with data.text {columns.text!r}{pair}{label}.",
        ) from error
    tokenizer = load_reader(str(folder), task)
    encoded = encode_rows(task, rows.dataset(), tokenizer, bundle.max_length, bundle.labels)
    padding = padding_of(tokenizer, load_config(str(folder)))
    found = evaluate(task.examine(bundle.model, None), encoded, task, padding, batch_size=1, settings=bundle.settings)
    right = found.metrics[task.metric]
    verdict.facts[task.metric] = right
    verdict.facts["rows"] = len(rows.texts)
    cut = f"; {encoded.cut:,} of them lose their {bundle.lost} at {bundle.max_length} tokens" if encoded.cut else ""
    verdict.checks["data"] = (True, f"{task.metric} {right:.4f} on {len(rows.texts):,} rows of {source}{cut}")
    return verdict


def labelled_rows(bundle: Bundle, columns: DataRecipe, table: Table) -> Rows:
    """Rows of a table as a bundle was measured on such: its classes, and its prefix before each text.

    Raises:
        DataError: A column is missing, or it holds a label that the bundle has not.
    """
    task = TASKS[bundle.task]
    named = Columns(
        columns.text,
        columns.text_pair or None,
        columns.label,
        columns.on_bad_row == "skip",
        INPUTS[task.inputs],
        TARGETS[task.target],
        prefix=bundle.prefix,
    )
    report: list[str] = []
    sides = {"train": usable_rows(table, named, report)}
    _, sides = name_labels(sides, table.label_names.get(columns.label), bundle.labels, named.skip, report, least=0)
    return sides["train"]
