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
    labels: Tensor | None = None,
    temperature: float | Tensor = 4.0,
    standardise: bool = False,
    shift: bool = False,
    convention: Literal["distill", "textbrewer", "tinybert", "modelopt"] = "distill",
) -> SumCount:
    """KL divergence from the teacher's softened distribution to the student's.

    T^2 * sum_i sum_c p_ic (log p_ic - log q_ic), p = softmax(t / T), q = softmax(s / T), divided by the scored rows.
    T^2 keeps the gradient's size comparable to that of hard labels (Hinton et al., 1503.02531).

    Args:
        student: Logits, the leading dimensions of `scored` by classes; -inf in both rules a class out.
        teacher: The same shape.
        scored: bool; which rows of logits count.
        labels: int64 of the shape of `scored`, -100 where there is none; read by `shift` alone.
        temperature: T > 0; a tensor of the shape of `scored` gives each row its own.
        standardise: First bring each row of both to mean 0 and deviation 1 (1e-7 against division by zero), as in
            logit standardisation (2403.01427).
        shift: Where the teacher is wrong about a row with a gold label, exchange its highest logit with the label's
            (probability shift, 1911.07471).
        convention: `textbrewer` is cross-entropy without T^2 (kd_ce_loss); `tinybert` is cross-entropy averaged over
            rows and classes (soft_cross_entropy). Both keep the teacher's entropy, so they are not 0 at equality.
            `modelopt` is KL averaged over rows and classes, with T^2.

    Raises:
        ObjectiveError: The shapes differ, the temperature is not above 0, or `shift` has no labels of classes.
    """
    same_shape(student, teacher)
    student_NC, teacher_NC = student[scored].float(), teacher[scored].float().detach()
    if shift:
        teacher_NC = _shifted(teacher_NC, labels, scored)
    if standardise:
        student_NC, teacher_NC = _standardised(student_NC), _standardised(teacher_NC)
    t_N1 = row_temperature(temperature, scored, student_NC)
    log_q_NC, log_p_NC = log_probabilities(student_NC / t_N1), log_probabilities(teacher_NC / t_N1)
    p_NC = log_p_NC.exp()
    count = scored.sum().float()
    if convention == "textbrewer":
        return -(p_NC * log_q_NC).sum(), count
    if convention == "tinybert":
        return -(p_NC * log_q_NC).sum() / student_NC.shape[-1], count
    total = ((t_N1**2) * p_NC * (log_p_NC - log_q_NC)).sum()
    return total / student_NC.shape[-1] if convention == "modelopt" else total, count


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
    same_shape(student, teacher)
    student_NC, teacher_NC = student[scored].float(), teacher[scored].float().detach()
    t_N1 = row_temperature(temperature, scored, student_NC)
    p_NC = (teacher_NC / t_N1).sigmoid()
    cross = F.binary_cross_entropy_with_logits(student_NC / t_N1, p_NC, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(teacher_NC / t_N1, p_NC, reduction="none")
    return ((t_N1**2) * (cross - entropy)).mean(-1).sum(), scored.sum().float()


def regression(student: Tensor, teacher: Tensor, *, scored: Tensor) -> SumCount:
    """Squared difference to the teacher's outputs, averaged over them: sum_i mean_c (s_ic - t_ic)^2.

    Raises:
        ObjectiveError: The shapes differ.
    """
    same_shape(student, teacher)
    squares_NC = (student[scored].float() - teacher[scored].float().detach()).square()
    return squares_NC.mean(-1).sum(), scored.sum().float()


def regression_labels(student: Tensor, teacher: Tensor | None, *, labels: Tensor, scored: Tensor) -> SumCount:
    """Squared difference to the gold values, over scored rows that have one.

    Args:
        student: Outputs, (N, 1).
        teacher: Not read.
        labels: Floating point (N,), nan where there is none.
        scored: bool (N,); which rows count.
    """
    chosen = has_label(labels) & scored
    return (student[chosen].float().squeeze(-1) - labels[chosen].float()).square().sum(), chosen.sum().float()


def multilabel_labels(student: Tensor, teacher: Tensor | None, *, labels: Tensor, scored: Tensor) -> SumCount:
    """Binary cross-entropy of each class with the gold labels, over all classes of scored rows that have labels.

    Args:
        student: Logits, (N, C).
        teacher: Not read.
        labels: Floating point (N, C), 0 or 1, nan where there is none.
        scored: bool (N,); which rows count.
    """
    chosen = has_label(labels) & scored.unsqueeze(-1)
    loss = F.binary_cross_entropy_with_logits(student[chosen].float(), labels[chosen].float(), reduction="sum")
    return loss, chosen.sum().float()


def soft_spans(
    student: Tensor,
    teacher: Tensor,
    *,
    scored: Tensor,
    inside: Tensor,
    temperature: float | Tensor = 4.0,
    convention: Literal["distill", "distilbert"] = "distill",
) -> SumCount:
    """`soft_labels` over the tokens of a text: one distribution of starts, one of ends.

    Args:
        student: Logits (B, L, 2).
        teacher: The same shape.
        scored: bool (B, 2); which starts and ends count.
        inside: bool (B, L); tokens at which an answer may start or end, the others are ruled out.
        temperature: T > 0.
        convention: `distilbert` rules nothing out: padding and the question take probability too
            (run_squad_w_distillation.py).

    Raises:
        ObjectiveError: The shapes differ or the temperature is not above 0.
    """
    same_shape(student, teacher)
    if convention == "distilbert":
        inside = torch.ones_like(inside)
    mine_B2L, theirs_B2L = _over_tokens(student, inside), _over_tokens(teacher, inside)
    return soft_labels(mine_B2L, theirs_B2L, scored=scored, temperature=temperature)


def span_labels(student: Tensor, teacher: Tensor | None, *, labels: Tensor, scored: Tensor, inside: Tensor) -> SumCount:
    """Cross-entropy with the gold start and the gold end, each over the tokens of a text.

    Args:
        student: Logits (B, L, 2).
        teacher: Not read.
        labels: int64 (B, 2), tokens; -100 where there is none.
        scored: bool (B, 2); which starts and ends count.
        inside: bool (B, L); tokens at which an answer may start or end, the others are ruled out.
    """
    return hard_labels(_over_tokens(student, inside), None, labels=labels, scored=scored)


def _over_tokens(logits_BL2: Tensor, inside_BL: Tensor) -> Tensor:
    return logits_BL2.float().masked_fill(~inside_BL.unsqueeze(-1), -torch.inf).transpose(1, 2)


def row_temperature(temperature: float | Tensor, scored: Tensor, like: Tensor) -> Tensor:
    """The temperature to divide scored rows by: (N, 1) for a temperature of each row, else a scalar."""
    if isinstance(temperature, Tensor) and temperature.dim():
        return temperature[scored].to(like).detach().unsqueeze(-1)
    check_temperature(float(temperature))
    return torch.as_tensor(float(temperature), dtype=like.dtype, device=like.device)


def log_probabilities(logits_NC: Tensor) -> Tensor:
    """Logarithms of the softmax, none below -1e4: classes ruled out by -inf then add 0 to a divergence, and not nan."""
    return logits_NC.log_softmax(-1).clamp(min=-1e4)


def check_temperature(temperature: float) -> None:
    """Refuses what divides by 0 or turns a loss upside down.

    Raises:
        ObjectiveError: It is not above 0.
    """
    if not temperature > 0.0:
        raise ObjectiveError(
            f"temperature must be above 0; got {temperature:g}", where="objective", fix="Set it to 1 or more."
        )


def _shifted(teacher_NC: Tensor, labels: Tensor | None, scored: Tensor) -> Tensor:
    """The teacher's logits, highest and gold exchanged; a row without a label stays as it is."""
    if labels is None or labels.is_floating_point() or labels.shape != scored.shape:
        raise ObjectiveError(
            "shift exchanges the teacher's highest logit with the gold label's; this batch has no labels of classes",
            where="objective",
            fix="Take shift = true away, or train on labelled rows.",
        )
    gold_N, highest_N = labels[scored], teacher_NC.argmax(-1)
    gold_N1 = torch.where(has_label(gold_N), gold_N, highest_N).unsqueeze(-1)
    highest_N1 = highest_N.unsqueeze(-1)
    swapped_NC = teacher_NC.scatter(-1, gold_N1, teacher_NC.gather(-1, highest_N1))
    return swapped_NC.scatter(-1, highest_N1, teacher_NC.gather(-1, gold_N1))


def _standardised(logits_NC: Tensor) -> Tensor:
    centred = logits_NC - logits_NC.mean(-1, keepdim=True)
    return centred / (logits_NC.std(-1, keepdim=True) + 1e-7)


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuses logits that would broadcast against each other.

    Raises:
        ObjectiveError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise ObjectiveError(
            f"the student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}",
            where="objective",
            fix="Both need the same labels.",
        )
