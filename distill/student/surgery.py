"""What in a teacher matters, measured: attention heads, feed-forward neurons, whole layers.

rank_units    first-order importance of heads and neurons over batches
rank_layers   which layers to keep, by how far the answers move when one is skipped
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.errors import StudentError
from distill.features import evaluating
from distill.progress import SILENT, Progress
from distill.student.parts import layer_stack
from distill.student.shape import inner_width

Batch = Mapping[str, Tensor]

OUTSIDE = -1e4
"""A logit of what cannot be chosen."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names, inside one layer, of the modules that surgery works on.

    Attributes:
        query: Product that gives queries (B, L, H).
        key: Product that gives keys.
        value: Product that gives values.
        out: Product behind attention; reads the concatenated heads.
        attention_norm: Norm of the sum of `out` and what came in.
        up: Product into the feed-forward.
        down: Product out of it; reads the activated neurons.
        norm: Norm of the sum of `down` and `attention_norm`; the layer's output.
    """

    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    up: str
    down: str
    norm: str


def _bert(attention: str, query: str, key: str, value: str) -> Layout:
    return Layout(
        query=f"{attention}.{query}",
        key=f"{attention}.{key}",
        value=f"{attention}.{value}",
        out="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        norm="output.LayerNorm",
    )


_BERT = _bert("attention.self", "query", "key", "value")
LAYOUTS: dict[str, Layout] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": _bert("attention.self", "query_proj", "key_proj", "value_proj"),
    "distilbert": Layout(
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        out="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        norm="output_layer_norm",
    ),
    "mpnet": Layout(
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        out="attention.attn.o",
        attention_norm="attention.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        norm="output.LayerNorm",
    ),
}
"""Families of encoders that normalise after each sum, which is what surgery knows how to cut."""


def layout_of(model: PreTrainedModel) -> Layout:
    """The layout of a model's family.

    Raises:
        StudentError: For a family that surgery does not know.
    """
    layout = LAYOUTS.get(model.config.model_type)
    if layout is None:
        raise StudentError(
            f"surgery does not know the family {model.config.model_type!r} (it knows {', '.join(LAYOUTS)})",
            where="student",
            fix="Take a card that keeps the teacher's width, such as layers-6.",
        )
    return layout


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer layers, first to last.

    Raises:
        StudentError: When layers share their weights, so that none can be taken out.
    """
    stack = layer_stack(model)
    if not stack:
        raise StudentError(
            f"the layers of {type(model).__name__} share their weights",
            where="student",
            fix="Take a card of fewer layers; there is nothing to choose among them.",
        )
    return list(model.get_submodule(stack).children())


@dataclass(frozen=True, slots=True)
class Importance:
    """How much the loss would change, to first order, without each unit: mean over examples, not negative.

    Attributes:
        heads: (layers, heads).
        neurons: (layers, feed-forward neurons).
    """

    heads: Tensor
    neurons: Tensor


def rank_units(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    loss: Callable[[Tensor, Batch], Tensor] | None = None,
    progress: Progress = SILENT,
) -> Importance:
    """First-order importance of every head and neuron: E_x |sum over positions of activation * gradient|.

    That is the absolute derivative of the loss by a mask of ones on the unit (Michel et al. 2019, arXiv:1905.10650;
    Molchanov et al. 2017, arXiv:1611.06440).

    Args:
        model: Left as it is, gradients too.
        batches: What the model reads; `labels` are used where they are given.
        loss: `loss(logits, batch)` summed over the batch; None takes cross-entropy with the labels, or with the
            model's own answer where there is no label.
        progress: Told about batches.

    Raises:
        StudentError: For a family that surgery does not know, or no batches.
    """
    layout, heads = layout_of(model), int(model.config.num_attention_heads)
    layers = layers_of(model)
    head_sum = torch.zeros(len(layers), heads)
    neuron_sum = torch.zeros(len(layers), inner_width(model.config))
    examples = 0
    outs = [layer.get_submodule(layout.out) for layer in layers]
    downs = [layer.get_submodule(layout.down) for layer in layers]
    with evaluating(model), progress.stage("Ranking heads and neurons", unit="batches") as stage:
        for batch in batches:
            with record_inputs([*outs, *downs]) as seen, torch.enable_grad():
                output = model(**inputs_of(model, batch))
                value = loss(output[0], batch) if loss else own_loss(model, output, batch)
            activations = [seen[module] for module in (*outs, *downs)]
            gradients = torch.autograd.grad(value, activations)
            effects = [(a * g).detach().float().cpu() for a, g in zip(activations, gradients, strict=True)]
            for number, effect in enumerate(effects[: len(layers)]):
                head_sum[number] += effect.reshape(*effect.shape[:2], heads, -1).sum(dim=(1, 3)).abs().sum(0)
            for number, effect in enumerate(effects[len(layers) :]):
                neuron_sum[number] += effect.sum(dim=1).abs().sum(0)
            examples += len(batch["attention_mask"])
            stage.advance()
    _check_some(examples)
    return Importance(head_sum / examples, neuron_sum / examples)


