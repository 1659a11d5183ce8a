"""The training loop: `transformers.Trainer` with a distillation step.

One step: a batch is drawn from length buckets, the teacher gives its features (live or cached), the student runs, the
objective returns a sum and a count for each of its terms, and each sum is divided once, by the count over the whole
accumulation window and all processes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from distill import processes
from distill.errors import TrainingError
from distill.features import Features, TappedModel
from distill.files import read_json, replace_folder, sync, write_json
from distill.objectives import Objective
from distill.on_policy import OnPolicy
from distill.progress import SILENT, Progress, Stage
from distill.recipe import TrainingRecipe
from distill.sampling import LengthBucketSampler, ProcessBatches
from distill.tasks import Encoded, Padding, Task
from distill.teacher import Teacher, use_bf16

IDLE = "idle"
"""Marks a batch that stands in where a process has no row left of the last batch: it counts nothing."""

COMPLETE = "complete.json"
"""Written last into a checkpoint: one without it was cut off and is never resumed from."""


class DistillationModule(nn.Module):
    """What is optimised and checkpointed: the student and the objective's projections, one module.

    Keeping both in one module makes a resume exact (weights, optimiser state and RNG order) and lets DDP and FSDP see
    every trained parameter. The student is saved from it alone.

    Args:
        student: A transformers model.
        objective: The losses; its projections are trained along.
    """

    def __init__(self, student: Any, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self._tapped = TappedModel(student, sorted(objective.student_taps))

    def forward(
        self, batch: Mapping[str, Tensor], teacher: Features, progress: float
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum, count) of each term, in fp32 whatever autocast the student runs under."""
        features = self._tapped(batch)
        with torch.autocast(batch["attention_mask"].device.type, enabled=False):
            return self.objective({name: value.float() for name, value in features.items()}, teacher, batch, progress)


class _NoTeacher:
    """Stands where there is nothing to distil from: fine-tuning and the no-distillation baseline."""

    def features(self, batch: Mapping[str, Tensor]) -> Features:
        return {}


