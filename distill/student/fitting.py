"""Modules of a student set by least squares to give what its teacher gives, on real text and without gradients.

gather        what modules read or give at every position that is no padding
layer_calls   how layers are called, so that one of them can be run again by itself
fit_linear    a product, by ridge regression that leans on a given start
fit_norm      scale and shift of a norm
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.student.parts import part_of
from distill.student.surgery import Batch, inputs_of, record_inputs

_RIDGE = 1e-3  # of the inputs' mean square: how strongly a fit leans on its starting weights


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer, to be made again."""

    layer: nn.Module
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    def again(self) -> None:
        """Runs the layer as it was run."""
        self.layer(*self.arguments, **self.named)


class _ReachedError(Exception):
    """The last layer in question has been called; the rest of the model need not run."""


def layer_calls(
    model: PreTrainedModel, layers: Sequence[nn.Module], batches: Iterable[Batch]
) -> dict[nn.Module, list[Call]]:
    """How each layer is called, batch by batch, in one pass that stops at the last of them."""
    found: dict[nn.Module, list[Call]] = {layer: [] for layer in layers}

    def remember(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[module].append(Call(module, arguments, named))
        if module is layers[-1]:
            raise _ReachedError

    handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in found]
    try:
        for batch in batches:
            with suppress(_ReachedError), torch.no_grad():
                model(**inputs_of(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return found


def gather(
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    *,
    read: bool = False,
    calls: Sequence[Call] | None = None,
) -> dict[str, Tensor]:
    """What modules give, or with `read` read, at every position that is no padding: (positions, width) each.

    With `calls`, one a batch, a single layer is run on what it was called with, rather than the whole model.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    for number, batch in enumerate(batches):
        with _record(modules.values(), read=read) as seen:
            if calls is None:
                model(**inputs_of(model, batch))
            else:
                calls[number].again()
        real = batch["attention_mask"].bool()
        for name, module in modules.items():
            values = seen[module].float().cpu()
            found[name].append(values[real] if values.shape[:2] == real.shape and values.dim() == 3 else values)
    return {name: torch.cat(parts) for name, parts in found.items()}


@contextmanager
def _record(modules: Iterable[nn.Module], *, read: bool) -> Iterator[dict[nn.Module, Tensor]]:
    """What modules read, or give, in their latest call."""
    chosen = list(modules)
    if read:
        with record_inputs(chosen) as seen:
            yield seen
        return
    given: dict[nn.Module, Tensor] = {}
    handles = [m.register_forward_hook(lambda module, _, output: given.__setitem__(module, output)) for m in chosen]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def fit_linear(product: nn.Linear, inputs: Tensor, target: Tensor, prior: Tensor) -> None:
    """Ridge regression of `target` on `inputs`, leaning on the weights `prior`.

    Args:
        product: Written to.
        inputs: (positions, in) what it reads.
        target: (positions, out) what it should give.
        prior: (out, in).
    """
    wide = inputs.double()
    mean_x, mean_y = wide.mean(0), target.double().mean(0)
    centred = wide - mean_x
    left = target.double() - mean_y - centred @ prior.double().T
    gram = centred.T @ centred
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + 1e-12)
    weight = prior.double() + torch.linalg.solve(gram, centred.T @ left).T
    product.weight.copy_(weight)
    if product.bias is not None:
        product.bias.copy_(mean_y - weight @ mean_x)


def fit_norm(norm: nn.Module, inputs: Tensor, target: Tensor) -> None:
    """Scale and shift of each coordinate of a LayerNorm that reads `inputs`, both (positions, width)."""
    normal = nn.functional.layer_norm(inputs, inputs.shape[-1:], eps=float(norm.eps))  # type: ignore[arg-type]
    spread, aim = normal - normal.mean(0), target - target.mean(0)
    scale = (spread * aim).sum(0) / spread.square().sum(0).clamp_min(1e-12)
    norm.get_parameter("weight").copy_(scale)
    norm.get_parameter("bias").copy_(target.mean(0) - scale * normal.mean(0))


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """The product of that name inside a layer."""
    module = layer.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{name} is {type(module).__name__}, not Linear")
    return module


def embedding_norm(model: PreTrainedModel) -> nn.Module:
    """The norm behind the embedding tables."""
    return next(
        module
        for name, module in model.named_modules()
        if name.endswith("LayerNorm") and part_of(model, f"{name}.weight") == "embeddings"
    )


def head_products(model: PreTrainedModel) -> list[nn.Linear]:
    """The products between the last layer and the logits, in the order they are built."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and part_of(model, f"{name}.weight") == "head"
    ]
