"""A loss that is no number, found in time: before the weights it spoils are measured or saved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distill.errors import TrainingError


class Failure:
    """Watches for a loss that is not finite.

    Args:
        late: Keep the first one on the device and raise at the next `check`: to look at once is to wait for the card.
    """

    def __init__(self, *, late: bool) -> None:
        self._late = late
        self._names: list[str] = []
        self._found: Tensor | None = None  # step, then the terms; the step is -1 while all is well

    def look(self, loss: Tensor, terms: Mapping[str, Tensor], step: int) -> None:
        """One batch's loss, and what it consists of.

        Raises:
            TrainingError: It is not finite, unless that is for later.
        """
        if not self._late and torch.isfinite(loss):
            return
        now = torch.stack([torch.full_like(loss, step), *terms.values()]).detach()
        if self._found is None or list(terms) != self._names:
            self.check()
            self._names, self._found = list(terms), torch.full_like(now, -1.0)
        first = ~torch.isfinite(loss.detach()) & (self._found[0] < 0)
        self._found = torch.where(first, now, self._found)
        if not self._late:
            self.check()

    def check(self) -> None:
        """Raises what was found.

        Raises:
            TrainingError: A loss was not finite, at the first step where that was so.
        """
        step, *values = [-1.0] if self._found is None else self._found.tolist()
        if step >= 0:
            found = ", ".join(f"{name} {value:g}" for name, value in zip(self._names, values, strict=True))
            raise TrainingError(
                f"the loss is not finite at step {step:.0f} ({found})",
                where="training",
                fix="Lower training.learning_rate, or set training.precision = 'fp32'.",
            )
