"""The k most probable classes of each row of logits, and one bucket for all the others.

A language model of 50,257 tokens says 201 kB about each token in fp32; its 64 likeliest ones take 258 bytes in a cache.
What is kept are two features in place of `logits`:

    logits.ids  (..., k)      int64: the kept classes, the likeliest first
    logits.top  (..., k + 1)  the logarithms of their probabilities, then that of all other classes together

Both sides of a loss are reduced to the same k + 1 classes, so each loss on distributions reads them as ordinary logits.
KL between the reduced distributions is never above the full one, and below it by p_rest * KL(p | rest, q | rest): what
the two say about the classes that were not kept. It is equal where all are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from distill.errors import ObjectiveError

IDS, TOP = "logits.ids", "logits.top"
"""Names of the two features."""

LEAST = -1e4
"""Stands for the logarithm of 0."""

_AT_ONCE = 1 << 26
"""Logits that are worked on together: 0.25 GB."""


class _Recorded(Protocol):
    @property
    def taps(self) -> frozenset[str]: ...

    def features(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class TopKTeacher:
    """A teacher whose logits are reduced to the k likeliest classes as soon as they are there; the rest is as it was.

    Args:
        teacher: Live; one that has no `logits` stays as it is.
        k: Classes to keep.
    """

    def __init__(self, teacher: _Recorded, k: int) -> None:
        self._teacher, self.k = teacher, k
        reduced = {IDS, TOP} if "logits" in teacher.taps else set()
        self.taps = (teacher.taps - {"logits"}) | reduced

    def features(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tap for the rows of `batch`: `logits.ids` and `logits.top` in place of `logits`."""
        features = dict(self._teacher.features(batch))
        logits = features.pop("logits", None)
        return features if logits is None else features | keep_top(logits, self.k)


def keep_top(logits: Tensor, k: int) -> dict[str, Tensor]:
    """Reduces a teacher's logits to the features `logits.ids` and `logits.top`.

    Args:
        logits: (..., C), of temperature 1.
        k: Classes to keep, at least 1; all where there are fewer.

    Returns:
        `logits.ids` (..., min(k, C)) int64 and `logits.top` (..., min(k, C) + 1) fp32, nan where a row has nan or
        +inf.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    k = min(k, flat.shape[-1])
    ids = torch.empty(len(flat), k, dtype=torch.int64, device=flat.device)
    top = torch.empty(len(flat), k + 1, device=flat.device)
    step = max(1, _AT_ONCE // flat.shape[-1])
    for begin in range(0, len(flat), step):
        part = flat[begin : begin + step].float()
        ids[begin : begin + step] = part.topk(k).indices
        top[begin : begin + step] = _reduced(part, ids[begin : begin + step])
    return {IDS: ids.view(*logits.shape[:-1], k), TOP: top.view(*logits.shape[:-1], k + 1)}


def reduce_both(student: Tensor, teacher: Mapping[str, Tensor], scored: Tensor) -> tuple[Tensor, Tensor]:
    """The student's logits and a reduced teacher's as two tensors of logits over the same k + 1 classes.

    A temperature then softens the k + 1 classes: at 1 the bucket is exact, above it all other classes count as one.

    Args:
        student: (..., C).
        teacher: With `logits.ids` and `logits.top`.
        scored: bool, the leading dimensions; other rows are left 0.

    Returns:
        Two tensors (..., k + 1); gradients reach the student.

    Raises:
        ObjectiveError: The teacher kept a class that the student does not have.
    """
    ids, top = teacher[IDS], teacher[TOP]
    most = int(ids.max()) if ids.numel() else -1
    if most >= student.shape[-1]:
        raise ObjectiveError(
            f"the teacher kept the answer {most}, the student has {student.shape[-1]} classes",
            where="objective",
            fix="Both need the same labels.",
        )
    reduced = torch.zeros(top.shape, device=student.device)
    reduced[scored] = _reduced(student[scored].float(), ids[scored])
    return reduced, top


def _reduced(logits_NC: Tensor, ids_NK: Tensor) -> Tensor:
    """(N, K + 1): logarithms of the probabilities of the named classes, then of all others."""
    log_p_NC = logits_NC.log_softmax(-1).clamp(min=LEAST)
    kept_NK = log_p_NC.gather(-1, ids_NK)
    if ids_NK.shape[-1] == logits_NC.shape[-1]:
        rest_N1 = torch.full_like(kept_NK[:, :1], LEAST)
    else:
        # Not -inf: where every other class is ruled out too, the gradient of the sum would be nan.
        rest_N1 = log_p_NC.scatter(-1, ids_NK, 2 * LEAST).logsumexp(-1, keepdim=True)
    return torch.cat([kept_NK, rest_N1], -1)
