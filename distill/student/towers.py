"""The student of a model with two encoders (CLIP): one card shapes both, and each inherits from its own teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from distill.cards import StudentCard
from distill.errors import StudentError
from distill.student.build import Student, compose, fresh_parts, override_card
from distill.student.inheritance import inherit
from distill.student.shape import choose_layers, depth, shape_config
from distill.student.size import Component, Size, measure

TOWERS = {"text_config": "text_model", "vision_config": "vision_model"}
"""By part of the config, the encoder that it shapes."""
JOINTS = ("text_projection", "visual_projection", "logit_scale")
"""What stands behind the encoders."""


def is_dual(config: PretrainedConfig) -> bool:
    """The config has a part for texts and one for images."""
    return all(hasattr(config, name) for name in TOWERS)


def build_dual(
    teacher: PreTrainedModel,
    card: StudentCard,
    *,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    init: Literal["teacher", "random"] = "teacher",
) -> Student:
    """Builds the student that a card describes, both encoders alike, with vectors as wide as the teacher's.

    Args:
        teacher: With `text_model`, `vision_model` and projections, as CLIPModel; it stays as it is.
        card: The shape of either encoder, and what is inherited.
        overrides: Card fields to replace; None leaves the card's value.
        seed: Decides every random value; torch's own generator is left as it was.
        init: `random` inherits nothing.

    Raises:
        StudentError: When the shape cannot be built, or cannot inherit from this teacher.
    """
    card = override_card(card, overrides or {}, init=init)
    shaped = {name: shape_config(getattr(teacher.config, name), card) for name in TOWERS}
    model = compose(teacher, shaped, seed)
    maps = {name: choose_layers(card, depth(getattr(teacher.config, name))) for name in TOWERS}
    taken: set[str] = set()
    remarks: list[str] = []
    for name, tower in TOWERS.items():
        mine, theirs = model.get_submodule(tower), teacher.get_submodule(tower)
        found = inherit(theirs, mine, maps[name], parts=card.inherits.parts)
        taken |= {f"{tower}.{parameter}" for parameter in found.names}
        remarks += found.remarks
    if "head" in card.inherits.parts:
        taken |= _copy_joints(teacher, model)
    fresh, said = fresh_parts(model, taken)
    remarks += said
    if maps["vision_config"] != maps["text_config"]:
        pairs = ", ".join(f"{mine} from {theirs}" for mine, theirs in maps["vision_config"])
        remarks.append(f"layers of the image encoder: {pairs}")
    return Student(
        model=model.train(),
        card=card,
        layer_map=maps["text_config"],
        size=_size(model),
        inherited=tuple(sorted(taken)),
        fresh=fresh,
        remarks=tuple(remarks),
    )


def refuse_ranking(parts: str) -> None:
    """Says that layers of several parts, which `parts` names, are not ranked.

    Raises:
        StudentError: Always.
    """
    raise StudentError(
        f"the layers of {parts} cannot be ranked by what the answers lose without them",
        where="student.inherit_layers",
        fix='Set "even", "first" or "last", or name the layers.',
    )


def _copy_joints(teacher: nn.Module, student: nn.Module) -> set[str]:
    """Copies the projections whose encoders are as wide as the teacher's, and the temperature."""
    theirs, copied = dict(teacher.named_parameters()), set()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.split(".")[0] in JOINTS and theirs[name].shape == parameter.shape:
                parameter.copy_(theirs[name])
                copied.add(name)
    return copied


def _size(model: PreTrainedModel) -> Size:
    """Both encoders' tables, and the projections as products that stay fp32."""
    rows: list[Component] = []
    for tower in TOWERS.values():
        own = measure(model.get_submodule(tower))
        kind = tower.removesuffix("_model")
        rows += [replace(part, name=f"{kind} {part.name}") for part in own.components]
    joints = sum(value.numel() for name, value in model.named_parameters() if name.split(".")[0] in JOINTS)
    return Size((*rows, Component("projections", joints, 4 * joints)))
