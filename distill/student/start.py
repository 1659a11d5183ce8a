"""How a student starts: which of its teacher's layers it gets, what is copied, what is fitted, what is trimmed.

Everything here happens once, before the first step, and without a gradient step on the student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from distill.cards import StudentCard
from distill.encoders import is_captioner
from distill.progress import SILENT, Progress
from distill.student.bottleneck import fit_bottlenecks
from distill.student.build import Student, build_student, override_card, trim_student
from distill.student.captioners import build_captioner
from distill.student.reduction import carries, carry_over
from distill.student.shape import activation_of, inner_width
from distill.student.surgery import Batch, rank_layers
from distill.student.towers import build_dual, is_dual, refuse_ranking

Init = Literal["teacher", "copy", "random"]
Layers = Literal["card", "even", "first", "last", "important"] | list[int]

RANKED = 4
"""Batches that `important` measures layers on: it runs the teacher once for every layer it tries to leave out."""


def start_student(
    teacher: PreTrainedModel,
    card: StudentCard,
    batches: Callable[[], Sequence[Batch]],
    *,
    overrides: Mapping[str, Any] | None = None,
    layers: Layers = "card",
    init: Init = "teacher",
    seed: int = 0,
    kept_ids: Sequence[int] | None = None,
    progress: Progress = SILENT,
) -> Student:
    """Builds a student and gives it the best start that its teacher allows.

    Args:
        teacher: Left as it is.
        card: The shape.
        batches: Gives a few hundred encoded texts of the transfer set, labels too where they are known; called only
            where something is measured or fitted.
        overrides: Card fields to replace; None leaves the card's value.
        layers: Which teacher layers are inherited; `card` leaves it to the card, `important` measures it.
        init: `teacher` copies what agrees and fits what had to be cut (`carry_over`), `copy` only copies, `random`
            does neither.
        seed: Decides every random value.
        kept_ids: The teacher's id of each of the student's; None keeps every token.
        progress: Told about what is measured and fitted.

    Raises:
        StudentError: When the shape cannot be built, or its layers cannot be ranked.
    """
    changes = dict(overrides or {})
    if is_dual(teacher.config) or is_captioner(teacher.config):
        if layers == "important":
            refuse_ranking("two encoders" if is_dual(teacher.config) else "an encoder and a decoder")
        if layers != "card":
            changes["inherits"] = {"parts": list(card.inherits.parts), "layers": layers}
        build = build_dual if is_dual(teacher.config) else build_captioner
        return build(teacher, card, overrides=changes, seed=seed, init="random" if init == "random" else "teacher")
    if layers == "important":
        wanted = override_card(card, changes).layers
        given = list(batches())
        spread = np.linspace(0, len(given) - 1, min(RANKED, len(given))).astype(int)
        layers = rank_layers(teacher, [given[place] for place in spread], wanted, progress=progress)
    if layers != "card":
        changes["inherits"] = {"parts": list(card.inherits.parts), "layers": layers}
    student = build_student(
        teacher, card, overrides=changes, seed=seed, init="random" if init == "random" else "teacher"
    )
    if init == "teacher" and _was_cut(teacher, student):
        student = carry_over(teacher, student, batches(), seed=seed, progress=progress)
    elif init == "teacher" and student.model.config.model_type == "mobilebert" and _inherits_all(student):
        student = fit_bottlenecks(teacher, student, batches(), progress=progress)
    return student if kept_ids is None else trim_student(student, kept_ids)


def _was_cut(teacher: PreTrainedModel, student: Student) -> bool:
    """Whether a student that inherits everything has parts that copying could not carry over whole."""
    theirs, mine = teacher.config, student.model.config
    if theirs.model_type != mine.model_type or not (carries(theirs) and carries(mine)):
        return False
    if not _inherits_all(student) or len(student.layer_map) > theirs.num_hidden_layers:
        return False
    sizes = [(mine.hidden_size, theirs.hidden_size), (inner_width(mine), inner_width(theirs))]
    if any(small > large for small, large in sizes):
        return False
    other_heads = mine.num_attention_heads != theirs.num_attention_heads
    other_activation = activation_of(mine) != activation_of(theirs)
    return any(small < large for small, large in sizes) or other_heads or other_activation


def _inherits_all(student: Student) -> bool:
    return len(student.card.inherits.parts) == 3
