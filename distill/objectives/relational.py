"""Losses on how the rows of a batch stand to each other; widths need not agree, but for `contrastive`.

Shapes: hidden_BLH, pooled to rows_BH; `mask` (B, L) is 1 at tokens. Their value depends on which rows share a batch, so
each counts 1 a batch, and a batch split over accumulation steps is not the same as a whole one. A batch of one row has
nothing to compare and gives 0. Each returns (loss of the batch, 1) in fp32; no gradient reaches the teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.objectives.base import SumCount
from distill.objectives.soft_labels import check_temperature, same_shape

Pooling = Literal["mean", "first", "max", "last"]
"""What stands for a row: the mean over its tokens, its first token, the largest of each channel, its last token."""

Similarity = Literal["dot", "cosine"]

_NEAR = 1e-6
"""Rows closer than this are one point: a text that stands twice in a batch has no distance and no direction."""


def pool(hidden_BLH: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One fp32 vector a row, (B, H)."""
    if pooling == "first":
        return hidden_BLH[:, 0].float()
    if pooling == "last":
        last_B = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return hidden_BLH[torch.arange(len(mask), device=mask.device), last_B].float()
    if pooling == "max":
        return hidden_BLH.float().masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(torch.float32).min).amax(1)
    mask_BL1 = mask.float().unsqueeze(-1)
    # Padding may hold anything, so it is replaced and not multiplied away.
    tokens_BLH = torch.where(mask_BL1 > 0, hidden_BLH.float(), 0.0)
    return tokens_BLH.sum(1) / mask_BL1.sum(1).clamp(min=1.0)


def rkd_distance(student: Tensor, teacher: Tensor, *, mask: Tensor, pooling: Pooling = "mean") -> SumCount:
    """Huber of all distances between rows, each side's divided by their mean (RKD, 1904.05068, equation 3).

    Mean over pairs of different rows; the authors' code counts the diagonal too, which holds zeros, and so comes out
    smaller by (B - 1) / B.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        pooling: What stands for a row.
    """
    s_BB, t_BB = (_distances(rows) for rows in _pooled(student, teacher, mask, pooling))
    apart_BB = _apart(len(s_BB), s_BB)
    return _mean(F.smooth_l1_loss(s_BB, t_BB, reduction="none"), apart_BB)


def rkd_angle(student: Tensor, teacher: Tensor, *, mask: Tensor, pooling: Pooling = "mean") -> SumCount:
    """Huber of the cosines of all angles that three rows make (RKD, 1904.05068, equation 5).

    Mean over triplets of different rows. Memory grows with the third power of the batch.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        pooling: What stands for a row.
    """
    s_BBB, t_BBB = (_angles(rows) for rows in _pooled(student, teacher, mask, pooling))
    apart = _apart(len(s_BBB), s_BBB)
    distinct_BBB = apart.unsqueeze(2) * apart.unsqueeze(1) * apart.unsqueeze(0)
    return _mean(F.smooth_l1_loss(s_BBB, t_BBB, reduction="none"), distinct_BBB)


def spkd(student: Tensor, teacher: Tensor, *, mask: Tensor, pooling: Pooling = "mean") -> SumCount:
    """Squared difference of the rows' similarities, each row of the matrix at norm 1 (SPKD, 1907.09682, equation 4).

    ||G_s - G_t||^2 / B^2 with G = X X^T, its rows normalised.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        pooling: What stands for a row.
    """
    s_BB, t_BB = (F.normalize(rows @ rows.T, dim=-1, eps=_NEAR) for rows in _pooled(student, teacher, mask, pooling))
    return (s_BB - t_BB).square().mean(), _one(s_BB)


def pairwise_cosine(student: Tensor, teacher: Tensor, *, mask: Tensor, pooling: Pooling = "mean") -> SumCount:
    """Squared difference of the cosines between rows, over all B^2 pairs (SetFit's distillation of sentence pairs).

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        pooling: What stands for a row.
    """
    units = [F.normalize(rows, dim=-1, eps=_NEAR) for rows in _pooled(student, teacher, mask, pooling)]
    s_BB, t_BB = (unit @ unit.T for unit in units)
    return (s_BB - t_BB).square().mean(), _one(s_BB)


