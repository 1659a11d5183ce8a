"""Numbers are learnt in a unit of their own, mean 0 and deviation 1, and given in the unit of the data.

Rates, losses and their weights are made for numbers around 1: prices would make a loss explode, thousandths of a second
would not be learnt. So the head is changed while it trains, and changed back in all that is saved: a linear layer holds
any mean and deviation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from distill.features import Features
from distill.tasks import Encoded, Task
from distill.teacher import Teacher, head_of


@dataclass(frozen=True)
class TargetUnit:
    """Standard numbers are (x - mean) / deviation. Without a head it changes nothing.

    Attributes:
        head: The layer that gives the numbers, (B, 1).
        mean: Of the labels that are trained on; 0 where the head has no bias to hold it.
        deviation: Of the same, from `mean`; above 0.
    """

    head: nn.Linear | None = None
    mean: float = 0.0
    deviation: float = 1.0

    @staticmethod
    def of(task: Task, encoded: Encoded, model: nn.Module) -> TargetUnit:
        """That of the rows that are trained on; one that changes nothing where they have no numbers."""
        head = head_of(model, 1) if task.target == "number" and task.labelled(encoded) else None
        if head is None:
            return TargetUnit()
        labels = np.asarray(encoded.flat["labels"], np.float64)
        mean = float(np.nanmean(labels)) if head.bias is not None else 0.0
        deviation = float(np.sqrt(np.nanmean((labels - mean) ** 2)))
        return TargetUnit(head, mean, deviation or 1.0)

    def standard(self, encoded: Encoded) -> Encoded:
        """The rows with standard labels."""
        if self.head is None:
            return encoded
        labels = ((encoded.flat["labels"] - self.mean) / self.deviation).astype(np.float32)
        return replace(encoded, flat={**encoded.flat, "labels": labels})

    def taught_by(self, teacher: Teacher | None) -> Teacher | None:
        """A teacher that gives standard numbers."""
        return teacher if self.head is None or teacher is None else _Standard(teacher, self)

    @contextmanager
    def learnt(self) -> Iterator[None]:
        """Within the block the head gives standard numbers, behind it those that it learnt in the unit of the data.

        A head that nobody trained, whose bias is still 0, begins in the standard unit.
        """
        if self.head is not None and not (self.head.bias is not None and bool((self.head.bias == 0).all())):
            self._change(1 / self.deviation, -self.mean / self.deviation)
        yield
        self._change(self.deviation, self.mean)

    @contextmanager
    def original(self) -> Iterator[None]:
        """Within the block the head gives numbers in the unit of the data; behind it, bit for bit what it was."""
        kept = [] if self.head is None else [value.detach().clone() for value in self.head.parameters()]
        self._change(self.deviation, self.mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for value, old in zip([] if self.head is None else self.head.parameters(), kept, strict=True):
                    value.copy_(old)

    def _change(self, factor: float, more: float) -> None:
        """What the head gives becomes `factor` times that and `more`."""
        if self.head is None:
            return
        with torch.no_grad():
            self.head.weight.mul_(factor)
            if self.head.bias is not None:
                self.head.bias.mul_(factor).add_(more)


class _Standard:
    """A teacher whose logits are numbers in a standard unit."""

    def __init__(self, teacher: Teacher, unit: TargetUnit) -> None:
        self._teacher, self._unit = teacher, unit

    @property
    def on_processor(self) -> bool:
        """As the trainer asks a cached one."""
        return bool(getattr(self._teacher, "on_processor", False))

    def features(self, batch: Mapping[str, Tensor]) -> Features:
        """The teacher's."""
        said = self._teacher.features(batch)
        if "logits" not in said:
            return said
        return {**said, "logits": (said["logits"] - self._unit.mean) / self._unit.deviation}
