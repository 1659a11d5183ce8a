"""What a student takes over from its teacher: parameters of the same name and shape, and cuts of wider ones.

The mechanism knows no families. It finds the list of layers, replaces the layer's number, and compares shapes; only a
student of another family than its teacher's needs a table of names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.student.factorisation import factorise, product_of
from distill.student.parts import base_name, decoder_stack, final_linear, layer_stack, part_of
from distill.student.shape import LayerMap, inner_width, position_offset


@dataclass(frozen=True, slots=True)
class Inherited:
    """Names of the student's parameters that were copied, whole or cut to size."""

    names: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()
    """What was done on the way that a person should be told."""


def inherit(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    layer_map: LayerMap,
    *,
    decoder_map: LayerMap | None = None,
    parts: Collection[str] = ("embeddings", "layers", "head"),
    label_order: list[int] | None = None,
) -> Inherited:
    """Copies into the student every parameter of the teacher whose shape agrees.

    Where the teacher's feed-forward is wider, its strongest neurons are kept: those with the largest product of the
    norms of their incoming and outgoing weights, a layer at a time.

    Args:
        teacher: Read only; any device and precision.
        student: Written to.
        layer_map: (student, teacher) layers, counted from 1.
        decoder_map: The same of a decoder behind an encoder.
        parts: Which parts are copied.
        label_order: For each of the student's labels, the teacher's row of logits; None where they are the same.
    """
    source = _as_family(teacher, student)
    remarks = _factorised(teacher, student, source) if "embeddings" in parts else []
    order = {} if label_order is None else {final_linear(student): label_order}
    found: dict[str, Tensor] = {}
    kept: dict[str, Tensor | None] = {}
    for name, parameter, origin in _pairs(student, layer_map, decoder_map or []):
        if part_of(student, name) not in parts or origin not in source:
            continue
        values = source[origin].detach()
        module = name.rpartition(".")[0]
        if module in order and values.shape[0] == len(order[module]):
            values = values[order[module]]
        layer = _layer_prefix(origin, layer_stack(student)) or _layer_prefix(origin, decoder_stack(student))
        if values.shape != parameter.shape and layer not in kept:
            mates = [v for n, v in source.items() if n.startswith(layer) and part_of(student, n) == "layers"]
            kept[layer] = _strongest(mates, inner_width(teacher.config), inner_width(student.config))
        fitted = _fit(values, parameter, kept.get(layer), inner_width(teacher.config))
        if fitted is not None:
            found[name] = fitted
    if "layers" in parts:
        remarks += _left_behind(student, source, layer_map)
    return replace(_copy_whole_modules(student, found), remarks=tuple(remarks))


def _left_behind(student: PreTrainedModel, source: dict[str, Tensor], layer_map: LayerMap) -> list[str]:
    """A remark on each layer of the teacher that has what the student's layer has no place for.

    ModernBERT's first layer has no norm before its attention, all others have one.
    """
    stack, remarks = layer_stack(student), []
    if not stack:
        return []
    for mine, theirs in layer_map:
        own, inside = f"{stack}.{mine - 1}.", f"{stack}.{theirs - 1}."
        places = {name.removeprefix(own) for name, _ in student.named_parameters() if name.startswith(own)}
        names = [name.removeprefix(inside) for name in source if name.startswith(inside)]
        lost = sorted({name.rpartition(".")[0] for name in names if name not in places and not _shared(name)})
        if lost:
            remarks.append(
                f"{', '.join(lost)} of the teacher's layer {theirs} has no place in the student's layer {mine}"
            )
    return remarks


def _factorised(teacher: PreTrainedModel, student: PreTrainedModel, source: dict[str, Tensor]) -> list[str]:
    """Puts a narrower embedding into `source` where the student's is one, and says so."""
    base, family, rank = base_name(student), student.config.model_type, getattr(student.config, "embedding_size", 0)
    table = source.get(f"{base}.embeddings.word_embeddings.weight")
    product = product_of(family)
    if not product or table is None or rank >= table.shape[1]:
        return []
    if student.config.hidden_size != teacher.config.hidden_size:
        return []
    inside = {name.removeprefix(f"{base}."): values.detach() for name, values in source.items()}
    cut = factorise(inside, rank, product=product, teacher_product=product)
    source |= {f"{base}.{name}": values for name, values in cut.values.items()}
    width = student.config.hidden_size
    return [
        f"embedding factorised: {len(table):,} x {rank} and {rank} x {width} for {len(table):,} x {table.shape[1]}; "
        f"it keeps {cut.kept:.0%} of what told the tokens apart"
    ]


def _copy_whole_modules(student: PreTrainedModel, found: dict[str, Tensor]) -> Inherited:
    """Writes what was found, but never a bias without its weight: half a module is no start."""
    parameters = dict(student.named_parameters())
    partial = {name.rpartition(".")[0] for name in parameters if name not in found}
    names = {name for name in found if name.rpartition(".")[0] not in partial}
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(found[name])
    return Inherited(frozenset(names))


def _pairs(
    student: PreTrainedModel, layer_map: LayerMap, decoder_map: LayerMap
) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Each parameter of the student with the name that it has in the teacher."""
    stacks = {layer_stack(student): layer_map, decoder_stack(student): decoder_map}
    stacks.pop("", None)
    for name, parameter in student.named_parameters():
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), "")
        if not stack:
            yield name, parameter, name
            continue
        number, _, rest = name.removeprefix(f"{stack}.").partition(".")
        layer = {mine - 1: theirs - 1 for mine, theirs in stacks[stack]}[int(number)]
        if _shared(rest):
            layer = 0
        yield name, parameter, f"{stack}.{layer}.{rest}"


def _shared(name: str) -> bool:
    """Whether it is what T5's first layer has for all of them."""
    return "relative_attention_bias" in name