def margin_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor, pooling: Pooling = "mean", metric: Similarity = "cosine"
) -> SumCount:
    """Mean of ((s_ij - s_ik) - (t_ij - t_ik))^2 over rows i and pairs j, k of other rows (MarginMSE, 2010.02666).

    Every other row of the batch is a candidate. With d = s - t the mean is 2 / (B - 2) * sum_j (d_ij - mean_j d_ij)^2,
    so pairs are never written out. Only the differences of similarities count: the student may score on another level.
    Needs three rows; fewer give 0.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        pooling: What stands for a row.
        metric: What s and t are: `cosine`, or `dot` as published.
    """
    s_BB, t_BB = (_similarities(rows, metric) for rows in _pooled(student, teacher, mask, pooling))
    rows = len(s_BB)
    others_BB = _apart(rows, s_BB)
    d_BB = (s_BB - t_BB) * others_BB
    mean_B1 = d_BB.sum(-1, keepdim=True) / max(rows - 1, 1)
    spread_B = ((d_BB - mean_B1).square() * others_BB).sum(-1)
    return (2.0 * spread_B.mean() / (rows - 2) if rows > 2 else 0.0 * spread_B.sum()), _one(s_BB)


def pkt(student: Tensor, teacher: Tensor, *, mask: Tensor, pooling: Pooling = "mean") -> SumCount:
    """KL between which rows are near to which: p_ij = (cos_ij + 1) / sum_k (cos_ik + 1) (PKT, 1803.10837, equation 6).

    Mean over rows i of KL(p^T_i. || p^S_i.); the authors' code averages over the B^2 entries instead, B times less.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        pooling: What stands for a row.
    """
    units = [F.normalize(rows, dim=-1, eps=_NEAR) for rows in _pooled(student, teacher, mask, pooling)]
    nearness = [((unit @ unit.T + 1.0) / 2.0).clamp(min=_NEAR) for unit in units]
    q_BB, p_BB = (near / near.sum(-1, keepdim=True) for near in nearness)
    return (p_BB * (p_BB.log() - q_BB.log())).sum(-1).mean(), _one(q_BB)


def candidates_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor,
    temperature: float = 1.0,
    pooling: Pooling = "mean",
    metric: Similarity = "cosine",
) -> SumCount:
    """KL between the rankings of the other rows: T^2 * mean_i KL(softmax_j(t_ij / T) || softmax_j(s_ij / T)), j not i.

    sentence-transformers' `DistillKLDivLoss`, every other row of the batch a candidate of each. Needs three rows; with
    fewer there is nothing to rank, and the loss is 0.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        temperature: T > 0.
        pooling: What stands for a row.
        metric: What s and t are: `cosine` or `dot`.

    Raises:
        ObjectiveError: The temperature is not above 0.
    """
    check_temperature(temperature)
    itself_BB = torch.eye(len(student), dtype=torch.bool, device=student.device)
    log_q_BB, log_p_BB = (
        (_similarities(rows, metric) / temperature).masked_fill(itself_BB, -1e9).log_softmax(-1)
        for rows in _pooled(student, teacher, mask, pooling)
    )
    each_B = (log_p_BB.exp() * (log_p_BB - log_q_BB)).masked_fill(itself_BB, 0.0).sum(-1)
    return temperature**2 * each_B.mean(), _one(each_B)


def contrastive(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor,
    temperature: float = 0.1,
    pooling: Pooling = "mean",
    targets: Literal["soft", "hard"] = "soft",
    memory: Tensor | None = None,
) -> SumCount:
    """Each student row finds its place among the teacher's rows: KL over rows j of softmax(cos(., t_j) / T).

    `soft` targets are the teacher's own similarities, softmax_j(cos(t_i, t_j) / T) (SEED, 2101.04731): 0 where the
    student is the teacher. `hard` targets are the row itself, -log q_ii (InfoNCE, 1807.03748; in the manner of CRD,
    1910.10699, with a softmax for its binary critic): at equality neither 0 nor at rest, since rows still push each
    other away. Rows j are those of the batch and, after them, those of `memory`.

    Args:
        student: (B, L, H), projected to the teacher's width.
        teacher: (B, L, H).
        mask: (B, L).
        temperature: T > 0.
        pooling: What stands for a row.
        targets: What a row should look like.
        memory: (M, H) teacher rows of earlier batches; as `hard` negatives, those that equal a row's own are left out.

    Raises:
        ObjectiveError: The temperature is not above 0.
    """
    check_temperature(temperature)
    s_BH, t_BH = (F.normalize(rows, dim=-1, eps=_NEAR) for rows in _pooled(student, teacher, mask, pooling))
    all_NH = t_BH if memory is None else torch.cat([t_BH, F.normalize(memory.detach().float(), dim=-1, eps=_NEAR)])
    near_BN, known_BN = s_BH @ all_NH.T, t_BH @ all_NH.T
    if targets == "hard":
        again_BN = known_BN > 1.0 - 1e-5  # the same text, seen an epoch ago
        again_BN[:, : len(t_BH)] = False
        near_BN = near_BN.masked_fill(again_BN, -torch.inf)
        return -(near_BN / temperature).log_softmax(-1).diagonal().mean(), _one(near_BN)
    log_q_BN, log_p_BN = ((values / temperature).log_softmax(-1) for values in (near_BN, known_BN))
    return (log_p_BN.exp() * (log_p_BN - log_q_BN)).sum(-1).mean(), _one(log_q_BN)


