"""When a training run logs, measures and saves, and what it finds when it goes on: checkpoints and the best student."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distill import processes
from distill.files import read_json, replace_folder, write_json
from distill.progress import Stage

COMPLETE = "complete.json"
"""Written last into a checkpoint: one without it was cut off and is never resumed from."""


class Rhythm(TrainerCallback):
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
        """Shows how far the run had come."""
        self.stage.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decides what follows a step."""
        self.stage.advance(1)
        # Measured at a step's end and before its checkpoint, so that a resume never skips a measurement.
        if state.global_step % self.steps_per_epoch == 0 or state.global_step == state.max_steps:
            control.should_evaluate = control.should_log = True
        if processes.yes(lambda: time.monotonic() - self._saved_at > self.every_seconds):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Counts the time from here."""
        self._saved_at = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Shows the loss."""
        if logs and "loss" in logs:
            self.stage.note(f"loss {logs['loss']:.3f}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Shows the metric and keeps the student where it is the best so far."""
        value = metrics[f"eval_{self.metric}"]
        self.stage.note(f"{self.metric} {value:.3f}")
        if state.is_world_process_zero and value > best_metric(self.best_folder):
            self._replace_best({"metric": self.metric, "value": value, "step": state.global_step})
        processes.wait()  # to save may change weights for a moment (`TargetUnit.original`), which all may share

    def _replace_best(self, facts: dict[str, Any]) -> None:
        def fill(folder: Path) -> None:
            self.saver(folder)
            write_json(folder / COMPLETE, facts)

        replace_folder(self.best_folder, fill)


def best_metric(folder: Path) -> float:
    """The metric of the best student kept in `folder`, below every possible one if none is."""
    facts = read_json(folder / COMPLETE)
    return float(facts["value"]) if facts else float("-inf")


def where_to_begin(folder: Path, count: int) -> tuple[str, int]:
    """The newest complete checkpoint, empty where there is none, and how many processes began the run.

    Args:
        folder: The run's own.
        count: How many there are now.
    """
    path = latest_checkpoint(folder)
    facts = (read_json(path / COMPLETE) if path else None) or {}
    return str(path or ""), int(facts.get("processes", count))


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones, left by a killed process, are removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            complete.append(path)
        else:
            shutil.rmtree(path)
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)
