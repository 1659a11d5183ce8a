"""Losses on logits. Shapes: logits_NC are the rows of logits that the task scores, (B, C) or (B, L, C) before that.

Each returns (sum over valid rows, number of valid rows) in fp32; no gradient reaches the teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.errors import ObjectiveError
from distill.objectives.base import SumCount, has_label


def soft_labels(
    student: Tensor,
    teacher: Tensor,
    *,
    scored: Tensor,
    temperature: float | Tensor = 4.0,
    standardise: bool = False,
    convention: Literal["distill", "textbrewer", "tinybert"] = "distill",
) -> SumCount:
    """KL divergence from the teacher's softened distribution to the student's.

    T^2 * sum_i sum_c p_ic (log p_ic - log q_ic), p = softmax(t / T), q = softmax(s / T), divided by the scored rows.
    T^2 keeps the gradient's size comparable to that of hard labels (Hinton et al., 1503.02531).

    Args:
        student: Logits, the leading dimensions of `scored` by classes.
        teacher: The same shape.
        scored: bool; which rows of logits count.
        temperature: T > 0; a tensor of the shape of `scored` gives each row its own.
        standardise: First bring each row of both to mean 0 and deviation 1 (1e-7 against division by zero), as in
            logit standardisation (2403.01427).
        convention: `textbrewer` is cross-entropy without T^2 (kd_ce_loss); `tinybert` is cross-entropy averaged over
            rows and classes (soft_cross_entropy). Both keep the teacher's entropy, so they are not 0 at equality.

    Raises:
        ObjectiveError: The shapes differ or the temperature is not above 0.
    """
    _same_shape(student, teacher)
    student_NC, teacher_NC = student[scored].float(), teacher[scored].float().detach()
    if standardise:
        student_NC, teacher_NC = _standardised(student_NC), _standardised(teacher_NC)
    t_N1 = _temperature(temperature, scored, student_NC)
    log_q_NC = (student_NC / t_N1).log_softmax(-1)
    log_p_NC = (teacher_NC / t_N1).log_softmax(-1)
    p_NC = log_p_NC.exp()
    count = scored.sum().float()
    if convention == "textbrewer":
        return -(p_NC * log_q_NC).sum(), count
    if convention == "tinybert":
        return -(p_NC * log_q_NC).sum() / student_NC.shape[-1], count
    return ((t_N1**2) * p_NC * (log_p_NC - log_q_NC)).sum(), count


def hard_labels(student: Tensor, teacher: Tensor | None, *, labels: Tensor, scored: Tensor) -> SumCount:
    """Cross-entropy with the gold labels, over scored rows that have one.

    Args:
        student: Logits.
        teacher: Not read.
        labels: int64 of the shape of `scored`, -100 where there is none.
        scored: bool; which rows of logits count.
    """
    chosen = has_label(labels) & scored
    return F.cross_entropy(student[chosen].float(), labels[chosen], reduction="sum"), chosen.sum().float()


def soft_labels_multilabel(
    student: Tensor, teacher: Tensor, *, scored: Tensor, temperature: float | Tensor = 1.0
) -> SumCount:
    """Bernoulli KL of each class, averaged over classes: T^2 / C * sum_i sum_c KL(sigmoid(t / T) || sigmoid(s / T)).

    Args:
        student: Logits, one a class.
        teacher: The same shape.
        scored: bool; which rows of logits count.
        temperature: T > 0.

    Raises:
        ObjectiveError: The shapes differ or the temperature is not above 0.
    """
    _same_shape(student, teacher)
    student_NC, teacher_NC = student[scored].float(), teacher[scored].float().detach()
    t_N1 = _temperature(temperature, scored, student_NC)
    p_NC = (teacher_NC / t_N1).sigmoid()
    cross = F.binary_cross_entropy_with_logits(student_NC / t_N1, p_NC, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher_NC / t_N1, p_NC, reduction="none")
    return ((t_N1**2) * (cross - entropy)).mean(-1).sum(), scored.sum().float()


def regression(student: Tensor, teacher: Tensor, *, scored: Tensor) -> SumCount:
    """Squared difference to the teacher's outputs, averaged over them: sum_i mean_c (s_ic - t_ic)^2.

    Raises:
        ObjectiveError: The shapes differ.
    """
    _same_shape(student, teacher)
    squares_NC = (student[scored].float() - teacher[scored].float().detach()).square()
    return squares_NC.mean(-1).sum(), scored.sum().float()


def _temperature(temperature: float | Tensor, scored: Tensor, like: Tensor) -> Tensor:
    """(N, 1) for a temperature of each row, else a scalar."""
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature[scored].to(like).detach().unsqueeze(-1)
    if not float(temperature) > 0.0:
        raise ObjectiveError(
            f"temperature must be above 0; got {float(temperature):g}", where="objective", fix="Set it to 1 or more."
        )
    return torch.as_tensor(float(temperature), dtype=like.dtype, device=like.device)


def _standardised(logits_NC: Tensor) -> Tensor:
    centred = logits_NC - logits_NC.mean(-1, keepdim=True)
    return centred / (logits_NC.std(-1, keepdim=True) + 1e-7)


def _same_shape(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ObjectiveError(
            f"the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            where="objective",
            fix="Both need the same labels.",
        )
