"""Losses on inner products within a text: between its tokens (NST), or between two layers' neurons (FSP).

Shapes: hidden_BLH; `mask` (B, L) is 1 at tokens. Each returns (sum, count) in fp32; no gradient reaches the teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.base import SumCount

Layers = tuple[Tensor, Tensor]
"""The same feature of two neighbouring mapped layers, the lower one first."""


def nst(student: Tensor, teacher: Tensor, *, mask: Tensor) -> SumCount:
    """Squared difference of the tokens' inner products, G = X X^T / H, over pairs of tokens of one text.

    Neuron selectivity transfer with the polynomial kernel (1707.01219); TextBrewer's `mmd_loss` with each layer matched
    with itself. H is each side's own, so widths need not agree.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).

    Returns:
        Sum over valid pairs, and their number, sum_b n_b^2.
    """
    return mmd((student, student), (teacher, teacher), mask=mask)


def mmd(student: Layers, teacher: Layers, *, mask: Tensor) -> SumCount:
    """As `nst`, with tokens of one layer against tokens of the next: G = X_low X_high^T / H (TextBrewer's `mmd_loss`).

    Args:
        student: (B, L, H of the student) of the lower and the upper layer.
        teacher: (B, L, H of the teacher) of both.
        mask: (B, L).

    Returns:
        Sum over valid pairs, and their number, sum_b n_b^2.
    """
    s_BLL = _token_gram(*(_clean(states, mask) for states in student))
    t_BLL = _token_gram(*(_clean(states.detach(), mask) for states in teacher))
    lengths_B = mask.sum(1)
    return (s_BLL - t_BLL).square().sum(), (lengths_B * lengths_B).sum().float()


def fsp(student: Layers, teacher: Layers, *, mask: Tensor) -> SumCount:
    """Squared difference of G = X_low^T X_high / n_b, averaged over its H x H entries (FSP, CVPR 2017).

    The flow of solution procedure: which neurons of a layer lead to which of the next. TextBrewer's `fsp_loss`.

    Args:
        student: (B, L, H) of the lower and the upper layer, projected to the teacher's width.
        teacher: (B, L, H) of both.
        mask: (B, L).

    Returns:
        Sum over rows, and their number.
    """
    s_BHH = _layer_gram(*student, mask)
    t_BHH = _layer_gram(teacher[0].detach(), teacher[1].detach(), mask)
    return (s_BHH - t_BHH).square().mean((1, 2)).sum(), s_BHH.new_tensor(float(len(s_BHH)))


def _clean(states_BLH: Tensor, mask: Tensor) -> Tensor:
    """fp32 with 0 at padding, whatever stands there."""
    return torch.where(mask.unsqueeze(-1) > 0, states_BLH.float(), 0.0)


def _token_gram(low_BLH: Tensor, high_BLH: Tensor) -> Tensor:
    return low_BLH @ high_BLH.transpose(1, 2) / low_BLH.shape[-1]


def _layer_gram(low_BLH: Tensor, high_BLH: Tensor, mask: Tensor) -> Tensor:
    lengths_B11 = mask.sum(1).clamp(min=1).float()[:, None, None]
    return _clean(low_BLH, mask).transpose(1, 2) @ _clean(high_BLH, mask) / lengths_B11
