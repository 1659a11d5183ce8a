"""`DistillationTrainer`: the step of a `transformers.Trainer` that distils.

One step: a batch is drawn from length buckets, the teacher gives its features (live or cached), the student runs, the
objective returns a sum and a count for each of its terms, and each sum is divided once, by the count over the whole
accumulation window and all processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from distill import processes
from distill.data.sampling import ProcessBatches, sample_batches
from distill.features import Features, TappedModel, evaluating
from distill.files import sync, write_json
from distill.objectives import Objective
from distill.tasks import Encoded
from distill.teacher import Teacher
from distill.training.exchange import Exchange
from distill.training.failure import Failure
from distill.training.frozen import GivenStates
from distill.training.on_policy import OnPolicy
from distill.training.optimizer import RowAdamW, total_norm
from distill.training.rhythm import COMPLETE
from distill.training.step_clock import StepClock
from distill.training.zero import Zero

SAID = "teacher/"
"""Begins the names of what the teacher said, where it comes with the batch."""

IDLE = "idle"
"""Marks a batch that stands in where a process has no row left of the last batch: it counts nothing."""


class DistillationModule(nn.Module):
    """What is optimised and checkpointed: the student and the objective's projections, one module.

    Keeping both in one module makes a resume exact (weights, optimiser state and RNG order) and lets DDP and FSDP see
    every trained parameter. The student is saved from it alone.

    Args:
        student: A transformers model.
        objective: The losses; its projections are trained along.
        clock: Told where the time goes.
        frozen: Passes the teacher's states through the student's frozen layers; None lets these run.
    """

    def __init__(
        self,
        student: Any,
        objective: Objective,
        clock: StepClock | None = None,
        frozen: GivenStates | None = None,
    ) -> None:
        super().__init__()
        self._clock, self._frozen = clock or StepClock(), frozen
        self.student = student
        self.objective = objective
        self._tapped = TappedModel(student, sorted(objective.student_taps))

    def close(self) -> None:
        """Takes the hooks out of the student."""
        self._tapped.close()

    def forward(
        self, batch: Mapping[str, Tensor], teacher: Features, progress: float
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """(sum, count) of each term, in fp32 whatever autocast the student runs under."""
        given = self._frozen.given(teacher) if self._frozen else nullcontext()
        with self._clock.part("student"), given:
            features = self._tapped(batch)
        with self._clock.part("losses"), torch.autocast(batch["attention_mask"].device.type, enabled=False):
            return self.objective({name: value.float() for name, value in features.items()}, teacher, batch, progress)


def share_buffers(module: nn.Module) -> None:
    """Gives all processes the first one's buffers before every pass: it is these that a checkpoint holds.

    Args:
        module: Buffers that its `state_dict` leaves out do not change.
    """
    kept = module.state_dict().keys()

    def broadcast(*_: Any) -> None:
        for name, buffer in module.named_buffers():  # not those of before: the Trainer moves them
            if name in kept:
                torch.distributed.broadcast(buffer, 0)

    module.register_forward_pre_hook(broadcast)


class _NoTeacher:
    """Stands where there is nothing to distil from: fine-tuning and the no-distillation baseline."""

    def features(self, batch: Mapping[str, Tensor]) -> Features:
        return {}


def sometimes_unused(student: Any, objective: Objective, teacher: Teacher | None, batch: dict[str, Tensor]) -> bool:
    """Whether a step may leave a trained parameter without a gradient: a term that rests, or a layer nothing reads.

    Args:
        student: It is run once, without dropout, and left as it was.
        objective: Its terms' weights are looked at over the whole of training.
        teacher: As in the trainer.
        batch: Any, on the student's device.
    """
    if any(0.0 in objective.weights(step / 100).values() for step in range(101)):
        return True
    module = DistillationModule(student, copy.deepcopy(objective))  # a memory of earlier rows must not see this one
    try:
        with evaluating(student):
            terms = module(batch, (teacher or _NoTeacher()).features(batch), 0.0)
            torch.stack([total for total, _ in terms.values()]).sum().backward()  # type: ignore[no-untyped-call]
        return any(parameter.grad is None for parameter in module.parameters() if parameter.requires_grad)
    finally:
        module.close()
        module.zero_grad()


def pieces_of(began: int, count: int) -> int:
    """Batches in which a process works off its part of a batch, so that none holds more rows than `began` ones held."""
    return -(-began // count)


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
        by_rows: The student's embedding, where only the rows that a batch reads are to be updated; `row_embedding`.
        clock: Told where the time goes.
        frozen: Passes the teacher's states through the student's frozen layers; None lets these run.
        exchange: Of several processes on one machine's processors, which share a step by it; None lets DDP.
        batch_tokens: Tokens of a batch of one process, padding included; 0 takes rows as the arguments say.
        began: How many processes began the run: a batch stays as large as theirs together. 0 means as many as now.
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
        by_rows: nn.Embedding | None = None,
        clock: StepClock | None = None,
        frozen: GivenStates | None = None,
        exchange: Exchange | None = None,
        batch_tokens: int = 0,
        began: int = 0,
    ) -> None:
        self.clock, self._batch_tokens = clock or StepClock(), batch_tokens
        self._began = began or processes.count()
        self.teacher = teacher or _NoTeacher()
        self._on_policy, self._vary = on_policy, vary
        self.evaluation = evaluation
        module = self._place(DistillationModule(student, objective, self.clock, frozen), args)
        self._zero = None
        if exchange:
            share_buffers(module)
            self._zero = Zero(exchange, module, by_rows)
        super().__init__(
            model=module,
            args=args,
            train_dataset=train_dataset,
            data_collator=collate,
            callbacks=[*(callbacks or []), *([self._zero] if self._zero else []), self.clock],
        )
        self.remove_callback(transformers.PrinterCallback)
        if self._zero:
            self._leave_as_it_is()
        # Each term is divided here, once: the Trainer must not divide by the accumulation steps as well.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps = 0
        on_card = self.args.device.type != "cpu"
        self._reads_ahead = on_card and getattr(self.teacher, "on_processor", False)
        self._failure = Failure(late=on_card)
        self._table = by_rows

    def _place(self, module: DistillationModule, args: TrainingArguments) -> DistillationModule:
        return module

    def _leave_as_it_is(self) -> None:
        """Neither moved nor put into DDP: accelerate wraps what is not for evaluation."""
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)

    @property
    def student(self) -> Any:
        """The model that is being trained, without projections or wrappers."""
        return self.accelerator.unwrap_model(self.model).student

    def get_train_dataloader(self) -> DataLoader:
        """Batches of like length; their order is a pure function of (seed, epoch)."""
        number, count = self.accelerator.process_index, self.accelerator.num_processes
        rows, tokens = self.args.per_device_train_batch_size * self._began, self._batch_tokens * self._began
        whole = sample_batches(self.train_dataset.lengths, rows, tokens, seed=self.args.seed)
        self._order = whole
        pieces = pieces_of(self._began, count)
        loader: DataLoader = DataLoader(
            self.train_dataset,
            batch_sampler=whole if self._began == count == 1 else ProcessBatches(whole, number, count, pieces),
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )
        if count == 1:
            return self.accelerator.prepare(loader)
        # Not `accelerator.prepare`: it would fill up the last batch with rows that were seen before.
        ahead = self.args.device.type == "cuda"
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, non_blocking=ahead
        )

    def _collate(self, rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A process without a row of its own takes any, marked to count nothing: all must take part in the step."""
        if rows and self._vary is not None:
            rows = [self._vary(row, self._order.epoch) for row in rows]
        batch = self.data_collator(rows or [self.train_dataset[0]])
        if self._reads_ahead:
            with self.clock.part("teacher"):
                batch |= {SAID + tap: value for tap, value in self.teacher.features(batch).items()}
        return batch if rows else {**batch, IDLE: torch.ones(1)}

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Draws one accumulation window and counts its valid items, over all processes."""
        with self.clock.part("data"):
            return self._window(epoch_iterator, num_batches, device)

    def _window(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], dict[str, Tensor]]:
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
            self.clock.count(batch["attention_mask"])
            for unit, count in objective.counts(batch).items():
                own = torch.zeros_like(count) if IDLE in batch else count
                counts[unit] = counts.get(unit, torch.zeros((), device=device)) + own.to(device)
        if not counts:
            return batches, {}
        together = self.accelerator.reduce(torch.stack(list(counts.values())), "sum")  # one number a unit, in one go
        return batches, dict(zip(counts, together.unbind(), strict=True))

    def _rewritten(self, batch: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        """The batch, or what the student makes of its beginning."""
        if self._on_policy is None or IDLE in batch:
            return batch
        return self._on_policy(self.student, batch, self.state.global_step, number, self.accelerator.process_index)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One batch; what neither teacher, student nor losses take of it is the way back."""
        with self.clock.part("backward"):
            loss = super().training_step(*args, **kwargs)
            if self._zero and self.accelerator.sync_gradients:
                self._zero.collect()
            return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum over terms of weight * sum / count of the window, times the processes: the Trainer's log averages them.

        Raises:
            TrainingError: The loss is not finite; the weights are still those of the step before. On a card this is
                seen at the next line of the log, before anything is measured or saved.
        """
        progress = self.state.global_step / max(1, self.state.max_steps)
        objective = self.accelerator.unwrap_model(model).objective
        share = 0.0 if inputs.pop(IDLE, None) is not None else 1.0
        said = {name.removeprefix(SAID): inputs.pop(name) for name in list(inputs) if name.startswith(SAID)}
        if not self._reads_ahead:
            with self.clock.part("teacher"):
                said = self.teacher.features(inputs)
        terms = model(inputs, said, progress)
        weights = objective.weights(progress)
        window = num_items_in_batch if isinstance(num_items_in_batch, dict) else objective.counts(inputs)
        losses = {
            name: share * total / window[objective.units[name]].clamp(min=1.0) for name, (total, _) in terms.items()
        }
        if losses:
            loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        else:  # every term rests at this step; not the first parameter, an embedding whose gradients are sparse
            loss = 0.0 * [one for one in model.parameters() if one.requires_grad][-1].sum()
        self._failure.look(loss, losses, self.state.global_step)
        if not self._term_sums:  # also after a resume, whose lines then speak of the steps since
            self._term_steps = self.state.global_step
        for name, value in losses.items():
            self._term_sums[name] = self._term_sums.get(name, torch.zeros_like(value)) + value.detach()
        # DDP averages gradients too; `Zero` adds them up.
        loss = loss + (self.accelerator.num_processes - 1) * (loss.detach() if self._zero else loss)
        return (loss, terms) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser that the arguments ask for; AdamW by rows where there is an embedding to update so."""
        if self._table is not None and self.optimizer is None:
            _, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer_cls_and_kwargs = (RowAdamW, {**settings, "table": self._table})
        return super().create_optimizer(model)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self.clock.part("clipping"):
            if self._table is None and self._zero is None:
                return super()._clip_grad_norm(model)
            return total_norm(model.parameters(), self.args.max_grad_norm, self._zero)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is not None or (self._table is None and self._zero is None):
            return super()._get_grad_norm(model, grad_norm)
        return total_norm(model.parameters(), zero=self._zero)

    @property
    def _rows(self) -> RowAdamW | None:
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, RowAdamW) else None

    def close(self) -> None:
        """Leaves the student's embedding as any other, its rows up to date, and its weights this process's own."""
        if self._rows is not None:
            self._rows.close()
        if self._zero:
            self._zero.close()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each term since the last line to what the loggers get."""
        self._failure.check()
        if "loss" in logs and self._term_sums:
            steps = max(1, self.state.global_step - self._term_steps)
            sums = self.accelerator.reduce(torch.stack(list(self._term_sums.values())), "sum").tolist()
            logs = logs | {f"loss/{name}": total / steps for name, total in zip(self._term_sums, sums, strict=True)}
            self._term_sums = {}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measures the student as it is now and logs it as `eval_*`."""
        self._failure.check()
        if self.evaluation is None:
            return {}
        if self._rows is not None:
            self._rows.settle()
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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._zero.whole(self.optimizer) if self._zero else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Read to the processor: for several processes transformers 5.17 names a device that torch refuses.
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        self.optimizer.load_state_dict(self._own_part(state))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        if self._zero:
            self._zero.forget(self.optimizer)

    def _own_part(self, state: dict[str, Any]) -> dict[str, Any]:
        """Of the whole state of the optimiser, which lies in a file, what this process keeps of its own."""
        return copy.deepcopy(state)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._failure.check()
        super()._save_checkpoint(model, trial)
        processes.wait()  # every process has written its own random state
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            for path in folder.iterdir():
                sync(path)
            write_json(folder / COMPLETE, {"step": self.state.global_step, "processes": self._began})
