"""What of a teacher's answers is written down, within a budget of bytes, and what is asked again at every step.

Logits are always kept. All other features are kept in fp16 where they fit, else in int8, else they are live: the
teacher runs beside the student, and its logits still come from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from distill.cache.index import Rows, row_lengths
from distill.cache.shards import SCALE, WIDE
from distill.cache.top_k import IDS, TOP, keep_top
from distill.errors import CacheError

Kept = Literal["fp16", "int8", "live"]
Collate = Callable[[list[Mapping[str, Any]]], Mapping[str, Tensor]]

ON_LOGITS = frozenset({"logits", IDS, TOP})
"""Features that are always kept."""


class Recorded(Protocol):
    """A teacher that runs, or one that stands for it."""

    @property
    def taps(self) -> frozenset[str]:
        """Names of the features it gives."""

    def features(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tap for the rows of `batch`."""


@dataclass(frozen=True)
class Need:
    """Bytes that a cache of some rows takes, headers of its files left out (300 bytes a shard).

    Attributes:
        logits: Of the logits, or of their likeliest classes.
        fp16: Of all other features in fp16.
        int8: Of the same in int8, with their scales.
        taps: Names of those features.
    """

    logits: int
    fp16: int
    int8: int
    taps: tuple[str, ...]

    def choose(self, budget: int) -> tuple[Kept, str]:
        """What to do with the features within `budget` bytes (0 for no limit), and a line that says why.

        Raises:
            CacheError: The logits alone do not fit.
        """
        allowed = f"cache.max_bytes allows {size(budget)}"
        if budget and self.logits > budget:
            raise CacheError(
                f"the logits alone take {size(self.logits)}, {allowed}",
                where="cache.max_bytes",
                fix="Raise it, or keep the likeliest classes alone: cache.top_k.",
            )
        if not self.taps:
            return "fp16", f"teacher cache: logits, {size(self.logits)}"
        names = ", ".join(self.taps)
        if not budget or self.logits + self.fp16 <= budget:
            limit = allowed if budget else "no limit is set"
            return "fp16", f"teacher cache: logits and {names} in fp16, {size(self.logits + self.fp16)}; {limit}"
        wanted = f"in fp16 they would take {size(self.fp16)}"
        if self.logits + self.int8 <= budget:
            return "int8", (
                f"teacher cache: logits, and {names} in int8, {size(self.logits + self.int8)}; {wanted}, {allowed}"
            )
        return "live", (
            f"teacher cache: logits alone, {size(self.logits)}; the teacher runs at every step for {names}: "
            f"{wanted}, in int8 {size(self.int8)}, {allowed}"
        )


def measure_need(teacher: Recorded, encoded: Rows, collate: Collate, top_k: int = 0) -> Need:
    """What a cache of these rows would take, from one answer of the teacher.

    Args:
        teacher: Asked about the first row.
        encoded: The rows.
        collate: Rows to a batch of tensors.
        top_k: Classes of the teacher's logits that are kept; 0 for all.
    """
    tokens_R = row_lengths(encoded)
    rows, tokens, squares = len(tokens_R), int(tokens_R.sum()), int((tokens_R**2).sum())
    found = {"logits": 0, "fp16": 0, "int8": 0}
    features, classes = dict(teacher.features(collate([encoded[0]]))), 0
    if top_k and "logits" in features:
        logits = features.pop("logits")
        features, classes = features | keep_top(logits, top_k), logits.shape[-1]
    for tap, value in features.items():
        numbers = value.shape[-1] * (rows if value.ndim <= 2 else tokens)
        scales = tokens if value.ndim == 3 else rows
        if value.ndim == 4:
            numbers, scales = value.shape[1] * squares, value.shape[1] * tokens
        if tap in ON_LOGITS:
            short = classes <= WIDE if tap == IDS else tap == TOP and value.ndim > 2
            found["logits"] += numbers * (2 if short else 4)
        else:
            found["fp16"] += 2 * numbers
            found["int8"] += numbers + 2 * scales
    return Need(**found, taps=tuple(sorted(set(teacher.taps) - ON_LOGITS)))


def size(count: int) -> str:
    """Bytes as a person reads them."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.2f} {unit}"
    return f"{count} bytes"


class QuantisedTeacher:
    """A teacher whose features other than logits go to int8: a scale for each token, of scores for each row.

    A value moves by at most half a step, 1/254 of the largest magnitude of its token.

    Args:
        teacher: Live.
    """

    def __init__(self, teacher: Recorded) -> None:
        self._teacher = teacher
        self.taps = frozenset(teacher.taps) | {tap + SCALE for tap in teacher.taps - ON_LOGITS}

    def features(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tap, int8, and its scale under the name with `.scale` behind."""
        result: dict[str, Tensor] = {}
        for tap, value in self._teacher.features(batch).items():
            if tap in ON_LOGITS:
                result[tap] = value
            else:
                result[tap], result[tap + SCALE] = quantise(value, batch["attention_mask"].to(value.device).bool())
        return result


def quantise(value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """int8 with a scale for each vector of the last dimension.

    Args:
        value: (B, L, H), or (B, A, L, L).
        mask: (B, L) bool; scores for padding do not widen a row's steps.

    Returns:
        The same shape in int8, and the scales (B, L, 1) or (B, L, A): value is about number * scale. A vector with a
        number that is not finite has such a scale.
    """
    counted = value.float() if value.ndim == 3 else value.float().masked_fill(~mask[:, None, None, :], 0.0)
    step = counted.abs().amax(-1, keepdim=True) / 127
    half = step.half().float()  # what is written: numbers are rounded to the steps that are read
    step = half.where(half.isfinite(), step)
    numbers = (value.float() / step.clamp(min=1e-12)).round().clamp(-127, 127).to(torch.int8)
    return numbers, step if value.ndim == 3 else step.squeeze(-1).transpose(1, 2)


class MixedTeacher:
    """Logits from a cache, all else from a teacher that runs in the same step.

    The teacher reads its own token ids, found by `example`: a student with a smaller vocabulary numbers its tokens
    otherwise.

    Args:
        cached: Gives the logits.
        live: Gives the rest.
        encoded: The transfer set as the teacher reads it.
        collate: Its rows to a batch of tensors.
    """

    def __init__(self, cached: Recorded, live: Recorded, encoded: Rows, collate: Collate) -> None:
        self._cached, self._live, self._encoded, self._collate = cached, live, encoded, collate
        self._first = int(encoded[0]["example"])
        self.taps = frozenset(cached.taps) | frozenset(live.taps)
        self.nbytes = int(getattr(cached, "nbytes", 0))

    def features(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tap for the rows of `batch`, on its device."""
        rows = [self._encoded[example - self._first] for example in batch["example"].tolist()]
        own = {name: value.to(batch["attention_mask"].device) for name, value in self._collate(rows).items()}
        return {**self._cached.features(batch), **self._live.features(own)}
