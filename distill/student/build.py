"""The student: a card and a teacher become a smaller model that starts from what the teacher knows."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from distill.cards import StudentCard, replace_card
from distill.errors import CardError, StudentError
from distill.student.inheritance import Inherited, inherit
from distill.student.parts import base_name, part_of
from distill.student.shape import (
    LayerMap,
    activation_of,
    choose_decoder_layers,
    choose_layers,
    depth,
    inner_width,
    shape_config,
)
from distill.student.size import Size, measure
from distill.student.vocabulary import trim_embeddings

TABLE_COLUMNS = ("part", "parameters", "int8 bytes", "with int4 embeddings")
"""What the columns of `Student.rows()` and `Plan.rows()` are."""


@dataclass(frozen=True, slots=True)
class Student:
    """A built student.

    Attributes:
        model: With the same kind of head as the teacher's; on the CPU, fp32, in training mode.
        card: The card it was built from, overrides included.
        layer_map: (student, teacher) layers, from 1: which one each stands for, and starts from where shapes agree.
        size: Parameters and expected int8 bytes by component.
        inherited: Names of the parameters that were copied from the teacher, whole or cut.
        fresh: Names of the parameters that start from random values.
        remarks: What a person should be told: what is random, what was cut, what was regrouped.
    """

    model: PreTrainedModel
    card: StudentCard
    layer_map: LayerMap
    size: Size
    inherited: tuple[str, ...]
    fresh: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Trained numbers, shared ones counted once."""
        return self.size.parameters

    @property
    def int8_bytes(self) -> int:
        """Expected bytes of the int8 ONNX file."""
        return self.size.int8_bytes

    def rows(self) -> list[list[str]]:
        """A printable table of `TABLE_COLUMNS`: the layer map, then parameters and bytes by component."""
        return plan_rows(self.layer_map, self.size)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `build_student` would make, known from configs alone."""

    card: StudentCard
    config: PretrainedConfig
    layer_map: LayerMap
    size: Size

    def rows(self) -> list[list[str]]:
        """A printable table of `TABLE_COLUMNS`: the layer map, then parameters and bytes by component."""
        return plan_rows(self.layer_map, self.size)


def build_student(
    teacher: PreTrainedModel,
    card: StudentCard,
    *,
    overrides: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    init: Literal["teacher", "random"] = "teacher",
    kept_ids: Sequence[int] | None = None,
) -> Student:
    """Builds the student that a card describes and lets it inherit from a teacher.

    Args:
        teacher: Any transformers model with a head; it stays as it is.
        card: The shape, and what is inherited.
        overrides: Card fields to replace; None leaves the card's value.
        labels: Label names in the order of the student's logits; None keeps the teacher's. Where the teacher
            knows the same names in another order, the rows of its head are put into this one.
        seed: Decides every random value; torch's own generator is left as it was.
        init: `random` inherits nothing.
        kept_ids: The teacher's id of each of the student's, from `Trimmed.kept_ids`; None keeps every token.

    Raises:
        StudentError: When the shape cannot be built, or cannot inherit from this teacher.
    """
    card = override_card(card, overrides or {}, init=init)
    config = shape_config(teacher.config, card, labels=labels)
    layer_map = choose_layers(card, depth(teacher.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = sibling_class(type(teacher), teacher.config, config)(config).float()
    order = _label_order(teacher.config, config)
    decoder_map = choose_decoder_layers(config, teacher.config, card.inherits.layers)
    taken = inherit(teacher, model, layer_map, decoder_map=decoder_map, parts=card.inherits.parts, label_order=order)
    model.tie_weights()
    if model.can_generate():
        model.generation_config = copy.deepcopy(teacher.generation_config)
    model.train()
    fresh = tuple(name for name, _ in model.named_parameters() if name not in taken.names)
    student = Student(
        model=model,
        card=card,
        layer_map=layer_map,
        size=measure(model),
        inherited=tuple(sorted(taken.names)),
        fresh=fresh,
        remarks=tuple(_remarks(teacher.config, model, taken, fresh)),
    )
    return student if kept_ids is None else trim_student(student, kept_ids)


def trim_student(student: Student, kept_ids: Sequence[int]) -> Student:
    """The student with fewer tokens: row i of its tables is what row `kept_ids[i]` was. Its model is changed."""
    model = trim_embeddings(student.model, kept_ids)
    model.train(student.model.training)
    return replace(student, model=model, size=measure(model))


def plan_student(
    teacher: PretrainedConfig,
    card: StudentCard,
    *,
    overrides: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    model_class: type[PreTrainedModel] | None = None,
    vocabulary: int | None = None,
) -> Plan:
    """What `build_student` would make: exact numbers without weights, on the meta device.

    Args:
        teacher: The teacher's config.
        card: The shape.
        overrides: Card fields to replace; None leaves the card's value.
        labels: As in `build_student`.
        model_class: The teacher's class; None takes its family's sequence classifier.
        vocabulary: Tokens that are kept; None keeps the teacher's.

    Raises:
        StudentError: When the shape cannot be built.
    """
    card = override_card(card, overrides or {})
    config = shape_config(teacher, card, labels=labels)
    if model_class is None:
        classifiers = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if type(teacher) not in classifiers:
            raise StudentError(
                f"the family {teacher.model_type!r} has no sequence classifier in transformers",
                where=f"student card {card.name!r}",
                fix="Give a teacher of another family.",
            )
        model_class = classifiers[type(teacher)]
    if vocabulary is not None:
        config.vocab_size = vocabulary
        if (config.pad_token_id or 0) >= vocabulary:  # the table's padding row is none of so few
            config.pad_token_id = None
    with torch.device("meta"):
        model = sibling_class(model_class, teacher, config)(config)
    return Plan(card, config, choose_layers(card, depth(teacher)), measure(model))


def plan_rows(layer_map: LayerMap, size: Size) -> list[list[str]]:
    """The layer map as one row, then the rows of the size table."""
    pairs = ", ".join(f"{student} from {teacher}" for student, teacher in layer_map)
    return [["layers (student from teacher)", pairs, "", ""], *size.rows()]


def override_card(
    card: StudentCard, overrides: Mapping[str, Any], *, init: Literal["teacher", "random"] = "teacher"
) -> StudentCard:
    """The card with a recipe's values in place of its own; `init="random"` makes it inherit nothing.

    Raises:
        StudentError: When a value is not one that a card may hold.
    """
    changes = dict(overrides)
    if init == "random":
        changes["inherits"] = {"parts": [], "layers": card.inherits.layers}
    if changes.get("attention_heads") is not None:
        changes.setdefault("head_size", None)
    if isinstance(card.inherits.layers, list) and changes.get("layers") not in (None, card.layers):
        changes.setdefault("inherits", {"parts": list(card.inherits.parts), "layers": "even"})
    try:
        return replace_card(card, changes, where="student")
    except CardError as error:
        raise StudentError(error.what, where=error.where, fix=error.fix) from None


def compose(teacher: PreTrainedModel, parts: Mapping[str, PretrainedConfig], seed: int) -> PreTrainedModel:
    """A model of the teacher's class with random weights, made of parts that have a config each.

    Args:
        teacher: Its config says all but the parts.
        parts: By name in the teacher's config.
        seed: Decides the weights; torch's own generator is left as it was.
    """
    values = {**teacher.config.to_dict(), **{name: config.to_dict() for name, config in parts.items()}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: PreTrainedModel = type(teacher)(type(teacher.config).from_dict(values)).float()
    return made


def fresh_parts(model: PreTrainedModel, taken: Container[str]) -> tuple[tuple[str, ...], list[str]]:
    """Parameters that are not `taken` from a teacher, and a remark on their modules where there are any."""
    fresh = tuple(name for name, _ in model.named_parameters() if name not in taken)
    modules = sorted({_without_numbers(name.rpartition(".")[0]) or name for name in fresh})
    more = f" and {len(modules) - 6} more" if len(modules) > 6 else ""
    return fresh, [f"random start: {', '.join(modules[:6])}{more}"] if fresh else []


def sibling_class(
    teacher_class: type[PreTrainedModel], teacher: PretrainedConfig, student: PretrainedConfig
) -> type[PreTrainedModel]:
    """The class with the teacher's kind of head in the student's family.

    Raises:
        StudentError: When the student's family has no such head.
    """
    if type(teacher) is type(student):
        return teacher_class
    for name, mapping in vars(modeling_auto).items():
        is_head = name.startswith("MODEL_") and name.endswith("MAPPING") and hasattr(mapping, "_model_mapping")
        if (
            is_head
            and type(teacher) in mapping
            and type(student) in mapping
            and mapping[type(teacher)] is teacher_class
        ):
            return mapping[type(student)]
    raise StudentError(
        f"the family {student.model_type!r} has no counterpart of {teacher_class.__name__}",
        fix="Take a card of the teacher's own family, such as layers-6.",
    )


def _label_order(teacher: PretrainedConfig, student: PretrainedConfig) -> list[int] | None:
    """For each of the student's labels the teacher's row; None where order or names give no reason to move any."""
    theirs = [teacher.id2label[index] for index in range(teacher.num_labels)]
    mine = [student.id2label[index] for index in range(student.num_labels)]
    if theirs == mine or sorted(theirs) != sorted(mine):
        return None
    return [theirs.index(name) for name in mine]


def _remarks(teacher: PretrainedConfig, model: PreTrainedModel, taken: Inherited, fresh: tuple[str, ...]) -> list[str]:
    """What a person should be told about this start."""
    student, said = model.config, list(taken.remarks)
    by_part: dict[str, list[str]] = {}
    for name in fresh:
        by_part.setdefault(part_of(model, name), []).append(name)
    total = {part: sum(part_of(model, name) == part for name, _ in model.named_parameters()) for part in by_part}
    for part, names in by_part.items():
        which = "all of it" if len(names) == total[part] else ", ".join(sorted({_short(model, name) for name in names}))
        said.append(f"random start: {part} ({which})")
    if "layers" not in by_part and inner_width(student) < inner_width(teacher):
        said.append(f"feed-forward cut to the {inner_width(student)} strongest neurons of each layer")
    regrouped = student.num_attention_heads != teacher.num_attention_heads
    if taken.names and regrouped and student.hidden_size == teacher.hidden_size:
        said.append(f"{teacher.num_attention_heads} heads of the teacher regrouped into {student.num_attention_heads}")
    if taken.names and activation_of(student) != activation_of(teacher):
        said.append(f"activation {activation_of(student)} in place of the teacher's {activation_of(teacher)}")
    return said


def _short(model: PreTrainedModel, parameter: str) -> str:
    """The module of a parameter, inside the base model and without layer numbers."""
    return _without_numbers(parameter.rpartition(".")[0].removeprefix(f"{base_name(model)}."))


def _without_numbers(module: str) -> str:
    """A module's name without layer numbers, so that one word stands for all layers."""
    return ".".join(step for step in module.split(".") if not step.isdigit())
