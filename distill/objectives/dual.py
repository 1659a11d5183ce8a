"""Losses on pairs of an image and its text, a vector for each: for students with two encoders, as CLIP has them.

Shapes: pairs_B2P holds the text's vector in its first half and the image's in the second; `scored` (B,) says which rows
count. Vectors are brought to length 1 here. fp32; no gradient reaches the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.objectives.base import SumCount
from distill.objectives.soft_labels import check_temperature


def similarity_kl(student: Tensor, teacher: Tensor, *, scored: Tensor, temperature: float = 0.05) -> SumCount:
    """KL between the rankings within a batch: mean_i KL(softmax_j(t_ij / T) || softmax_j(s_ij / T)), both ways.

    Texts are ranked for each image and images for each text, and the two are averaged (CLIP-KD's contrastive relational
    distillation, 2307.12732, with one temperature for both sides). There is no factor T^2: at the temperatures of
    cosines it would leave nothing.

    Args:
        student: (B, 2P).
        teacher: (B, 2P of the teacher).
        scored: (B,).
        temperature: T > 0, of cosines; CLIP's own is 0.01.

    Returns:
        The mean, and 1: it is counted by the batch.

    Raises:
        ObjectiveError: The temperature is not above 0.
    """
    check_temperature(temperature)
    s_BB, t_BB = (_similarities(rows[scored]) / temperature for rows in (student, teacher.detach()))
    ways = [
        F.kl_div(s_BB.log_softmax(axis), t_BB.log_softmax(axis), reduction="sum", log_target=True) for axis in (0, 1)
    ]
    return torch.stack(ways).sum() / (2 * max(len(s_BB), 1)), s_BB.new_ones(())


def pair_mse(student: Tensor, teacher: Tensor, *, scored: Tensor) -> SumCount:
    """Squared distance of the vectors, summed over P and averaged over text and image (CLIP-KD's feature distillation).

    Args:
        student: (B, 2P).
        teacher: (B, 2P).
        scored: (B,).
    """
    s_B2P, t_B2P = (_unit(rows) for rows in (student, teacher.detach()))
    each_B = (s_B2P - t_B2P).square().sum(dim=(1, 2)) / 2
    return (each_B * scored).sum(), scored.sum().float()


def pair_labels(
    student: Tensor, teacher: Any = None, *, labels: Tensor, scored: Tensor, temperature: float = 0.05
) -> SumCount:
    """Cross-entropy of each image with the texts of the batch that are its own, and of each text with its images.

    CLIP's loss (2103.00020), but that several rows may have the same text: they share the mass.

    Args:
        student: (B, 2P).
        teacher: Not read.
        labels: (B,) int64, equal where texts are; -100 leaves a row out.
        scored: (B,).
        temperature: T > 0.

    Returns:
        The mean, and 1: it is counted by the batch.

    Raises:
        ObjectiveError: The temperature is not above 0.
    """
    check_temperature(temperature)
    known = scored & (labels != -100)
    s_BB = _similarities(student[known]) / temperature
    same_BB = (labels[known][:, None] == labels[known][None, :]).to(s_BB.dtype)
    share_BB = same_BB / same_BB.sum(-1, keepdim=True)  # symmetric: rows with one text have equal shares
    ways = [-(share_BB * s_BB.log_softmax(axis)).sum() for axis in (0, 1)]
    return torch.stack(ways).sum() / (2 * max(len(s_BB), 1)), s_BB.new_ones(())


def _unit(rows: Tensor) -> Tensor:
    """(B, 2, P) fp32 of length 1."""
    return F.normalize(rows.float().reshape(len(rows), 2, rows.shape[1] // 2), dim=-1)


def _similarities(rows: Tensor) -> Tensor:
    """(images, texts) cosines."""
    texts, images = _unit(rows).unbind(1)
    return images @ texts.T