def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    scored: Tensor,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> SumCount:
    """1 - Pearson correlation of probabilities, over the classes of a row and over the rows of a class (2205.10536).

    T^2 (inter * mean_i (1 - r(q_i., p_i.)) + intra * mean_c (1 - r(q_.c, p_.c))): only the order and the spacing of
    probabilities count, so a much stronger teacher does not overwhelm its student. T^2 is the authors' code's; since a
    correlation does not shrink with T, the loss grows with it.

    Args:
        student: Logits, the leading dimensions of `scored` by classes.
        teacher: The same shape.
        scored: bool; which rows of logits count.
        temperature: T > 0.
        inter: Weight of the relation between classes.
        intra: Weight of the relation between rows; a batch of fewer than two rows has none.

    Raises:
        ObjectiveError: The shapes differ or the temperature is not above 0.
    """
    same_shape(student, teacher)
    check_temperature(temperature)
    q_NC = (student[scored].float() / temperature).softmax(-1)
    p_NC = (teacher[scored].float().detach() / temperature).softmax(-1)
    if not len(q_NC):
        return q_NC.sum(), _one(q_NC)
    loss = inter * (1.0 - _pearson(q_NC, p_NC)).mean()
    if len(q_NC) > 1:
        loss = loss + intra * (1.0 - _pearson(q_NC.T, p_NC.T)).mean()
    return temperature**2 * loss, _one(q_NC)


def _pooled(student: Tensor, teacher: Tensor, mask: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    return pool(student, mask, pooling), pool(teacher.detach(), mask, pooling)


def _similarities(rows_BH: Tensor, metric: Similarity) -> Tensor:
    """(B, B)."""
    if metric == "cosine":
        rows_BH = F.normalize(rows_BH, dim=-1, eps=_NEAR)
    return rows_BH @ rows_BH.T


def _pearson(one: Tensor, other: Tensor) -> Tensor:
    """Correlation of each row, (N,)."""
    mine, theirs = (values - values.mean(-1, keepdim=True) for values in (one, other))
    return F.cosine_similarity(mine, theirs, dim=-1, eps=1e-8)


def _distances(rows_BH: Tensor) -> Tensor:
    """Euclidean, divided by their mean over pairs that are apart."""
    squares_BB = (rows_BH.unsqueeze(1) - rows_BH.unsqueeze(0)).square().sum(-1)
    apart_BB = squares_BB > _NEAR**2
    # The root's gradient is infinite at 0: rows that coincide get none.
    distances_BB = torch.where(apart_BB, squares_BB.clamp(min=_NEAR**2).sqrt(), 0.0)
    return distances_BB / (distances_BB.sum() / apart_BB.sum().clamp(min=1)).clamp(min=_NEAR)


def _angles(rows_BH: Tensor) -> Tensor:
    """(B, B, B): cosine at row j between rows i and k, at [j, i, k]."""
    towards_BBH = rows_BH.unsqueeze(0) - rows_BH.unsqueeze(1)
    squares_BB1 = towards_BBH.square().sum(-1, keepdim=True)
    apart_BB1 = squares_BB1 > _NEAR**2
    units_BBH = torch.where(apart_BB1, towards_BBH * squares_BB1.clamp(min=_NEAR**2).rsqrt(), 0.0)
    return units_BBH @ units_BBH.transpose(1, 2)


def _apart(rows: int, like: Tensor) -> Tensor:
    """1 for pairs of different rows, 0 on the diagonal."""
    return 1.0 - torch.eye(rows, device=like.device)


def _mean(values: Tensor, counted: Tensor) -> SumCount:
    return (values * counted).sum() / counted.sum().clamp(min=1.0), _one(values)


def _one(like: Tensor) -> Tensor:
    return torch.ones((), device=like.device)
