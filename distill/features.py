"""Named taps on an encoder, recorded by forward hooks: attention stays on its fast path (sdpa).

Tap          Shape         What
logits       (B, C)        the head's output; (B, L, C) for token tasks; of a pair of encoders the text's vector and the
                           image's, side by side
hidden.0     (B, L, H)     what enters the first layer: the embeddings' output
hidden.k     (B, L, H)     after layer k of N; numbered as transformers' `hidden_states`, so `hidden.N` has been through
                           the closing norm of ModernBERT, GPT-2 and T5, and has not been through ViT's
query.k      (B, L, A*d)   of layer k = 1..N, all heads side by side, before any rotation; key.k and value.k likewise
scores.k     (B, A, L, L)  what the softmax is given, less the mask: q k^T / sqrt(d), with position biases (MPNet; T5,
                           which does not divide), DeBERTa's relative terms, ModernBERT's rotation
attention.k  (B, A, L, L)  softmax of scores.k with the model's own mask, before dropout

Scores and attention are computed in fp32 from the recorded queries and keys. Without the mask, scores also tell of
pairs that the model never looks at: GPT-2's of what comes later, ModernBERT's of what lies outside a window.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.encoders import Architecture, Encoder, describe, find_encoder, own_config
from distill.errors import ObjectiveError

__all__ = ["Architecture", "Features", "TappedModel", "describe", "record"]

Features = dict[str, Tensor]
"""Tensors by the name of their tap."""

_PRODUCTS = ("query", "key", "value")

Hook = Callable[..., None]


class _Notes:
    """What one forward pass leaves behind. `kept` is None between passes, so hooks then do nothing."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] | None = None
        self.turns: dict[int, int] = {}

    def start(self) -> None:
        self.kept, self.turns = {}, {}

    def stop(self) -> dict[str, Any]:
        kept, self.kept = self.kept or {}, None
        return kept

    def keep(self, name: str, value: Any) -> None:
        # The first value stays: DeBERTa runs its query product again, on relative positions.
        if self.kept is not None:
            self.kept.setdefault(name, value)


