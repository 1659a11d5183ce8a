"""What a distillation loss is: a pure function, the features it reads, and the unit it is divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

SumCount = tuple[Tensor, Tensor]
"""A loss over a batch: the sum over its valid items and the number of those items, fp32 scalars."""


class Unit(StrEnum):
    """What a loss counts. Each count is known from the batch alone, before any forward pass."""

    EXAMPLES = "examples"
    """Rows of the batch."""
    SCORED = "scored"
    """Rows of logits that the task scores: `scored.sum()`."""
    LABELLED = "labelled"
    """Scored rows that carry a gold label."""
    TOKENS = "tokens"
    """Positions that are not padding: `attention_mask.sum()`."""
    TOKEN_PAIRS = "token_pairs"
    """Pairs of valid positions within a row: sum over rows of n_b squared."""
    BATCHES = "batches"
    """One a micro-batch: for losses that compare the rows of a batch with each other."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One entry of the listed losses.

    Attributes:
        name: What a recipe calls it.
        function: `function(student, teacher, **inputs, **options) -> (sum, count)`. `student` and `teacher` are
            the feature tensors named by `feature` (a tuple of two where `layers_per_item` is 2).
        feature: Which kind of feature both sides give: `logits`, `hidden`, `query`, `key`, `value`, `scores`,
            `attention`; empty for a loss that reads the student's logits and the labels only.
        unit: What its count counts.
        inputs: Batch tensors handed over by keyword: `mask` (B, L), `scored`, `labels`.
        options: Names and defaults of its own settings.
        projects: Widths may differ, a trained projection from student to teacher then stands between.
        layers_per_item: How many layers one call reads.
        remembers: It takes `memory`, teacher rows of earlier batches, where the option `memory` asks for any.
        in_batch: Its value depends on which rows share a batch, so it is not invariant to batch splits.
        paired: What it reads as logits are the vectors of a text and of an image, side by side.
        classes: What it reads as logits is one distribution over classes, a row or a token.
        source: Paper or file that defines it.
    """

    name: str
    function: Callable[..., SumCount]
    feature: str
    unit: Unit
    inputs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    projects: bool = False
    layers_per_item: int = 1
    in_batch: bool = False
    remembers: bool = False
    paired: bool = False
    classes: bool = False
    source: str = ""

    def choices(self, option: str) -> tuple[Any, ...]:
        """What an option may be where that is a closed list: the function annotates it as Literal."""
        annotation = get_type_hints(self.function).get(option)
        return get_args(annotation) if get_origin(annotation) is Literal else ()


def count_units(batch: Mapping[str, Tensor]) -> dict[Unit, Tensor]:
    """Counts every unit of a batch, as fp32 scalars, without running a model.

    Args:
        batch: `attention_mask` (B, L); `scored` bool, the leading dimensions of the logits; `labels` with -100
            (or nan, for real-valued ones) where there is none.
    """
    mask = batch["attention_mask"]
    scored = batch["scored"]
    labels = batch.get("labels")
    labelled = torch.zeros((), device=mask.device)
    if labels is not None:
        labelled = (has_label(labels) & scored).sum() if labels.dim() == scored.dim() else has_label(labels).sum()
    lengths = mask.sum(dim=1)
    return {
        Unit.EXAMPLES: torch.tensor(float(mask.shape[0]), device=mask.device),
        Unit.SCORED: scored.sum().float(),
        Unit.LABELLED: labelled.float(),
        Unit.TOKENS: lengths.sum().float(),
        Unit.TOKEN_PAIRS: (lengths * lengths).sum().float(),
        Unit.BATCHES: torch.ones((), device=mask.device),
    }


def has_label(labels: Tensor) -> Tensor:
    """True where there is a gold label: not -100 for classes, not nan for real values."""
    return ~labels.isnan() if labels.is_floating_point() else labels != -100
