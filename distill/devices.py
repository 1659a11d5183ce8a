"""Where models run: the student on this process's card if it has one, and the teacher beside it or on another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from distill.errors import TrainingError


def training_device() -> torch.device:
    """This process's CUDA card, or the processor."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def teacher_device(wanted: str) -> torch.device:
    """Where the teacher answers.

    Args:
        wanted: `training.teacher_device`: `auto` for where the student is, or `cpu`, `cuda`, `cuda:1`.

    Raises:
        TrainingError: There is no such card.
    """
    if wanted == "auto":
        return training_device()
    device, cards = torch.device(wanted), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise TrainingError(
            f"`training.teacher_device` is {wanted!r}, and this machine has {cards or 'no'} CUDA cards",
            where="training",
            fix='Set it to "auto".',
        )
    return training_device() if wanted == "cuda" else device


@contextmanager
def placed(models: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Within the block the models are on `device`; after it, where they were: outside, everything is on the CPU."""
    with ExitStack() as stack:
        for model in models:
            home = next(model.parameters()).device
            if home != device:
                stack.callback(model.to, home)
                model.to(device)
        yield
