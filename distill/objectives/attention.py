"""Losses on attention: scores, distributions, and relations between tokens.

Shapes: scores_BALL are pre-softmax, divided by sqrt(d), without mask; states_BLH hold all heads side by side; `mask`
(B, L) is 1 at tokens. Masked keys get no probability, masked queries are not counted; where models are causal, keys
behind a query get none either. Each returns (sum, number of tokens) in fp32; no gradient reaches the teacher.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from distill.errors import ObjectiveError
from distill.objectives.base import SumCount

Heads = Literal["each", "mean", "sum"]
"""Scores head by head, or merged over heads first: the numbers of heads may then differ."""


def attention_mse(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor,
    heads: Heads = "each",
    causal: bool = False,
    convention: Literal["distill", "tinybert", "textbrewer"] = "distill",
) -> SumCount:
    """Squared difference of the scores, averaged over heads and over valid keys, summed over valid queries.

    Args:
        student: (B, A, L, L).
        teacher: (B, A, L, L), as many heads unless they are merged.
        mask: (B, L).
        heads: `mean` and `sum` merge the scores over heads first (TextBrewer's `att_mse_sum_loss`).
        causal: Keys behind a query are not valid.
        convention: `tinybert` (1909.10351) averages over all B * A * L * L pairs; scores of masked keys, which are
            below -100 there, count as 0 in both. `textbrewer` averages over heads and over all valid pairs of the
            batch, sum_b n_b^2 (att_mse_loss).

    Raises:
        ObjectiveError: The numbers of heads differ.
    """
    student, teacher = _merged(student, heads), _merged(teacher.detach(), heads)
    _same_heads(student, teacher)
    keys_BLL = _keys(mask, causal).float().expand(-1, mask.shape[1], -1)
    pairs_BLL = keys_BLL * mask.float().unsqueeze(2)
    squares_BLL = (student.float() - teacher.float()).square().mean(1)
    if convention == "textbrewer":
        return (squares_BLL * pairs_BLL).sum(), pairs_BLL.sum()
    if convention == "tinybert":
        batch, length = mask.shape
        return (squares_BLL * keys_BLL).sum() / length, student.new_tensor(float(batch * length), dtype=torch.float32)
    return (squares_BLL * pairs_BLL / keys_BLL.sum(-1, keepdim=True).clamp(min=1)).sum(), mask.sum().float()


def attention_kl(
    student: Tensor, teacher: Tensor, *, mask: Tensor, heads: Heads = "each", causal: bool = False
) -> SumCount:
    """KL divergence of each query's attention, averaged over heads (MiniLM, 2002.10957, equation 2).

    Args:
        student: (B, A, L, L).
        teacher: (B, A, L, L), as many heads unless they are merged.
        mask: (B, L).
        heads: `mean` and `sum` merge the scores over heads before the softmax.
        causal: Keys behind a query are not valid.

    Raises:
        ObjectiveError: The numbers of heads differ.
    """
    student, teacher = _merged(student, heads), _merged(teacher, heads)
    _same_heads(student, teacher)
    return _divergence(student, teacher.detach(), mask, causal=causal)


def attention_ce(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor,
    heads: Heads = "each",
    causal: bool = False,
    convention: Literal["distill", "mobilebert"] = "distill",
) -> SumCount:
    """Cross-entropy of each query's attention, averaged over heads (MobileBERT, 2004.02984): the same gradient as KL.

    Args:
        student: (B, A, L, L).
        teacher: (B, A, L, L), as many heads unless they are merged.
        mask: (B, L).
        heads: `mean` and `sum` merge the scores over heads before the softmax (TextBrewer's `att_ce_mean_loss`).
        causal: Keys behind a query are not valid.
        convention: `mobilebert` counts padded queries as well and divides by B * L (run_pretraining.py).

    Raises:
        ObjectiveError: The numbers of heads differ.
    """
    student, teacher = _merged(student, heads), _merged(teacher, heads)
    _same_heads(student, teacher)
    log_q_BALL = _masked(student.float(), mask, causal).log_softmax(-1)
    p_BALL = _masked(teacher.float().detach(), mask, causal).softmax(-1)
    each_BL = -(p_BALL * log_q_BALL).sum(-1).mean(1)
    if convention == "mobilebert":
        return each_BL.sum(), _positions(mask)
    return (each_BL * mask).sum(), mask.sum().float()


def relation(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor,
    relation_heads: int = 0,
    convention: Literal["distill", "paddle"] = "distill",
) -> SumCount:
    """KL divergence of the self-relations softmax(X X^T / sqrt(d)) of queries, keys or values (MiniLMv2, 2012.15828).

    All heads are joined and split anew into R heads of H / R, so neither widths nor heads need agree. With R the
    models' own heads and values alone it is the value relation of MiniLM v1 (2002.10957, equation 3).

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        relation_heads: R; 0 takes the largest number up to 48 that divides both widths into heads of 8 or more.
        convention: `paddle` counts padded queries as well and divides by B * L (calc_minilm_loss).

    Raises:
        ObjectiveError: R does not divide both widths.
    """
    heads = relation_heads or shared_heads(student.shape[-1], teacher.shape[-1])
    scores = [_self_relation(states, heads) for states in (student.float(), teacher.float().detach())]
    if convention == "paddle":
        total, _ = _divergence(scores[0], scores[1], mask, every_query=True)
        return total, _positions(mask)
    return _divergence(scores[0], scores[1], mask)


def head_relation(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor,
    relation_heads: int = 0,
    convention: Literal["distill", "paddle"] = "distill",
) -> SumCount:
    """KL divergence of the relations between the heads of one token (PP-MiniLM's head-head relation).

    Queries, keys or values are split into R heads as for `relation`; at each token softmax(X X^T / sqrt(d)) then runs
    over its heads, R x R.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        relation_heads: R, 2 or more; 0 takes the largest number up to 48 that divides both widths into heads of 8 or
            more.
        convention: `paddle` counts padding as well and divides by B * L (calc_multi_relation_loss).

    Raises:
        ObjectiveError: R does not divide both widths, or is 1.
    """
    heads = relation_heads or shared_heads(student.shape[-1], teacher.shape[-1])
    if heads < 2:
        raise ObjectiveError(
            f"{heads} relation head has no other head to relate to",
            where="objective",
            fix="Set relation_heads to 2 or more, or take the relation between tokens.",
        )
    log_q_BLRR, log_p_BLRR = (
        (split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])).log_softmax(-1)
        for split in (_split(states, heads).transpose(1, 2) for states in (student.float(), teacher.float().detach()))
    )
    each_BL = (log_p_BLRR.exp() * (log_p_BLRR - log_q_BLRR)).sum(-1).mean(-1)
    if convention == "paddle":
        return each_BL.sum(), _positions(mask)
    # Padding may hold anything, so it is replaced and not multiplied away.
    return torch.where(mask > 0, each_BL, 0.0).sum(), mask.sum().float()


def sample_relation(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor,
    relation_heads: int = 0,
    convention: Literal["distill", "paddle"] = "distill",
) -> SumCount:
    """KL divergence of the relations between rows of the batch, position by position (PP-MiniLM).

    Queries, keys or values are split into R heads as for `relation`; at each position softmax(X X^T / sqrt(d)) then
    runs over the rows that have a token there. The value depends on which rows share a batch.

    Args:
        student: (B, L, H of the student).
        teacher: (B, L, H of the teacher).
        mask: (B, L).
        relation_heads: R; 0 takes the largest number up to 48 that divides both widths into heads of 8 or more.
        convention: `paddle` lets every row take part at every position, padding too, and divides by B * L
            (calc_multi_relation_loss, whose mask falls on whole rows of the softmax and so changes nothing).

    Raises:
        ObjectiveError: R does not divide both widths.
    """
    everywhere = torch.ones_like(mask) if convention == "paddle" else mask
    # Rows take the place of positions, and positions that of rows.
    return relation(
        student.transpose(0, 1), teacher.transpose(0, 1), mask=everywhere.transpose(0, 1), relation_heads=relation_heads
    )


def shared_heads(student: int, teacher: int) -> int:
    """The most heads up to 48 (MiniLMv2, 2012.15828) that divide both widths and are 8 wide or more in the narrower."""
    shared, narrower = math.gcd(student, teacher), min(student, teacher)
    return max(heads for heads in range(1, 49) if shared % heads == 0 and (heads == 1 or narrower // heads >= 8))


def _self_relation(states_BLH: Tensor, heads: int) -> Tensor:
    split_BRLD = _split(states_BLH, heads)
    return split_BRLD @ split_BRLD.transpose(-1, -2) / math.sqrt(split_BRLD.shape[-1])


def _split(states_BLH: Tensor, heads: int) -> Tensor:
    """(B, R, L, d): the width cut into R heads.

    Raises:
        ObjectiveError: R does not divide it.
    """
    batch, length, width = states_BLH.shape
    if width % heads:
        divisors = [number for number in range(1, 65) if width % number == 0]
        raise ObjectiveError(
            f"{heads} relation heads do not divide a width of {width}",
            where="objective",
            fix=f"Set relation_heads to one of {', '.join(map(str, divisors))}.",
        )
    return states_BLH.reshape(batch, length, heads, width // heads).transpose(1, 2)


def _positions(mask: Tensor) -> Tensor:
    """B * L: what code divides by that counts padding."""
    return mask.new_tensor(float(mask.numel()), dtype=torch.float32)


def _divergence(
    student: Tensor, teacher: Tensor, mask: Tensor, *, every_query: bool = False, causal: bool = False
) -> SumCount:
    """KL over keys, averaged over heads, summed over queries."""
    log_q_BALL = _masked(student.float(), mask, causal).log_softmax(-1)
    log_p_BALL = _masked(teacher.float(), mask, causal).log_softmax(-1)
    each_BL = (log_p_BALL.exp() * (log_p_BALL - log_q_BALL)).sum(-1).mean(1)
    return (each_BL if every_query else each_BL * mask).sum(), mask.sum().float()


def _masked(scores_BALL: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """Scores with -1e9 at masked keys: a row without any valid key stays finite."""
    return scores_BALL.masked_fill(~_keys(mask, causal)[:, None], -1e9)


def _keys(mask: Tensor, causal: bool) -> Tensor:
    """(B, 1, L), or (B, L, L) of queries and keys where models are causal: whether a key may be attended to."""
    keys_B1L = mask[:, None, :] != 0
    length = mask.shape[1]
    return keys_B1L & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril() if causal else keys_B1L


def _merged(scores_BALL: Tensor, heads: Heads) -> Tensor:
    if heads == "each":
        return scores_BALL
    scores_BALL = scores_BALL.float()
    return scores_BALL.mean(1, keepdim=True) if heads == "mean" else scores_BALL.sum(1, keepdim=True)


def _same_heads(student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise ObjectiveError(
            f"the student has {student.shape[1]} heads, the teacher {teacher.shape[1]}",
            where="objective",
            fix="Set heads to mean, or use query_relation, key_relation and value_relation, which need no equal heads.",
        )