class TappedModel:
    """Runs a model and returns the named taps.

    Hooks are installed once, do nothing outside a call of this object, and go when it is closed or collected. Gradients
    flow through every tap unless the caller switches them off.

    Args:
        model: A transformers model; it is not changed otherwise.
        taps: Names as in the table of this module.

    Raises:
        ObjectiveError: A name is no tap, or a layer or kind that this model has not.
    """

    def __init__(self, model: Any, taps: Iterable[str]) -> None:
        self.model = model
        self.taps = tuple(dict.fromkeys(taps))
        self._encoder = find_encoder(model)
        _check(self.taps, self._encoder)
        self._accepts = frozenset(inspect.signature(model.forward).parameters) - {"labels"}
        self._notes = _Notes()
        self._close = weakref.finalize(
            self, _remove, _attach(self._encoder, _needs(self.taps, self._encoder), self._notes)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TappedModel:
        # The copied model still has the old hooks, which stay silent; these are its own.
        return TappedModel(copy.deepcopy(self.model, memo), self.taps)

    def close(self) -> None:
        """Removes the hooks; calls after this find nothing to record."""
        self._close()

    def __call__(self, batch: Mapping[str, Tensor]) -> Features:
        """Runs the model on the columns of `batch` that it takes, labels left out.

        Raises:
            ObjectiveError: `logits` is wanted of a model that has no head.
        """
        inputs = {name: value for name, value in batch.items() if name in self._accepts}
        self._notes.start()
        try:
            output = self.model(**inputs)
        finally:
            kept = self._notes.stop()
        features = {tap: _read(tap, output, kept, self._encoder) for tap in self.taps}
        texts = batch.get("input_ids")
        if texts is None or self._encoder.family is not None or self.model.config.is_encoder_decoder:
            return features
        # Longformer pads a text behind its end, to whole windows, and its layers see that.
        cut = texts.shape[1]
        return {tap: value[:, :cut] if tap.startswith("hidden.") else value for tap, value in features.items()}


@contextmanager
def record(model: Any, taps: Iterable[str]) -> Iterator[TappedModel]:
    """A `TappedModel` whose hooks are gone at the end of the block."""
    tapped = TappedModel(model, taps)
    try:
        yield tapped
    finally:
        tapped.close()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model drops nothing out; then it is in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check(taps: Iterable[str], encoder: Encoder) -> None:
    depth = len(encoder.layers)
    exist = {"logits", "hidden.0"} | {f"{kind}.{layer}" for kind in encoder.kinds for layer in range(1, depth + 1)}
    unknown = [tap for tap in taps if tap not in exist]
    if unknown:
        others = "".join(f", {kind}.1 to {kind}.{depth}" for kind in encoder.kinds if kind != "hidden")
        raise ObjectiveError(
            f"no such tap in this {encoder.model.config.model_type} model: {', '.join(unknown)}",
            where="objective",
            fix=f"It has logits, hidden.0 to hidden.{depth}{others}.",
        )


def _needs(taps: Iterable[str], encoder: Encoder) -> set[str]:
    """What hooks must keep for these taps: scores need queries and keys, attention also the mask."""
    needs: set[str] = set()
    for tap in taps:
        kind, _, layer = tap.partition(".")
        if kind in ("scores", "attention"):
            needs |= {f"query.{layer}", f"key.{layer}", f"terms.{layer}"}
        elif kind != "logits":
            needs.add(tap)
    return needs


def _attach(encoder: Encoder, needs: set[str], notes: _Notes) -> list[RemovableHandle]:
    """Installs only the hooks that `needs` asks for."""
    handles = []
    depth = len(encoder.layers)
    for layer in dict.fromkeys(encoder.layers):
        numbers = [number for number, module in enumerate(encoder.layers, start=1) if module is layer]
        if needs & {name for number in numbers for name in _names(number)}:
            handles.append(layer.register_forward_pre_hook(_on_entry(numbers, needs, notes), with_kwargs=True))
            if encoder.family is not None:
                handles += _attach_attention(encoder, layer, numbers, needs, notes)
    if f"hidden.{depth}" in needs:
        normed = encoder.family is None or encoder.family.normed_end
        end = encoder.root if normed else encoder.layers[-1]
        handles.append(end.register_forward_hook(_on_end(f"hidden.{depth}", notes)))
    return handles


def _names(number: int) -> set[str]:
    """What hooks inside layer `number` can keep; what enters it is the state after the layer before."""
    return {f"hidden.{number - 1}", f"terms.{number}", *(f"{kind}.{number}" for kind in _PRODUCTS)}


def _attach_attention(
    encoder: Encoder, layer: nn.Module, numbers: list[int], needs: set[str], notes: _Notes
) -> list[RemovableHandle]:
    family = encoder.family
    if family is None:
        return []
    attention = encoder.attention(layer)
    handles = []
    fused = len(family.queries) == 1
    for kind, path in zip(_PRODUCTS, family.queries * (3 if fused else 1), strict=True):
        if needs & {f"{kind}.{number}" for number in numbers}:
            part = _PRODUCTS.index(kind) if fused else None
            handles.append(
                attention.get_submodule(path).register_forward_hook(_on_product(kind, part, numbers, needs, notes))
            )
    if needs & {f"terms.{number}" for number in numbers}:
        names = list(inspect.signature(attention.forward).parameters)
        handles.append(attention.register_forward_hook(_on_attention(names, numbers, needs, notes), with_kwargs=True))
        if family.score == "disentangled" and hasattr(attention, "pos_dropout"):
            # The relative embeddings as dropout left them: computing scores again must not draw another mask.
            hook = _on_product("relative", None, numbers, None, notes)
            handles.append(attention.get_submodule("pos_dropout").register_forward_hook(hook))
    return handles


# Hooks are closures: a deep copy of the model shares them, and they stay silent in it.


def _current(numbers: list[int], notes: _Notes) -> int:
    """The number of the layer that is running: a shared layer counts its turns."""
    return numbers[min(notes.turns.get(numbers[0], 1), len(numbers)) - 1]


def _on_entry(numbers: list[int], needs: set[str], notes: _Notes) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if notes.kept is None:
            return
        notes.turns[numbers[0]] = notes.turns.get(numbers[0], 0) + 1
        name = f"hidden.{_current(numbers, notes) - 1}"
        if name in needs:
            notes.keep(name, args[0] if args else kwargs["hidden_states"])

    return hook


def _on_end(name: str, notes: _Notes) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        notes.keep(name, output if isinstance(output, Tensor) else output[0])

    return hook


def _on_product(kind: str, part: int | None, numbers: list[int], needs: set[str] | None, notes: _Notes) -> Hook:
    """Keeps the output of a linear layer, or third number `part` of a fused one."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        name = f"{kind}.{_current(numbers, notes)}"
        if notes.kept is not None and (needs is None or name in needs):
            notes.keep(name, output if part is None else output.chunk(3, dim=-1)[part])

    return hook


def _on_attention(names: list[str], numbers: list[int], needs: set[str], notes: _Notes) -> Hook:
    """Keeps what the attention was given besides the states: mask, position bias, rotation."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = f"terms.{_current(numbers, notes)}"
        if notes.kept is not None and name in needs:
            terms = {**dict(zip(names, args, strict=False)), **kwargs}
            if "position_bias" in terms and terms["position_bias"] is None and len(output) > 1:
                terms["position_bias"] = output[1]  # T5's first layer computes it and hands it on
            notes.keep(name, terms)

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _read(tap: str, output: Any, kept: Mapping[str, Any], encoder: Encoder) -> Tensor:
    kind, _, layer = tap.partition(".")
    if kind == "logits":
        logits = getattr(output, "logits", None)
        if getattr(output, "image_embeds", None) is not None:
            return torch.cat([output.text_embeds, output.image_embeds], dim=-1)  # (B, 2P)
        if logits is None and getattr(output, "start_logits", None) is not None:
            return torch.stack([output.start_logits, output.end_logits], dim=-1)  # (B, L, 2)
        if logits is None:
            raise ObjectiveError(
                f"{type(encoder.model).__name__} returns no logits",
                where="objective",
                fix="Load it with its head, such as AutoModelForSequenceClassification.",
            )
        return logits
    if kind not in ("scores", "attention"):
        return kept[tap]
    attention = encoder.attention(encoder.layers[int(layer) - 1])
    scores_BALL = _scores(int(layer), kept, encoder, attention)
    return scores_BALL if kind == "scores" else _softmax(scores_BALL, kept[f"terms.{layer}"], encoder, attention)


def _scores(layer: int, kept: Mapping[str, Any], encoder: Encoder, attention: Any) -> Tensor:
    """(B, A, L, L) in fp32: what the softmax is given, less the mask."""
    heads = int(own_config(encoder.model.config).num_attention_heads)
    terms = kept[f"terms.{layer}"]
    q_BALD, k_BALD = (kept[f"{kind}.{layer}"].unflatten(-1, (heads, -1)).transpose(1, 2) for kind in ("query", "key"))
    score = encoder.family.score if encoder.family else "dot"
    if score == "disentangled":
        return _disentangled(
            q_BALD, k_BALD, terms.get("relative_pos"), kept.get(f"relative.{layer}"), attention
        ).float()
    if score == "rotary":
        q_BALD, k_BALD = (_rotate(x, *terms["position_embeddings"]) for x in (q_BALD, k_BALD))
    with torch.autocast(q_BALD.device.type, enabled=False):
        scaling = getattr(attention, "scaling", q_BALD.shape[-1] ** -0.5)
        scores_BALL = q_BALD.float() @ k_BALD.float().transpose(-1, -2) * scaling
    bias = terms.get("position_bias") if score == "bias" else None
    return scores_BALL if bias is None else scores_BALL + bias.float()


def _rotate(x_BALD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: transformers' `apply_rotary_pos_emb`; cos and sin are (1 or B, L, d)."""
    first, second = x_BALD.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BALD.float() * cos.unsqueeze(1).float() + turned * sin.unsqueeze(1).float()


def _disentangled(q_BALD: Tensor, k_BALD: Tensor, positions: Any, relative: Tensor | None, attention: Any) -> Tensor:
    """DeBERTa's content-to-content, content-to-position and position-to-content scores (2006.03654, equation 4)."""
    terms = 1 + sum(kind in attention.pos_att_type for kind in ("c2p", "p2c"))
    q, k = q_BALD.flatten(0, 1), k_BALD.flatten(0, 1)  # (B*A, L, d)
    scores = torch.bmm(q, k.transpose(-1, -2)) * (terms * q.shape[-1]) ** -0.5
    if relative is not None:
        scores = scores + attention.disentangled_attention_bias(q, k, positions, relative, terms)
    return scores.unflatten(0, q_BALD.shape[:2])


def _softmax(scores_BALL: Tensor, terms: Mapping[str, Any], encoder: Encoder, attention: Any) -> Tensor:
    """Attention weights under the mask that the model itself used."""
    family = encoder.family
    mask = terms.get(family.mask) if family else None
    lowest = torch.finfo(scores_BALL.dtype).min
    if mask is None:
        if getattr(attention, "is_causal", False):
            keep = torch.ones_like(scores_BALL, dtype=torch.bool).tril()
            scores_BALL = scores_BALL.masked_fill(~keep, lowest)
    elif mask.dim() != 4:
        raise ObjectiveError(
            f"attention.k needs a mask of 4 dimensions; attn_implementation "
            f"{encoder.model.config._attn_implementation!r} gives one of {mask.dim()}",
            where="objective",
            fix='Load the model with attn_implementation="sdpa".',
        )
    elif mask.is_floating_point() and family and family.score != "disentangled":
        scores_BALL = scores_BALL + mask.float()
    else:
        scores_BALL = scores_BALL.masked_fill(~mask.bool(), lowest)
    return scores_BALL.softmax(dim=-1)