def _layer_prefix(name: str, stack: str) -> str:
    """`bert.encoder.layer.3.` for a parameter of that layer; empty outside the layers, and where they share one."""
    if not stack or not name.startswith(f"{stack}."):
        return ""
    return f"{stack}.{name.removeprefix(f'{stack}.').partition('.')[0]}."


def _strongest(layer: list[Tensor], inner: int, wanted: int) -> Tensor | None:
    """Indices, in order, of a layer's `wanted` strongest feed-forward neurons; None where it cannot be cut."""
    if wanted >= inner:
        return None
    strength = torch.ones(inner)
    for values in layer:
        axis = _inner_axis(values, inner) if values.dim() == 2 else None
        if axis is not None:
            rows = values.detach().float().cpu().movedim(axis, 0).reshape(-1, inner, values.shape[1 - axis])
            strength = strength * rows.square().sum(dim=(0, 2)).sqrt()
    return strength.topk(wanted).indices.sort().values


def _inner_axis(values: Tensor, inner: int) -> int | None:
    """The axis that runs over feed-forward neurons; a gated one holds two blocks of them."""
    axes = [axis for axis, size in enumerate(values.shape) if size in (inner, 2 * inner)]
    return axes[0] if len(axes) == 1 else None


def _fit(values: Tensor, parameter: Tensor, kept: Tensor | None, inner: int) -> Tensor | None:
    """The teacher's values, or the rows or columns of kept neurons; None where neither has the student's shape."""
    if values.shape == parameter.shape:
        return values
    axis = _inner_axis(values, inner)
    if kept is None or axis is None:
        return None
    blocks = values.shape[axis] // inner
    index = torch.cat([kept + block * inner for block in range(blocks)]).to(values.device)
    cut = values.index_select(axis, index)
    return cut if cut.shape == parameter.shape else None


_BERT_TO_DISTILBERT = (
    (r"^encoder\.layer\.", "transformer.layer."),
    (r"attention\.self\.query\.", "attention.q_lin."),
    (r"attention\.self\.key\.", "attention.k_lin."),
    (r"attention\.self\.value\.", "attention.v_lin."),
    (r"attention\.output\.dense\.", "attention.out_lin."),
    (r"attention\.output\.LayerNorm\.", "sa_layer_norm."),
    (r"intermediate\.dense\.", "ffn.lin1."),
    (r"(\.\d+\.)output\.dense\.", r"\1ffn.lin2."),
    (r"(\.\d+\.)output\.LayerNorm\.", r"\1output_layer_norm."),
)
_HEADS_TO_DISTILBERT = {
    "pooler.dense": "pre_classifier",  # BERT: tanh follows, DistilBERT: ReLU
    "classifier.dense": "pre_classifier",
    "classifier.out_proj": "classifier",
}


def _as_family(teacher: PreTrainedModel, student: PreTrainedModel) -> dict[str, Tensor]:
    """The teacher's parameters under the names that the student's family gives them."""
    source: dict[str, Tensor] = dict(teacher.named_parameters())
    if teacher.config.model_type == student.config.model_type:
        return source
    if student.config.model_type == "electra":
        return _as_electra(teacher, student, source)
    base, own = base_name(teacher), base_name(student)
    if student.config.model_type == "mobilebert":
        return {re.sub(rf"^{base}\.", f"{own}.", name): values for name, values in source.items()}
    renamed: dict[str, Tensor] = {}
    for name, values in source.items():
        inside = name.removeprefix(f"{base}.")
        module, _, kind = inside.rpartition(".")
        if module in _HEADS_TO_DISTILBERT:
            renamed[f"{_HEADS_TO_DISTILBERT[module]}.{kind}"] = values
        elif not name.startswith(f"{base}."):
            renamed[name] = values
        else:
            for pattern, replacement in _BERT_TO_DISTILBERT:
                inside = re.sub(pattern, replacement, inside)
            renamed[f"{own}.{inside}"] = values
    table = f"{own}.embeddings.position_embeddings.weight"
    segment = renamed[f"{own}.embeddings.token_type_embeddings.weight"][0]
    # Every token of a first sentence gets the same segment vector, so the position table can carry it.
    renamed[table] = renamed[table][position_offset(teacher.config) :] + segment
    return renamed


_HEADS_TO_ELECTRA = {
    "pooler.dense": "classifier.dense",  # BERT: tanh follows, ELECTRA: GELU
    "classifier": "classifier.out_proj",
}


def _as_electra(teacher: PreTrainedModel, student: PreTrainedModel, source: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's and ELECTRA's layers have the same names; heads and the position table differ."""
    base, own = base_name(teacher), base_name(student)
    one_layer = any(name.startswith("classifier.dense.") for name, _ in student.named_parameters())
    renamed: dict[str, Tensor] = {}
    for name, values in source.items():
        module, _, kind = name.removeprefix(f"{base}.").rpartition(".")
        if one_layer and module in _HEADS_TO_ELECTRA:
            renamed[f"{_HEADS_TO_ELECTRA[module]}.{kind}"] = values
        else:
            renamed[f"{own}.{module}.{kind}" if name.startswith(f"{base}.") else name] = values
    table = f"{own}.embeddings.position_embeddings.weight"
    renamed[table] = renamed[table][position_offset(teacher.config) :]
    return renamed
