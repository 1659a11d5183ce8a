"""A model that computes as its int8 file will, so that training meets the rounding and learns to live with it.

    swapped = compute_in_int8(student, exact=["classifier.weight"])
    ...  # train
    compute_in_floats(student)

Every product rounds its weights to one scale a column and its input to one range a tensor, found at each call; rows of
the tables that the file keeps in int8, words and learned positions, have a scale each. Gradients pass as if nothing had
been rounded (Bengio et al. 2013, arXiv:1308.3432).
Names and shapes of weights stay what they are, so a model is saved and exported as ever, and `quantize_int8` then finds
the very numbers and scales that training has seen.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

STEPS = 255  # of a uint8
ROW = 127  # largest number of a table, whatever the target
FEW_ROWS, FEW_COLUMNS = 64, 8  # tables this small stay as they are, as `distill.export.lookups` has it


class Int8Linear(nn.Linear):
    """`nn.Linear` with int8 weights (out, in) and a uint8 input."""

    largest: int

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return functional.linear(rounded_input(input), rounded(self.weight, self.largest, axis=1), self.bias)


class Int8Conv1D(Conv1D):
    """GPT-2's product, whose weights are (in, out)."""

    largest: int

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return rounded_input(x) @ rounded(self.weight, self.largest, axis=0) + self.bias


class Int8Embedding(nn.Embedding):
    """`nn.Embedding` with int8 rows: each has its own scale, so that rounding what was looked up is enough."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) ids to (..., width)."""
        return rounded(super().forward(input), ROW, axis=-1)


SWAPS: dict[type, type] = {nn.Linear: Int8Linear, Conv1D: Int8Conv1D}


def compute_in_int8(model: Any, *, largest: int = 127, exact: Collection[str] = ()) -> tuple[str, ...]:
    """Lets every product of `model`, and every table that the file stores in int8, round as int8 does; in place.

    Args:
        model: A transformers model.
        largest: Largest weight, as `distill.export.quantize.LARGEST` has it for a target.
        exact: Names of weights that stay as they are: `classifier.weight`, or what passes have made of that name, such
            as `classifier.weight.product`.

    Returns:
        Names of the weights that are now rounded.
    """
    done = []
    for name, module in model.named_modules():
        swapped = Int8Embedding if _is_table(module) else SWAPS.get(type(module))
        weight = f"{name}.weight"
        if swapped is None or any(f"{each}.".startswith(f"{weight}.") for each in exact):
            continue
        module.__class__ = swapped
        if swapped is not Int8Embedding:
            module.largest = largest
        done.append(weight)
    return tuple(done)


def _is_table(module: nn.Module) -> bool:
    """Whether the file stores it in int8: token types are too few rows for that."""
    return type(module) is nn.Embedding and module.num_embeddings > FEW_ROWS and module.embedding_dim > FEW_COLUMNS


def compute_in_floats(model: Any) -> None:
    """Takes `compute_in_int8` back, in place."""
    plain = {swapped: kind for kind, swapped in SWAPS.items()} | {Int8Embedding: nn.Embedding}
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))


def rounded(weight: Tensor, largest: int, *, axis: int) -> Tensor:
    """What int8 keeps of `weight`: symmetric, one scale for all numbers along `axis`, between -largest and largest."""
    with torch.no_grad():
        scale = weight.abs().amax(dim=axis, keepdim=True) / largest
        scale = torch.where(scale == 0, 1.0, scale)
        kept = torch.round(weight / scale).clamp(-largest, largest) * scale
    return weight + (kept - weight).detach()


def rounded_input(x: Tensor) -> Tensor:
    """What uint8 keeps of `x`: one range for the whole tensor, which holds 0, as DynamicQuantizeLinear finds it."""
    with torch.no_grad():
        low, high = torch.aminmax(x)
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / STEPS
        scale = torch.where(scale == 0, 1.0, scale)
        zero = torch.round(-low / scale).clamp(0, STEPS)
        kept = ((torch.round(x / scale) + zero).clamp(0, STEPS) - zero) * scale
    return x + (kept - x).detach()
