"""Weights and temperatures that change over training, and temperatures that follow each example.

A schedule is a function of progress x in [0, 1], the share of optimiser steps done, and of nothing else.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.recipe import ScheduleRecipe

Dynamic = Literal["flsw", "cwsm"]
"""Temperatures by example: by how far the student's logits are from the teacher's, or by how sure the student is."""

DYNAMIC: tuple[Dynamic, ...] = ("flsw", "cwsm")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A number over training.

    Attributes:
        kind: `constant` is `start` throughout; `linear` and `cosine` go from `start` at `begin` to `end` at `until` and
            stay there; `stages` is `start` within [begin, until) and 0 outside.
        start: Value at `begin`.
        end: Value at `until`; of no meaning for `constant` and `stages`.
        begin: Share of training.
        until: Share of training.
    """

    kind: str
    start: float
    end: float = 0.0
    begin: float = 0.0
    until: float = 1.0

    def __call__(self, progress: float) -> float:
        """The value at `progress`."""
        if self.kind == "constant":
            return self.start
        if self.kind == "stages":
            # A window that reaches the end holds the end itself too.
            inside = self.begin <= progress and (progress < self.until or self.until >= 1.0)
            return self.start if inside else 0.0
        done = min(max((progress - self.begin) / (self.until - self.begin), 0.0), 1.0)
        if self.kind == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return self.start + (self.end - self.start) * done

    @property
    def turning_points(self) -> list[float]:
        """Where the value may jump or stop changing; between two of them it is monotonous."""
        return [0.0, 1.0] if self.kind == "constant" else sorted({0.0, self.begin, self.until, 1.0})

    def __str__(self) -> str:
        """All that it depends on: schedules that read alike are alike."""
        if self.kind == "constant":
            return f"{self.start:.12g}"
        window = f"{100 * self.begin:.12g}% to {100 * self.until:.12g}%"
        if self.kind == "stages":
            return f"{self.start:.12g} from {window}"
        return f"{self.start:.12g} to {self.end:.12g}, {self.kind}, from {window}"


def schedule_of(value: float | ScheduleRecipe) -> Schedule:
    """A recipe's weight or temperature as a schedule."""
    if isinstance(value, ScheduleRecipe):
        return Schedule(value.schedule, value.start, value.end, value.from_, value.until)
    return Schedule("constant", float(value))


def schedule_problems(schedule: Schedule, name: str, *, positive: bool) -> list[str]:
    """What is wrong with a schedule, one line each.

    Args:
        schedule: Any.
        name: What a line calls it, such as `weight of hidden_mse`.
        positive: It must stay above 0, as a temperature must: at 0 the softmax divides by nothing, below it the
            objective is turned upside down.
    """
    if schedule.kind != "constant" and schedule.begin >= schedule.until:
        return [f"{name} must begin before it ends; got from = {schedule.begin:g}, until = {schedule.until:g}"]
    values = [schedule(point) for point in schedule.turning_points]
    if not all(math.isfinite(value) for value in values):
        return [f"{name} must be finite; got {schedule}"]
    if positive and min(values) <= 0.0:
        return [f"{name} must stay above 0; got {schedule}"]
    if min(values) < 0.0:
        return [f"{name} must not be negative; got {schedule}"]
    return []


def silent_stretch(weights: list[Schedule]) -> tuple[float, float] | None:
    """A stretch of training in which every weight is 0, so that nothing is learnt; None where there is none."""
    points = sorted({point for schedule in weights for point in schedule.turning_points})
    for begin, until in itertools.pairwise(points):
        # Weights are monotonous and not negative in between: 0 in two inner points means 0 throughout.
        inner = [begin + (until - begin) * share for share in (0.25, 0.75)]
        if all(schedule(point) == 0.0 for schedule in weights for point in inner):
            return begin, until
    return None


def dynamic_temperature(
    student: Tensor, teacher: Tensor, kind: Dynamic, base: float, *, beta: float = 1.0, gamma: float = 2.0
) -> Tensor:
    """A temperature for each row: tau = base + beta * (mean(w) - w), without gradient.

    `flsw`: w = (1 - cos(student, teacher))^gamma. `cwsm`: w = 1 / (max softmax(student) + 1e-3).
    Li et al. 1911.07471; conventions of TextBrewer's `presets.py`. The mean is over all rows given, so the value
    depends on which rows share a batch. Kept at or above base / 10, where the papers' formula can fall below 0.

    Args:
        student: Logits (..., C).
        teacher: Logits (..., C).
        kind: Which weight.
        base: Temperature of a row of average weight.
        beta: How far temperatures spread.
        gamma: Exponent of `flsw`.

    Returns:
        (..., 1) fp32.
    """
    with torch.no_grad():
        if kind == "flsw":
            weight = (1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1, eps=1e-4)).clamp(
                min=0.0
            ) ** gamma
        else:
            weight = 1.0 / (student.float().softmax(dim=-1).amax(dim=-1) + 1e-3)
        return (base + beta * (weight.mean() - weight)).clamp(min=base / 10.0).unsqueeze(-1)
