"""Losses on one vector a text: for students that embed, and for the pooled state that a head reads.

Shapes: hidden_BLH, pooled to rows_BH; `mask` (B, L) is 1 at tokens. Each returns (sum over rows, their number) in fp32;
no gradient reaches the teacher. Where widths differ, a trained projection stands before the pooling: both are linear.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from distill.objectives.base import SumCount
from distill.objectives.relational import Pooling, pool


def embedding(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor,
    pooling: Pooling = "mean",
    metric: Literal["cosine", "l2", "mse"] = "cosine",
) -> SumCount:
    """Difference of the pooled states (sentence-transformers' `EmbedDistillLoss`).

    Args:
        student: (B, L, H), projected to the teacher's width.
        teacher: (B, L, H).
        mask: (B, L).
        pooling: What stands for a row: the mean over its tokens, or its first token.
        metric: `cosine` is 1 - cos, `l2` the Euclidean distance, `mse` the squared distance over H.
    """
    s_BH, t_BH = pool(student, mask, pooling), pool(teacher.detach(), mask, pooling)
    if metric == "cosine":
        each_B = 1.0 - F.cosine_similarity(s_BH, t_BH, dim=-1)
    elif metric == "mse":
        each_B = (s_BH - t_BH).square().mean(-1)
    else:
        each_B = (s_BH - t_BH).norm(dim=-1)
    return each_B.sum(), each_B.new_tensor(float(len(each_B)))