def rank_layers(
    model: PreTrainedModel, batches: Sequence[Batch], keep: int, *, progress: Progress = SILENT
) -> list[int]:
    """Which `keep` layers to inherit: the one whose absence moves the answers least is left out, again and again.

    The move is KL(whole || without), averaged over what the task scores, on the model's own logits. For a card's
    `inherits.layers`.

    Args:
        model: Left as it is.
        batches: Gone through (L - keep) times (L + keep + 1) / 2 times, so a few hundred short texts are enough.
        keep: Layers to keep, 1 to L.
        progress: Told about trials.

    Returns:
        Layer numbers from 1, ascending.

    Raises:
        StudentError: When layers share weights, `keep` is not possible, or there are no batches.
    """
    layers = layers_of(model)
    if not 1 <= keep <= len(layers):
        raise StudentError(f"{keep} of {len(layers)} layers cannot be kept", where="student.layers")
    _check_some(len(batches))
    kept = list(range(len(layers)))
    trials = sum(range(keep + 1, len(layers) + 1))
    with evaluating(model), torch.no_grad(), progress.stage("Ranking layers", total=trials, unit="trials") as stage:
        whole = [_log_probabilities(model, batch) for batch in batches]
        while len(kept) > keep:
            moves = []
            for candidate in kept:
                skipped = [layers[number] for number in range(len(layers)) if number not in kept or number == candidate]
                moves.append((_move(model, batches, whole, skipped), candidate))
                stage.advance()
            kept.remove(min(moves)[1])
    return [number + 1 for number in kept]


def own_loss(model: PreTrainedModel, output: Any, batch: Batch) -> Tensor:
    """Cross-entropy with the labels, or with the model's own answer where there is none; summed.

    A number takes half the squared error, or half its square where there is no label.
    """
    labels, logits = batch.get("labels"), output[0]
    if logits.shape[-1] == 1:
        target = torch.zeros_like(logits) if labels is None else labels.view_as(logits).nan_to_num()
        return (logits - target).square().sum() / 2
    rows, kept = _asked(model, output, batch)
    target = rows.argmax(-1)
    if labels is not None:
        given = labels.to(target.device)
        if given.is_floating_point():  # several labels, each against zero: it is the first of the two where it is 1
            given = (1 - given).nan_to_num(nan=-1.0).long()
        given = given.reshape(-1) if kept is None else given[kept]
        if given.shape == target.shape:
            target = torch.where(given >= 0, given, target)
    return F.cross_entropy(rows, target, reduction="sum")


def inputs_of(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What of a batch the model's forward takes, without labels, on the model's device."""
    names = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    return {name: values.to(device) for name, values in batch.items() if name in names and name != "labels"}


@contextmanager
def record_inputs(modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """The first argument of each module's latest call, while the context is open."""
    seen: dict[nn.Module, Tensor] = {}

    def remember(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[module] = arguments[0]

    handles = [module.register_forward_pre_hook(remember) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _skipping(layers: Collection[nn.Module]) -> Iterator[None]:
    """Lets what comes into these layers come out of them."""

    def skip(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        return (arguments[0], *output[1:]) if isinstance(output, tuple) else arguments[0]

    handles = [layer.register_forward_hook(skip) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _move(model: PreTrainedModel, batches: Sequence[Batch], whole: list[Tensor], skipped: list[nn.Module]) -> float:
    with _skipping(skipped):
        parts = [
            F.kl_div(_log_probabilities(model, batch), before, reduction="sum", log_target=True)
            for batch, before in zip(batches, whole, strict=True)
        ]
    return float(torch.stack(parts).sum()) / max(1, sum(map(len, whole)))


def _log_probabilities(model: PreTrainedModel, batch: Batch) -> Tensor:
    return _asked(model, model(**inputs_of(model, batch)), batch)[0].log_softmax(-1)


def _asked(model: PreTrainedModel, output: Any, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """(rows, classes) logits of what the task scores, and which tokens those are where it scores tokens.

    A span has two rows, its start and its end among the places where it may be; labels that are independent of each
    other, and a number, have a row each, against zero, as a logistic regression has it.
    """
    logits: Tensor = output[0].float()
    if "start_logits" in output:
        places = batch.get("inside", batch["attention_mask"]).to(logits.device).bool()
        both = torch.stack([logits, output["end_logits"].float()], dim=1)
        return both.masked_fill(~places[:, None], OUTSIDE).flatten(0, 1), None
    if logits.shape[-1] == 1 or model.config.problem_type == "multi_label_classification":
        each = logits.reshape(-1, 1)
        return torch.cat([each, torch.zeros_like(each)], dim=-1), None
    if logits.dim() == 3:
        for name in ("scored", "attention_mask"):
            kept = batch[name].to(logits.device).bool() if name in batch else None
            if kept is not None and kept.shape == logits.shape[:2]:
                return logits[kept], kept
    return logits.reshape(-1, logits.shape[-1]), None


def _check_some(count: int) -> None:
    if count == 0:
        raise StudentError("there are no batches to measure on", where="student", fix="Give a few hundred texts.")