class DistillationTrainer(transformers.Trainer):
    """A `transformers.Trainer` whose step distils.

    Callbacks, loggers, `accelerate` launchers and TrainingArguments work as in any Trainer. The teacher is never
    wrapped, moved into a checkpoint or optimised.

    Args:
        student: The model to train.
        objective: The losses.
        teacher: A live or cached teacher; None where the objective needs none.
        train_dataset: Encoded rows.
        collate: Rows to a batch of tensors.
        args: The usual arguments.
        evaluation: Called with the student; returns metrics by name. None does not evaluate.
        callbacks: As in any Trainer.
        on_policy: Lets the student write some of its batches.
        vary: From a row and the number of the epoch to the row as it is trained on then; None keeps it.
    """

    control: TrainerControl

    def __init__(
        self,
        student: Any,
        objective: Objective,
        teacher: Teacher | None,
        train_dataset: Encoded,
        collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]],
        args: TrainingArguments,
        evaluation: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        on_policy: OnPolicy | None = None,
        vary: Callable[[Mapping[str, Any], int], Mapping[str, Any]] | None = None,
    ) -> None:
        self.teacher = teacher or _NoTeacher()
        self._on_policy, self._vary = on_policy, vary
        self.evaluation = evaluation
        module = DistillationModule(student, objective)
        super().__init__(
            model=module, args=args, train_dataset=train_dataset, data_collator=collate, callbacks=callbacks
        )
        self.remove_callback(transformers.PrinterCallback)
        # Each term is divided here, once: the Trainer must not divide by the accumulation steps as well.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps = 0

    @property
    def student(self) -> Any:
        """The model that is being trained, without projections or wrappers."""
        return self.accelerator.unwrap_model(self.model).student

    def get_train_dataloader(self) -> DataLoader:
        """Batches of like length; their order is a pure function of (seed, epoch)."""
        number, count = self.accelerator.process_index, self.accelerator.num_processes
        whole = LengthBucketSampler(
            self.train_dataset.lengths, self.args.per_device_train_batch_size * count, seed=self.args.seed
        )
        self._order = whole
        loader: DataLoader = DataLoader(
            self.train_dataset,
            batch_sampler=whole if count == 1 else ProcessBatches(whole, number, count),
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )
        if count == 1:
            return self.accelerator.prepare(loader)
        # Not `accelerator.prepare`: it would fill up the last batch with rows that were seen before.
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def _collate(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A process without a row of its own takes any, marked to count nothing: all must take part in the step."""
        if rows and self._vary is not None:
            rows = [self._vary(row, self._order.epoch) for row in rows]
        if rows:
            return self.data_collator(rows)
        return {**self.data_collator([self.train_dataset[0]]), IDLE: torch.ones(1)}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Draws one accumulation window and counts its valid items, over all processes."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if self._on_policy is not None:
            with self.compute_loss_context_manager():
                batches = [self._rewritten(batch, number) for number, batch in enumerate(batches)]
        objective = self.accelerator.unwrap_model(self.model).objective
        counts: dict[str, Tensor] = {}
        for batch in batches:
            for unit, count in objective.counts(batch).items():
                own = torch.zeros_like(count) if IDLE in batch else count
                counts[unit] = counts.get(unit, torch.zeros((), device=device)) + own.to(device)
        return batches, {unit: self.accelerator.reduce(count, "sum") for unit, count in counts.items()}

    def _rewritten(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """The batch, or what the student makes of its beginning."""
        if self._on_policy is None or IDLE in batch:
            return batch
        return self._on_policy(self.student, batch, self.state.global_step, number, self.accelerator.process_index)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum over terms of weight * sum / count of the window, times the processes, since DDP averages gradients.

        Raises:
            TrainingError: The loss is not finite; the weights are still those of the step before.
        """
        progress = self.state.global_step / max(1, self.state.max_steps)
        objective = self.accelerator.unwrap_model(model).objective
        share = 0.0 if inputs.pop(IDLE, None) is not None else 1.0
        terms = model(inputs, self.teacher.features(inputs), progress)
        weights = objective.weights(progress)
        window = num_items_in_batch if isinstance(num_items_in_batch, dict) else objective.counts(inputs)
        losses = {
            name: share * total / window[objective.units[name]].clamp(min=1.0) for name, (total, _) in terms.items()
        }
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        if not torch.isfinite(loss):
            found = ", ".join(f"{name} {float(value.detach()):g}" for name, value in losses.items())
            raise TrainingError(
                f"the loss is not finite at step {self.state.global_step} ({found})",
                where="training",
                fix="Lower training.learning_rate, or set training.precision = 'fp32'.",
            )
        for name, value in losses.items():
            self._term_sums[name] = self._term_sums.get(name, torch.zeros_like(value)) + value.detach()
        loss = loss * self.accelerator.num_processes
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last line to what the loggers get."""
        if "loss" in logs and self._term_sums:
            steps = max(1, self.state.global_step - self._term_steps)
            sums = {name: self.accelerator.reduce(total, "sum") for name, total in self._term_sums.items()}
            logs = logs | {f"loss/{name}": float(total) / steps for name, total in sums.items()}
            self._term_sums, self._term_steps = {}, self.state.global_step
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures the student as it is now and logs it as `eval_*`."""
        if self.evaluation is None:
            return {}
        metrics = {f"eval_{name}": value for name, value in self.evaluation(self.student).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Tied weights (of a language model: embedding and head) are written twice, since safetensors refuses views; a
        # resume loads both into the one they share.
        weights: dict[str, Any] = {}
        seen: set[int] = set()
        for name, value in (self.model.state_dict() if state_dict is None else state_dict).items():
            shared = isinstance(value, Tensor) and value.numel() > 0 and value.data_ptr() in seen
            weights[name] = value.clone() if shared else value
            seen.add(value.data_ptr() if isinstance(value, Tensor) else 0)
        super()._save(output_dir, weights)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        processes.wait()  # every process has written its own random state
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            for path in folder.iterdir():
                sync(path)
            write_json(folder / COMPLETE, {"step": self.state.global_step})


class _Rhythm(TrainerCallback):
    """Decides when to log, measure and save; draws the progress; keeps the best student."""

    def __init__(
        self, folder: Path, metric: str, steps_per_epoch: int, every_seconds: float, stage: Stage, saver: Callable
    ) -> None:
        self.best_folder, self.metric, self.saver = folder / "best", metric, saver
        self.steps_per_epoch, self.every_seconds, self.stage = steps_per_epoch, every_seconds, stage
        self._saved_at = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stage.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stage.advance(1)
        # Measured at a step's end and before its checkpoint, so that a resume never skips a measurement.
        if state.global_step % self.steps_per_epoch == 0 or state.global_step == state.max_steps:
            control.should_evaluate = control.should_log = True
        if processes.agree(lambda: time.monotonic() - self._saved_at > self.every_seconds):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if logs and "loss" in logs:
            self.stage.note(f"loss {logs['loss']:.3f}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        value = metrics[f"eval_{self.metric}"]
        self.stage.note(f"{self.metric} {value:.3f}")
        if state.is_world_process_zero and value > best_metric(self.best_folder):
            self._replace_best({"metric": self.metric, "value": value, "step": state.global_step})

    def _replace_best(self, facts: dict[str, Any]) -> None:
        def fill(folder: Path) -> None:
            self.saver(folder)
            write_json(folder / COMPLETE, facts)

        replace_folder(self.best_folder, fill)


def best_metric(folder: Path) -> float:
    """The metric of the best student kept in `folder`, below every possible one if none is."""
    facts = read_json(folder / COMPLETE)
    return float(facts["value"]) if facts else float("-inf")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones, left by a killed process, are removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def fit(
    student: Any,
    objective: Objective,
    teacher: Teacher | None,
    encoded: Encoded,
    task: Task,
    padding: Padding,
    settings: TrainingRecipe,
    folder: Path,
    evaluation: Callable[[Any], dict[str, float]],
    *,
    seed: int = 0,
    save: Callable[[Path], None],
    logs: Path,
    progress: Progress = SILENT,
    name: str = "Training",
    on_policy: OnPolicy | None = None,
) -> list[dict[str, Any]]:
    """Trains until the end, from the newest complete checkpoint in `folder` if there is one.

    Args:
        student: Changed in place. Its best state by `evaluation` is what `folder/best` holds at the end.
        objective: The losses.
        teacher: Live, cached or None.
        encoded: The transfer set.
        task: Collates batches and names the metric that chooses the best state.
        padding: What fills short rows.
        settings: Epochs, batch size, rates.
        folder: For checkpoints and `best`.
        evaluation: Measures the student on validation data.
        seed: For dropout, the order of batches and the projections.
        save: Writes the student as it is now into a folder, as its own loader reads it.
        logs: For TensorBoard.
        progress: Drawn while it runs.
        name: What the progress is called.
        on_policy: Lets the student write some of its batches.

    Returns:
        The learning curve: points with `step`, `epoch` and `loss` or the metric.
    """
    batches = -(-len(encoded) // (settings.batch_size * processes.count()))
    steps = -(-batches // settings.gradient_accumulation)
    total = max(1, round(steps * settings.epochs))
    on_gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup * total),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=use_bf16(settings.precision, "cuda" if on_gpu else "cpu"),
        use_cpu=not on_gpu,
        seed=seed,
        logging_steps=max(1, min(50, total // 40)),
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would copy the taps: several cards are for torchrun
    if settings.freeze_embeddings:
        freeze_embeddings(student)
    flush_denormals()
    transformers.set_seed(seed)
    with progress.stage(name, total=total, unit="steps") as stage:
        rhythm = _Rhythm(
            folder,
            task.metric,
            max(1, steps),
            settings.checkpoint_seconds,
            stage,
            save,
        )
        callbacks: list[TrainerCallback] = [rhythm]
        if processes.is_main():
            callbacks.append(TensorBoardCallback(SummaryWriter(str(logs))))
        collate = tensor_collate(task, padding)

        def vary(row: Mapping[str, Any], epoch: int) -> Mapping[str, Any]:
            return task.vary(row, seed, epoch)

        trainer = DistillationTrainer(
            student, objective, teacher, encoded, collate, args, evaluation, callbacks, on_policy, vary
        )
        if not processes.is_main():
            torch.manual_seed(seed + processes.number())  # each process drops out other units
        checkpoint = processes.agree(lambda: str(latest_checkpoint(folder) or ""))
        trainer.train(resume_from_checkpoint=checkpoint or None)
    return [_point(entry, task.metric) for entry in trainer.state.log_history if _is_point(entry, task.metric)]


def tensor_collate(task: Task, padding: Padding) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """The task's collation, as PyTorch tensors."""

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(value) for name, value in task.collate(rows, padding).items()}

    return collate


def flush_denormals() -> None:
    """Lets the processor round numbers below 1e-38 to zero, in this thread and those it starts.

    Adam's running means of rarely seen embedding rows decay into that range, where x86 is 10 to 100 times slower:
    on a small model the fused step took 37 ms with such numbers and 0.3 ms without.
    """
    torch.set_flush_denormal(True)


def freeze_embeddings(student: Any) -> None:
    """Leaves the word embeddings as they are: their gradient and update are a third of a small student's step."""
    student.get_input_embeddings().weight.requires_grad_(False)


def _is_point(entry: Mapping[str, Any], metric: str) -> bool:
    return "loss" in entry or f"eval_{metric}" in entry


def _point(entry: Mapping[str, Any], metric: str) -> dict[str, Any]:
    value = {"loss": entry["loss"]} if "loss" in entry else {metric: entry[f"eval_{metric}"]}
    return {"step": entry["step"], "epoch": round(entry["epoch"], 4), **value}
