"""The stages that learn: teacher, label, train, baseline, evaluate. Each is done once for its inputs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers

from distill import processes
from distill.devices import placed
from distill.evaluation import Evaluation, MeanPredictor, TorchPredictor, agreement, evaluate, predict_rows
from distill.features import describe
from distill.files import replace_folder
from distill.objectives import Objective, build_objective
from distill.objectives.presets import preset_terms, translate
from distill.recipe import TrainingRecipe
from distill.run import UNSEEN, Run
from distill.student.build import TABLE_COLUMNS
from distill.tasks import Encoded, Task
from distill.teacher import Checkpoint, Teacher, check_floor, check_length, load_checkpoint, use_bf16
from distill.training.fake_int8 import compute_in_floats, compute_in_int8
from distill.training.fit import fit, steps_an_epoch
from distill.training.lighter import threads
from distill.training.on_policy import OnPolicy
from distill.training.step_clock import StepClock, speed_lines
from distill.training.target_unit import TargetUnit

UNFROZEN = {"freeze_embeddings": False, "freeze_layers": 0}
"""What `training` says of a student's inherited parts, where all of a model is to learn."""

PROJECTIONS = "projections.safetensors"
"""In `work`: what the objective learnt beside the student, for those who train it on."""


def make_teacher(run: Run) -> dict[str, Any]:
    """Fine-tunes a teacher where none is given, measures it, and stops below its floor."""
    recipe = run.recipe
    curve = _finetune(run) if run.start else []

    def work() -> dict[str, Any]:
        _say_labels(run)
        validation = _measure(run, run.teacher, run.splits.validation, "Measuring the teacher")
        floor, least = run.floor(validation.metrics)
        check_floor(validation.metrics[floor], least, floor, run.source)
        metric = run.task.metric
        line = f"teacher: {metric} {validation.metrics[metric]:.4f} on {len(run.splits.validation):,} validation rows"
        lines = [line, *_ensemble(run)]
        for line in lines:
            run.progress.say(line)
        return {"curve": curve, "validation": validation.metrics, "labels": run.teacher.labels, "summary": lines}

    inputs = {
        "data": run.data_hash,
        "teacher": recipe.teacher.model_dump(mode="json", exclude={"batch_size"}),
        "card": run.card.model_dump(mode="json") if run.card else None,
        "lengths": recipe.data.max_length,
        "source": run.source_hash,
        "curve": curve,
        "seed": recipe.seed,
    }
    return run.ledger.once("teacher", inputs, work)


def _ensemble(run: Run) -> list[str]:
    """How good the teachers are together, where there are several."""
    if not run.others:
        return []
    models = [run.teacher.model, *(other.model for other in run.others)]
    together = MeanPredictor([TorchPredictor(model, run.task) for model in models], run.shares, run.task)
    encoded = run.encode(run.teacher, run.splits.validation)
    metric, padding = run.task.metric, run.teacher.padding
    with run.teaching():
        value = evaluate(together, encoded, run.task, padding, progress=run.progress, name="Measuring the ensemble")
    return [f"{len(models)} teachers together: {metric} {value.metrics[metric]:.4f}"]


def _finetune(run: Run) -> list[dict[str, Any]]:
    """Trains the pretrained model with a new head on the labels alone; the best epoch becomes the teacher."""
    final, settings = run.folder / "teacher", _finetuning(run)
    labels = run.recipe.data.labels or run.splits.labels

    def work() -> dict[str, Any]:
        transformers.set_seed(run.recipe.seed)
        start = load_checkpoint(run.start, run.task, revision=run.revision, labels=labels)
        check_length(start, run.recipe.data.max_length)
        encoded = run.encode(start, run.splits.train)
        return _fit(run, start, hard_labels(start, run.task), None, encoded, settings, "finetune", final)

    inputs = {
        "data": run.data_hash,
        "labels": list(labels),
        "task": run.task.name,
        "lengths": run.recipe.data.max_length,
        "source": run.source_hash,
        "training": settings.model_dump(mode="json", exclude=UNSEEN),
        "seed": run.recipe.seed,
    }
    done = run.ledger.once("finetune", inputs, work, scratch=run.work / "finetune", makes=[final])
    curve: list[dict[str, Any]] = done["curve"]
    return curve


