"""Divergences between two distributions over the same classes or tokens, other than the usual one way round.

Written for language models, where covering all of a teacher (forward KL) and keeping to its main answers (reverse KL)
differ; they serve any logits. Shapes: logits_NC are the scored rows. Each returns (sum over scored rows, their number)
in fp32; no gradient reaches the teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.errors import ObjectiveError
from distill.objectives.base import SumCount
from distill.objectives.soft_labels import log_probabilities, row_temperature, same_shape


def jsd(
    student: Tensor, teacher: Tensor, *, scored: Tensor, temperature: float | Tensor = 1.0, mix: float = 0.5
) -> SumCount:
    """Generalised Jensen-Shannon divergence: mix * KL(p || m) + (1 - mix) * KL(q || m), m = mix * p + (1 - mix) * q.

    p is the teacher, q the student (GKD, 2306.13649; trl's `generalized_jsd_loss`, whose `beta` is `mix`). As there, 0
    is KL(p || q) and 1 is KL(q || p); next to either the loss is near 0, so a weight does not carry over.

    Args:
        student: Logits, the leading dimensions of `scored` by classes.
        teacher: The same shape.
        scored: bool; which rows of logits count.
        temperature: T > 0; a tensor of the shape of `scored` gives each row its own. No T^2, as in trl.
        mix: In [0, 1].

    Raises:
        ObjectiveError: The shapes differ, the temperature is not above 0, or `mix` is outside [0, 1].
    """
    if not 0.0 <= mix <= 1.0:
        raise ObjectiveError(
            f"mix must be between 0 and 1; got {mix:g}", where="objective", fix="Set it to 0.5 for equal shares."
        )
    log_q_NC, log_p_NC, _ = _both(student, teacher, scored, temperature)
    if mix in (0.0, 1.0):
        each_N = _kl(log_p_NC, log_q_NC) if mix == 0.0 else _kl(log_q_NC, log_p_NC)
    else:
        parts = torch.stack([log_p_NC + math.log(mix), log_q_NC + math.log1p(-mix)])
        log_m_NC = parts.logsumexp(0)
        each_N = mix * _kl(log_p_NC, log_m_NC) + (1.0 - mix) * _kl(log_q_NC, log_m_NC)
    return each_N.sum(), scored.sum().float()


def reverse_kl(student: Tensor, teacher: Tensor, *, scored: Tensor, temperature: float | Tensor = 1.0) -> SumCount:
    """T^2 * KL(q || p): the student is held to what the teacher thinks likely (MiniLLM, 2306.08543, a single step).

    Args:
        student: Logits, the leading dimensions of `scored` by classes.
        teacher: The same shape.
        scored: bool; which rows of logits count.
        temperature: T > 0; a tensor of the shape of `scored` gives each row its own.

    Raises:
        ObjectiveError: The shapes differ or the temperature is not above 0.
    """
    log_q_NC, log_p_NC, t_N1 = _both(student, teacher, scored, temperature)
    return (t_N1.square() * _kl(log_q_NC, log_p_NC).unsqueeze(-1)).sum(), scored.sum().float()


def total_variation(student: Tensor, teacher: Tensor, *, scored: Tensor, temperature: float | Tensor = 1.0) -> SumCount:
    """Half the sum of |p_c - q_c|: how much probability must move (f-DISTILL, 2307.15190). In [0, 1] a row.

    Args:
        student: Logits, the leading dimensions of `scored` by classes.
        teacher: The same shape.
        scored: bool; which rows of logits count.
        temperature: T > 0; a tensor of the shape of `scored` gives each row its own.

    Raises:
        ObjectiveError: The shapes differ or the temperature is not above 0.
    """
    log_q_NC, log_p_NC, _ = _both(student, teacher, scored, temperature)
    return 0.5 * (log_p_NC.exp() - log_q_NC.exp()).abs().sum(), scored.sum().float()


def _both(
    student: Tensor, teacher: Tensor, scored: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, C) of student and teacher, and the temperature as a scalar or (N, 1)."""
    same_shape(student, teacher)
    student_NC, teacher_NC = student[scored].float(), teacher[scored].float().detach()
    t_N1 = row_temperature(temperature, scored, student_NC)
    return log_probabilities(student_NC / t_N1), log_probabilities(teacher_NC / t_N1), t_N1


def _kl(log_one_NC: Tensor, log_other_NC: Tensor) -> Tensor:
    """KL(one || other) of each row, (N,)."""
    return (log_one_NC.exp() * (log_one_NC - log_other_NC)).sum(-1)
