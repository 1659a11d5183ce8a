"""One training run, from the starting student to the best state that was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from distill import processes
from distill.data.sampling import sample_batches
from distill.devices import training_device
from distill.objectives import Objective
from distill.progress import SILENT, Progress
from distill.recipe import TrainingRecipe
from distill.tasks import Encoded, Padding, Task
from distill.teacher import Teacher, use_bf16
from distill.training.exchange import exchange
from distill.training.frozen import states_given
from distill.training.lighter import lighter
from distill.training.on_policy import OnPolicy
from distill.training.optimizer import row_embedding
from distill.training.rhythm import Rhythm, where_to_begin
from distill.training.sharding import ShardedTrainer
from distill.training.step_clock import StepClock
from distill.training.trainer import DistillationModule, DistillationTrainer, pieces_of, sometimes_unused
from distill.training.zero import room

__all__ = ["DistillationModule", "DistillationTrainer", "fit", "flush_denormals", "tensor_collate"]


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
    clock: StepClock | None = None,
    budget: Encoded | None = None,
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
        clock: Told where the time goes.
        budget: It takes as many steps, and is measured as often, as these rows would ask for; None: as `encoded` does.

    Returns:
        The learning curve: points with `step`, `epoch` and `loss` or the metric.
    """
    checkpoint, began = processes.agree(lambda: where_to_begin(folder, processes.count()))
    steps = steps_an_epoch(settings, budget or encoded, began)
    args = _arguments(settings, steps, pieces_of(began, processes.count()), folder, seed)
    sharded = settings.sharding == "fsdp" and processes.count() > 1
    collate = tensor_collate(task, padding)
    one = collate([encoded[0]])
    transformers.set_seed(seed)
    with (
        progress.stage(name, total=args.max_steps, unit="steps") as stage,
        lighter(student, settings, on_processor=args.use_cpu),
        states_given(student, settings, objective.student_taps, one) as frozen,
        ExitStack() as stack,
    ):
        flush_denormals()
        dense = settings.compile or settings.sharding != "none"
        by_rows = row_embedding(student) if args.use_cpu and not dense else None
        shared = None
        if args.use_cpu and not sharded:
            shared = stack.enter_context(exchange(room(nn.ModuleList([student, objective]), by_rows)))
        rhythm = Rhythm(folder, task.metric, steps, settings.checkpoint_seconds, stage, save)
        callbacks: list[TrainerCallback] = [rhythm]
        if processes.is_main():
            callbacks.append(TensorBoardCallback(SummaryWriter(str(logs))))

        def vary(row: Mapping[str, Any], epoch: int) -> Mapping[str, Any]:
            return task.vary(row, seed, epoch)

        if processes.count() > 1 and not sharded and shared is None:
            # Else DDP looks through the whole graph in every step, and says so.
            args.ddp_find_unused_parameters = sometimes_unused(student, objective, teacher, one)
        trainer = (ShardedTrainer if sharded else DistillationTrainer)(
            student,
            objective,
            teacher,
            encoded,
            collate,
            args,
            evaluation,
            callbacks,
            on_policy,
            vary,
            by_rows,
            clock,
            frozen,
            shared,
            batch_tokens=settings.batch_tokens,
            began=began,
        )
        stack.callback(trainer.close)
        if checkpoint or not processes.is_main():
            # Each process drops out other units; a checkpoint has the state of those that wrote it, new ones draw anew.
            torch.manual_seed(seed + processes.number() + int(checkpoint.rpartition("-")[2] or 0))
        trainer.train(resume_from_checkpoint=checkpoint or None)
    return [_point(entry, task.metric) for entry in trainer.state.log_history if _is_point(entry, task.metric)]


def steps_an_epoch(settings: TrainingRecipe, encoded: Encoded, began: int = 0) -> int:
    """The optimiser's, with as many processes as began the run; 0 means as many as there are now."""
    began = began or processes.count()
    batches = sample_batches(encoded.lengths, settings.batch_size * began, settings.batch_tokens * began)
    return max(1, -(-len(batches) // settings.gradient_accumulation))


def _arguments(settings: TrainingRecipe, steps: int, pieces: int, folder: Path, seed: int) -> TrainingArguments:
    """What the Trainer is told; each of its batches is one of `pieces` of a batch as the run began."""
    total = max(1, round(steps * settings.epochs))
    device = training_device()
    on_gpu = device.type != "cpu"
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation * pieces,
        learning_rate=settings.learning_rate,
        warmup_steps=round(settings.warmup * total),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=use_bf16(settings.precision, device),
        use_cpu=not on_gpu,
        seed=seed,
        logging_steps=max(1, min(50, total // 40)),
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,  # it waits for the card in every step; such a loss is an error here
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        ddp_find_unused_parameters=False,
    )
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would copy the taps: several cards are for torchrun
    return args


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


def _is_point(entry: Mapping[str, Any], metric: str) -> bool:
    return "loss" in entry or f"eval_{metric}" in entry


def _point(entry: Mapping[str, Any], metric: str) -> dict[str, Any]:
    value = {"loss": entry["loss"]} if "loss" in entry else {metric: entry[f"eval_{metric}"]}
    return {"step": entry["step"], "epoch": round(entry["epoch"], 4), **value}