def _finetuning(run: Run) -> TrainingRecipe:
    """How the teacher is trained: as the student is, but for what `[teacher.finetune]` says."""
    wanted = {**run.recipe.teacher.finetune.model_dump(), "gradient_accumulation": 1, "batch_tokens": 0, **UNFROZEN}
    return run.recipe.training.model_copy(update=wanted)


def label(run: Run) -> dict[str, Any]:
    """Writes the teacher's soft labels and the hidden states that the objective reads, once."""
    objective, _ = run.objective()
    inputs = run.cache_inputs(objective)

    def work() -> dict[str, Any]:
        with run.teaching(), threads(run.recipe.training.threads or torch.get_num_threads()):
            cache = run.cache(objective)
        size = getattr(cache, "nbytes", 0)  # a teacher that answers live writes nothing
        return {"bytes": size, "rows": len(run.transfer), "taps": sorted(run.teacher_taps(objective))}

    return run.ledger.once("label", inputs, work)


def train(run: Run) -> dict[str, Any]:
    """Trains the student against the teacher cache."""
    objective, reason = run.objective()
    final = run.folder / "student"

    def work() -> dict[str, Any]:
        student = run.new_student()
        checkpoint = run.checkpoint_of(student)
        run.task.keep(checkpoint.model, run.teacher.model, objective)
        run.progress.table(f"Student {run.recipe.student.card}", list(TABLE_COLUMNS), student.rows())
        for remark in student.remarks:
            run.progress.say(remark)
        run.progress.table(f"Objective ({reason})", ["term", "weight", "reads", "layers"], objective.rows())
        if frozen := run.recipe.training.freeze_layers:
            how = (
                "read from the teacher's answers" if run.frozen_states(objective) else "run in every step all the same"
            )
            run.progress.say(f"the first {frozen} layers are frozen, and {how} (docs/training.md)")
        before = _measure(run, checkpoint, run.splits.validation, "Measuring the student before training")
        run.progress.say(f"before training: {run.task.metric} {before.metrics[run.task.metric]:.4f}")
        encoded = run.transfer_set(checkpoint)
        with run.teaching():
            done = _fit(
                run, checkpoint, objective, run.cache(objective), encoded, run.recipe.training, "train", final,
                on_policy=_on_policy(run, checkpoint),
            )  # fmt: skip
        if processes.is_main():
            _keep(objective, run.work / PROJECTIONS)
        return {
            **done,
            "before": before.metrics,
            "reason": reason,
            "objective": objective.describe(),
            "layer_map": [{"student": mine, "teacher": theirs} for mine, theirs in student.layer_map],
            "parameters": student.parameters,
            "remarks": list(student.remarks),
        }

    return run.ledger.once("train", run.train_inputs(objective), work, scratch=run.work / "train", makes=[final])


def baseline(run: Run) -> dict[str, Any]:
    """Trains the same student on the labels alone, with the same budget of steps: the honest comparison."""
    if not run.has_baseline:
        return {}
    final = run.folder / "baseline"

    def work() -> dict[str, Any]:
        checkpoint = run.checkpoint_of(run.new_student())
        labelled = run.encode(checkpoint, run.splits.train)
        budget = run.transfer_set(checkpoint) if len(run.lessons[1]) else labelled
        objective, settings = hard_labels(checkpoint, run.task), run.recipe.training
        return _fit(run, checkpoint, objective, None, labelled, settings, "baseline", final, budget=budget)

    inputs = {**run.train_inputs(None), "objective": "hard labels"}
    return run.ledger.once("baseline", inputs, work, scratch=run.work / "baseline", makes=[final])


def hard_labels(checkpoint: Checkpoint, task: Task) -> Objective:
    """The task's loss with the gold labels."""
    shape = describe(checkpoint.model)
    return build_objective(translate(preset_terms("none"), task.losses), shape, shape)


