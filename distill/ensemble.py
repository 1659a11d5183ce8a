"""Several teachers as one: their logits are averaged, everything else is the first one's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.errors import TeacherError
from distill.features import Features
from distill.labels import match_labels, numbered, rename_labels
from distill.readers import ImageReader
from distill.teacher import Checkpoint, LiveTeacher


class EnsembleTeacher:
    """Teachers that answer together: to the trainer and the cache the same as one.

    The logits are their weighted mean, as TextBrewer's MultiTeacherDistiller has it; hidden states and attention come
    from the first.

    Args:
        members: The first gives every tap, the others at least the logits.
        weights: One a member, not negative, not all zero; they are divided by their sum.
    """

    def __init__(self, members: Sequence[LiveTeacher], weights: Sequence[float]) -> None:
        self._members = list(members)
        total = sum(weights)
        self._shares = [weight / total for weight in weights]
        self.taps = self._members[0].taps

    @property
    def device(self) -> torch.device:
        """Where the first model is."""
        return self._members[0].device

    def features(self, batch: Mapping[str, Tensor]) -> Features:
        """Every tap for the rows of `batch`, as `LiveTeacher.features` gives them."""
        features = self._members[0].features(batch)
        if "logits" not in features:
            return features
        said = [features["logits"], *(member.features(batch)["logits"] for member in self._members[1:])]
        device = features["logits"].device
        mean = torch.stack([share * one.to(device) for share, one in zip(self._shares, said, strict=True)]).sum(0)
        return {**features, "logits": mean}


def join(first: Checkpoint, other: Checkpoint, label_map: Mapping[str, str]) -> None:
    """Puts the classes of another teacher into the first one's order; changes `other`.

    Args:
        first: Its labels, as the data calls them, are the ensemble's.
        other: Another teacher of the same task.
        label_map: Teacher label to data label, where the two are named differently.

    Raises:
        TeacherError: It has other labels, or its tokenizer reads texts otherwise.
    """
    if isinstance(first.tokenizer, ImageReader):
        if other.tokenizer_hash() != first.tokenizer_hash():
            raise TeacherError(
                f"its images are not read as those of {first.source}",
                where=other.source,
                fix="Teachers of one ensemble must share an image processor: leave it out of teacher.ensemble.",
            )
    elif other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
        raise TeacherError(
            f"its {len(other.tokenizer):,} tokens are not the {len(first.tokenizer):,} of {first.source}",
            where=other.source,
            fix="Teachers of one ensemble must share a tokenizer: leave it out of teacher.ensemble.",
        )
    elif _reading(other.tokenizer) != _reading(first.tokenizer):
        raise TeacherError(
            f"its tokenizer has the tokens of {first.source} and splits texts otherwise",
            where=other.source,
            fix="Teachers of one ensemble must share a tokenizer: leave it out of teacher.ensemble.",
        )
    if len(other.labels) != len(first.labels):
        raise TeacherError(
            f"its labels are {_few(other.labels)}; those of {first.source} are {_few(first.labels)}",
            where=other.source,
            fix="Teachers of one ensemble must have the same labels: leave it out of teacher.ensemble.",
        )
    given = {name: map_to for name, map_to in label_map.items() if name in other.labels}
    known = given or numbered(other.labels, first.labels)
    order = match_labels(other.labels, first.labels, known, where=other.source, ordered=True)
    rename_labels(other, first.labels, order)


def _reading(tokenizer: Any) -> list[Any]:
    """How a tokenizer comes from a text to its pieces, and what it puts around them."""
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    return [said.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor")]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
