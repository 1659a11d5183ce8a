"""The teacher's classes, matched with the data's by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from distill.data.rows import plain_name
from distill.errors import TeacherError
from distill.teacher import Checkpoint, head_of

GENERIC_PREFIX = "LABEL_"
"""What transformers puts before the number of a class that nobody named."""


def match_labels(
    teacher: Sequence[str], data: Sequence[str], label_map: Mapping[str, str], *, where: str, ordered: bool = False
) -> list[int]:
    """Matches labels by name.

    Args:
        teacher: The teacher's names by class number.
        data: The names found in the data.
        label_map: Teacher name to data name, where they are called differently.
        where: What an error names.
        ordered: The data's order is asked for; else the teacher's order stands.

    Returns:
        For each class of the result, the teacher's class number: the identity unless `ordered` moves them.

    Raises:
        TeacherError: Names of the data that the teacher has not, or generic names that match nothing.
    """
    renamed = [label_map.get(name, name) for name in teacher]
    called = _counterparts(data, renamed)
    lost = [name for name in data if name not in called]
    unknown = [name for name in label_map if name not in teacher]
    if unknown:
        raise TeacherError(
            f"`teacher.label_map` names {', '.join(unknown)}, which the teacher has not",
            where=where,
            fix=f"Its labels are {', '.join(teacher)}.",
        )
    if lost:
        example = ", ".join(f"{name} = {other!r}" for name, other in zip(teacher[:2], data[:2], strict=False))
        raise TeacherError(
            f"labels of the data that the teacher has not: {', '.join(lost[:8])}; the teacher's are "
            f"{', '.join(teacher[:8])}",
            where=where,
            fix=f"Say which is which in the recipe: teacher.label_map = {{ {example} }}.",
        )
    if not ordered:
        return list(range(len(teacher)))
    first = [renamed.index(called[name]) for name in data]
    return first + [number for number in range(len(teacher)) if number not in first]


def numbered(teacher: Sequence[str], data: Sequence[str]) -> dict[str, str]:
    """By the teacher's label the number that data calls it, where it has no names of its own and data has numbers.

    transformers calls class 3 `LABEL_3` where nobody named it, and its training data said 3. Empty where either side
    says more than a number.
    """
    numbers = {f"{GENERIC_PREFIX}{number}": str(number) for number in range(len(teacher))}
    return numbers if list(numbers) == list(teacher) and set(data) <= set(numbers.values()) else {}


def final_names(
    teacher: Sequence[str], data: Sequence[str], label_map: dict[str, str], order: Sequence[int]
) -> list[str]:
    """Names of the classes in their final order: as the data spells them, where it has them."""
    names = [label_map.get(teacher[number], teacher[number]) for number in order]
    spelled = _counterparts(names, data)
    return [spelled.get(name, name) for name in names]


def rename_labels(checkpoint: Checkpoint, names: Sequence[str], order: Sequence[int]) -> None:
    """Moves the rows of the classification head so that class i is the teacher's class `order[i]`, called `names[i]`.

    Raises:
        TeacherError: The head is not one linear layer of that many classes.
    """
    if list(order) != list(range(len(order))):
        head = head_of(checkpoint.model, len(order))
        if head is None:
            raise TeacherError(
                "its head is not one linear layer, so its labels cannot be put into another order",
                where=checkpoint.source,
                fix=f"Leave `data.labels` empty to keep its own order: {', '.join(checkpoint.labels)}.",
            )
        with torch.no_grad():
            head.weight.copy_(head.weight[list(order)].clone())
            if head.bias is not None:
                head.bias.copy_(head.bias[list(order)].clone())
    checkpoint.labels = list(names)
    checkpoint.model.config.id2label = dict(enumerate(names))
    checkpoint.model.config.label2id = {name: number for number, name in enumerate(names)}


def _counterparts(names: Sequence[str], others: Sequence[str]) -> dict[str, str]:
    """For each of `names` the one of `others` that is the same to the letter, or else the only one that nearly is."""
    same = set(names) & set(others)
    near: dict[str, tuple[list[str], list[str]]] = {}
    for side, found in enumerate((names, others)):
        for name in set(found) - same:
            near.setdefault(plain_name(name), ([], []))[side].append(name)
    alike = {mine[0]: theirs[0] for mine, theirs in near.values() if len(mine) == len(theirs) == 1}
    return {name: name for name in same} | alike