def train_for_int8(run: Run, *, largest: int, exact: Sequence[str]) -> Checkpoint:
    """Trains the student on, `export.int8_steps` long at half the rate, computing as its int8 file will.

    Against the same teacher cache, in fp32; the student of the output folder stays as it is.

    Args:
        run: The recipe at work; its student is trained.
        largest: Largest weight of the file, see `compute_in_int8`.
        exact: Names of the weights that int8 leaves alone.

    Returns:
        The best state by what it reached with rounding, without rounding again.
    """
    checkpoint = load_checkpoint(str(run.folder / "student"), run.task)
    objective, _ = run.objective()
    if (run.work / PROJECTIONS).exists():
        objective.load_state_dict(safetensors.torch.load_file(run.work / PROJECTIONS))
    run.task.keep(checkpoint.model, run.teacher.model, objective)
    encoded = run.transfer_set(checkpoint)
    usual, final = run.recipe.training, run.work / "student-for-int8"
    steps = steps_an_epoch(usual, encoded)
    settings = usual.model_copy(
        update={
            "epochs": run.recipe.export.int8_steps / steps,
            "learning_rate": usual.learning_rate / 2,
            "precision": "fp32",  # bf16 keeps as few bits as int8
            **UNFROZEN,
        }
    )
    shutil.rmtree(run.work / "int8", ignore_errors=True)  # an unfinished one may have been for another file
    compute_in_int8(checkpoint.model, largest=largest, exact=exact)
    with run.teaching():
        _fit(run, checkpoint, objective, run.cache(objective), encoded, settings, "int8", final)
    compute_in_floats(checkpoint.model)
    return load_checkpoint(str(final), run.task)


def _keep(objective: Objective, path: Path) -> None:
    """Writes what was trained beside the student and does not ship."""
    state = {name: value.detach().cpu().clone() for name, value in objective.state_dict().items()}
    beside = path.with_name(f"{path.name}.writing")
    safetensors.torch.save_file(state, beside)
    beside.replace(path)


NAMES = {
    "finetune": "Fine-tuning the teacher",
    "train": "Training the student",
    "baseline": "Training the baseline",
    "int8": "Training on with int8's rounding",
}


def _fit(
    run: Run,
    checkpoint: Checkpoint,
    objective: Objective,
    teacher: Teacher | None,
    encoded: Encoded,
    settings: TrainingRecipe,
    name: str,
    final: Path,
    on_policy: OnPolicy | None = None,
    budget: Encoded | None = None,
) -> dict[str, Any]:
    """Trains `checkpoint` and leaves its best state in `final`; its unfinished work goes to `work/NAME`.

    As many steps as the rows of `budget` would take, where they are given.

    Returns:
        `curve`, and `speed` of this process since its start.
    """
    scratch = run.work / name
    task, padding = run.task, checkpoint.padding
    bf16 = use_bf16(settings.precision, run.device)
    unit = TargetUnit.of(task, encoded, checkpoint.model)
    validation = unit.standard(run.encode(checkpoint, run.splits.validation))

    def measure(model: Any) -> dict[str, float]:
        predictor = task.judge(TorchPredictor(model, task, bf16=bf16), model)
        return evaluate(predictor, validation, task, padding, batch_size=64).metrics

    def save(folder: Path) -> None:
        with unit.original():
            checkpoint.save(folder, task, run.recipe.data.max_length)

    clock = StepClock(wait=settings.profile)
    with unit.learnt():
        curve = fit(
            checkpoint.model,
            objective,
            unit.taught_by(teacher),
            unit.standard(encoded),
            task,
            padding,
            settings,
            scratch,
            measure,
            save=save,
            logs=run.folder / "logs" / name,
            seed=run.recipe.seed,
            progress=run.progress,
            name=NAMES[name],
            on_policy=on_policy,
            clock=clock,
            budget=budget,
        )
    if processes.is_main():
        replace_folder(final, lambda folder: shutil.copytree(scratch / "best", folder, dirs_exist_ok=True))
    processes.wait()
    speed = clock.facts(checkpoint.model, bf16=bf16)
    checkpoint.model.to("cpu")  # from the card that it was trained on
    for line in speed_lines(speed):
        run.progress.say(line)
    if settings.profile:
        run.progress.table(f"Where a step's time goes ({name})", ["part", "ms a step", "share"], clock.table())
    return {"curve": curve, "speed": speed}


