"""Losses on hidden states. Shapes: hidden_BLH; `mask` (B, L) is 1 at tokens, 0 at padding.

Each returns (sum over tokens or rows, their number) in fp32; no gradient reaches the teacher. Where widths differ, a
trained projection brings the student to the teacher's width first.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.objectives.base import SumCount


class _Squares(torch.autograd.Function):
    """Sum over items of weight * mean square of the gap. Its way back is one product, where PyTorch's takes four."""

    @staticmethod
    def forward(ctx: Any, student_BLH: Tensor, teacher_BLH: Tensor, weights_BL: Tensor) -> Tensor:
        gap_BLH = student_BLH - teacher_BLH
        ctx.save_for_backward(gap_BLH, weights_BL)
        return (gap_BLH.square().mean(-1) * weights_BL).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gap_BLH, weights_BL = ctx.saved_tensors
        return gap_BLH * (weights_BL * (2.0 / gap_BLH.shape[-1] * gradients[0])).unsqueeze(-1), None, None


def hidden_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor, convention: Literal["distill", "tinybert"] = "distill"
) -> SumCount:
    """Squared difference, averaged over the width: sum over tokens of ||s - t||^2 / H, divided by the tokens.

    Args:
        student: (B, L, H).
        teacher: (B, L, H).
        mask: (B, L).
        convention: `tinybert` averages over every position, padding too, as MSELoss() in its code does.
    """
    everywhere = mask.new_ones(()).expand(mask.shape) if convention == "tinybert" else mask
    total: Tensor = _Squares.apply(student.float(), teacher.float().detach(), everywhere)  # type: ignore[no-untyped-call]
    return total, everywhere.sum().float()


def hidden_cosine(student: Tensor, teacher: Tensor, *, mask: Tensor) -> SumCount:
    """1 - cosine of the two states, summed over tokens, divided by their number (DistilBERT, 1910.01108)."""
    cosines_BL = F.cosine_similarity(student.float(), teacher.float().detach(), dim=-1)
    return ((1.0 - cosines_BL) * mask).sum(), mask.sum().float()


def pkd(student: Tensor, teacher: Tensor, *, mask: Tensor) -> SumCount:
    """||s / |s| - t / |t| ||^2 of the first token, divided by the rows (Patient Knowledge Distillation, 1908.09355)."""
    s_BH = F.normalize(student[:, 0].float(), dim=-1, eps=1e-6)
    t_BH = F.normalize(teacher[:, 0].float().detach(), dim=-1, eps=1e-6)
    return (s_BH - t_BH).square().sum(), _count(len(s_BH), s_BH)


def feature_map(
    student: Tensor, teacher: Tensor, *, mask: Tensor, means: float = 0.0, variances: float = 0.0
) -> SumCount:
    """Squared difference after LayerNorm without gain, averaged over the width (MobileBERT, 2004.02984, section 3.3).

    Its README weighs the map by 100, the means by 5000 and the variances by 5: weight 100, means 50, variances 0.05.

    Args:
        student: (B, L, H).
        teacher: (B, L, H).
        mask: (B, L).
        means: Weight, besides, of the squared difference of the means of each token's state.
        variances: Weight, besides, of the absolute difference of the variances of each token's state.
    """
    s_BLH, t_BLH = student.float(), teacher.float().detach()
    width = (s_BLH.shape[-1],)
    each_BL = (F.layer_norm(s_BLH, width) - F.layer_norm(t_BLH, width)).square().mean(-1)
    each_BL = each_BL + means * (s_BLH.mean(-1) - t_BLH.mean(-1)).square()
    each_BL = each_BL + variances * (s_BLH.var(-1, unbiased=False) - t_BLH.var(-1, unbiased=False)).abs()
    return (each_BL * mask).sum(), mask.sum().float()


def _count(items: int, like: Tensor) -> Tensor:
    return like.new_tensor(float(items))
