"""The student of an image encoder with a decoder behind it: one card shapes both, and each inherits from its own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from distill.cards import StudentCard
from distill.errors import StudentError
from distill.student.build import Student, compose, fresh_parts, override_card
from distill.student.inheritance import inherit
from distill.student.shape import choose_layers, depth, shape_config
from distill.student.size import Component, Size, measure

BRIDGE = "enc_to_dec_proj"
"""What stands between an encoder and a decoder of another width."""


def build_captioner(
    teacher: PreTrainedModel,
    card: StudentCard,
    *,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    init: Literal["teacher", "random"] = "teacher",
) -> Student:
    """Builds the student that a card describes: its layers are the encoder's, its decoder_layers the decoder's.

    Args:
        teacher: A VisionEncoderDecoderModel; it stays as it is.
        card: The shape of both, and what is inherited; named layers are the encoder's.
        overrides: Card fields to replace; None leaves the card's value.
        seed: Decides every random value; torch's own generator is left as it was.
        init: `random` inherits nothing.

    Raises:
        StudentError: When the shape cannot be built, or cannot inherit from this teacher.
    """
    card = override_card(card, overrides or {}, init=init)
    alone = card.model_copy(update={"decoder_layers": "same"})
    cards = {"encoder": alone, "decoder": _decoder_card(card, depth(teacher.config.decoder))}
    shaped = {name: shape_config(getattr(teacher.config, name), one) for name, one in cards.items()}
    if getattr(shaped["decoder"], "cross_attention_hidden_size", None) is not None:  # TrOCR's reads any width
        shaped["decoder"].cross_attention_hidden_size = shaped["encoder"].hidden_size
    model = compose(teacher, shaped, seed)
    maps = {name: choose_layers(one, depth(getattr(teacher.config, name))) for name, one in cards.items()}
    taken: set[str] = set()
    remarks: list[str] = []
    for name, layers in maps.items():
        found = inherit(teacher.get_submodule(name), model.get_submodule(name), layers, parts=card.inherits.parts)
        taken |= {f"{name}.{parameter}" for parameter in found.names}
        remarks += found.remarks
    if "layers" in card.inherits.parts:
        taken |= _copy_bridge(teacher, model)
    model.tie_weights()
    model.generation_config = copy.deepcopy(teacher.generation_config)
    fresh, said = fresh_parts(model, taken)
    remarks += said
    remarks.append(f"layers of the decoder: {', '.join(f'{mine} from {theirs}' for mine, theirs in maps['decoder'])}")
    return Student(
        model=model.train(),
        card=card,
        layer_map=maps["encoder"],
        size=_size(model),
        inherited=tuple(sorted(taken)),
        fresh=fresh,
        remarks=tuple(remarks),
    )


def _decoder_card(card: StudentCard, most: int) -> StudentCard:
    """The same card for the decoder alone.

    Raises:
        StudentError: It asks for more layers than there are.
    """
    wanted = min(card.layers, most) if card.decoder_layers == "same" else card.decoder_layers
    if wanted > most:
        raise StudentError(
            f"decoder_layers is {wanted} but the teacher's decoder has {most}",
            where=f"student card {card.name!r}",
            fix=f"Set decoder_layers to at most {most}.",
        )
    choice = "even" if isinstance(card.inherits.layers, list) else card.inherits.layers
    inherits = card.inherits.model_copy(update={"layers": choice})
    return card.model_copy(update={"layers": wanted, "decoder_layers": "same", "inherits": inherits})


def _copy_bridge(teacher: nn.Module, student: nn.Module) -> set[str]:
    """Copies what stands between the two, where both are as wide as the teacher's."""
    theirs, copied = dict(teacher.named_parameters()), set()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.startswith(BRIDGE) and name in theirs and theirs[name].shape == parameter.shape:
                parameter.copy_(theirs[name])
                copied.add(name)
    return copied


def _size(model: PreTrainedModel) -> Size:
    """Both parts' tables, and the product between them where there is one."""
    rows: list[Component] = []
    for name in ("encoder", "decoder"):
        own = measure(model.get_submodule(name))
        rows += [replace(part, name=f"{name} {part.name}") for part in own.components]
    bridge = sum(value.numel() for name, value in model.named_parameters() if name.startswith(BRIDGE))
    return Size((*rows, Component("between", bridge, bridge)) if bridge else tuple(rows))