def _on_policy(run: Run, checkpoint: Checkpoint) -> OnPolicy | None:
    """What lets the student write some of its batches, where the recipe asks for it."""
    wanted = run.recipe.objective.on_policy
    if not wanted.share:
        return None
    ends = run.task.rules(checkpoint.model)["ends"]
    return OnPolicy(wanted, ends=ends, padding=checkpoint.padding.values.get("input_ids", 0), seed=run.recipe.seed)


def _measure(
    run: Run,
    checkpoint: Checkpoint,
    rows: Any,
    name: str,
    settings: dict[str, Any] | None = None,
    *,
    final: bool = False,
) -> Evaluation:
    """Measures a PyTorch model in fp32; `final` measures are those that are reported."""
    ask = run.task.examine if final else run.task.judge
    predictor = ask(TorchPredictor(checkpoint.model, run.task), checkpoint.model)
    encoded, padding = run.encode(checkpoint, rows), checkpoint.padding
    with placed([checkpoint.model], run.device):
        return evaluate(predictor, encoded, run.task, padding, settings=settings, progress=run.progress, name=name)


def calibrated(run: Run, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the task chooses on validation data for this model, such as thresholds; empty for most tasks."""
    if not run.task.calibrates:
        return {}
    encoded = run.encode(checkpoint, run.splits.validation)
    with placed([checkpoint.model], run.device):
        outputs = predict_rows(TorchPredictor(checkpoint.model, run.task), encoded, run.task, checkpoint.padding)
    return run.task.calibrate(outputs, encoded)


def _say_labels(run: Run) -> None:
    rows = [[str(number), name] for number, name in enumerate(run.teacher.labels)]
    if len(rows) <= 12:
        run.progress.table("Labels", ["class", "name"], rows)
    else:
        run.progress.say(f"{len(rows)} labels, from {rows[0][1]} to {rows[-1][1]}")


def measure(run: Run) -> dict[str, Any]:
    """Measures teacher, student and baseline on the test data, in fp32 PyTorch, and keeps what they said."""
    roles = {"teacher": run.source, "student": str(run.folder / "student")}
    if run.has_baseline:
        roles["baseline"] = str(run.folder / "baseline")

    def work() -> dict[str, Any]:
        said: dict[str, Evaluation] = {}
        models: dict[str, Any] = {}
        for role, source in roles.items():
            checkpoint = run.teacher if role == "teacher" else load_checkpoint(source, run.task)
            settings = calibrated(run, checkpoint)
            said[role] = _measure(run, checkpoint, run.splits.test, f"Measuring the {role}", settings, final=True)
            parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
            models[role] = {"parameters": parameters, "bytes": 4 * parameters, "settings": settings}
        metric = run.task.metric
        reference = said["teacher"].metrics[metric]
        for role, evaluation in said.items():
            models[role] |= {
                "metrics": evaluation.metrics,
                "retention": evaluation.metrics[metric] / reference if reference else None,
                "agreement": agreement(said["teacher"], evaluation, run.task),
                **run.groups(evaluation),
            }
        if processes.is_main():
            np.savez(run.work / "teacher_test.npz", **said["teacher"].outputs)  # type: ignore[arg-type]
        lines = [result_line(role, models[role], metric, len(run.splits.test), run.splits.measured) for role in roles]
        for line in lines:
            run.progress.say(line)
        return {"models": models, "summary": lines}

    inputs = {"train": run.train_inputs(run.objective()[0]), "baseline": run.has_baseline}
    return run.ledger.once("evaluate", inputs, work, makes=[run.work / "teacher_test.npz"])


def result_line(role: str, facts: Mapping[str, Any], metric: str, rows: int, measured: str = "test") -> str:
    """What a model reached, and how much of its teacher's measure that is; nothing of a teacher that reached 0."""
    line = f"{role}: {metric} {facts['metrics'][metric]:.4f} on {rows:,} {measured} rows"
    kept = None if role == "teacher" else facts["retention"]
    return line if kept is None else f"{line}, {kept:.1%} of the teacher's"
