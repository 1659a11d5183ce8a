"""The same training step on a processor with less time in random numbers.

Dropout on a CPU spends nine tenths of its time drawing one number for each value, and attention with dropout takes
PyTorch's plain path, which also looks for rows without any token. Here four values share one draw of 64 bits from
PyTorch's own generator, so that a resume finds the generator where it was, and attention is two products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from distill.attending import attending

NAME = "distill_quick"
"""What transformers calls our attention."""

PLAIN_UP_TO = 192
"""Tokens up to which plain products learn faster in bf16 than PyTorch's fused attention.

With its way back the fused one takes 1.8 to 9 times as long up to 128 tokens, as long at 200, and a third at 512.
"""

_KINDS = (torch.bfloat16, torch.float16, torch.float32)


class _Dropout(torch.autograd.Function):
    """Draws 16 bits a value. Of 16 bits itself it is kept by `and` with all ones; of 32 it is chosen."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float) -> Tensor:
        draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
        lanes = draws.random_(-(2**63), None).view(torch.int16)[: values.numel()].view(values.shape)
        if values.element_size() == 2:
            # Below the threshold the difference is positive and shifts to 0, from it on negative, and to all ones.
            keep = torch.bitwise_right_shift(round(share * 2**15) - 1 - lanes.bitwise_and_(2**15 - 1), 15)
        else:
            keep = lanes >= min(round(share * 2**16) - 2**15, 2**15 - 1)
        ctx.save_for_backward(keep)
        ctx.scale = 1.0 / (1.0 - share)
        return _masked(values, keep, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors
        return _masked(gradients[0], keep, ctx.scale), None


def _masked(values: Tensor, keep: Tensor, scale: float) -> Tensor:
    if keep.dtype == torch.bool:
        return torch.where(keep, values, 0.0).mul_(scale)
    return torch.bitwise_and(values.contiguous().view(keep.dtype), keep).view(values.dtype).mul_(scale)


def dropout(values: Tensor, share: float) -> Tensor:
    """Each value is 0 with probability `share`, to the nearest 2^-15 (fp32: 2^-16), and else divided by `1 - share`.

    Args:
        values: Of any shape, in fp32, fp16 or bf16 on the CPU.
        share: In [0, 1).
    """
    dropped: Tensor = _Dropout.apply(values, share)  # type: ignore[no-untyped-call]
    return dropped


class QuickDropout(nn.Dropout):
    """`nn.Dropout` that draws as `dropout` does."""

    def forward(self, input: Tensor) -> Tensor:
        """The same as `nn.Dropout`, with other random numbers."""
        if not self.training or not 0.0 < self.p < 1.0 or input.dtype not in _KINDS or input.device.type != "cpu":
            return super().forward(input)
        return dropout(input, self.p)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, (B, A, L, D) to (B, L, A, D); what it is not meant for goes to sdpa."""
    plain = all(more.get(name) is None for name in ("position_bias", "cache", "softcap", "is_causal"))
    causal = attention_mask is None and getattr(module, "is_causal", True)
    meant = query.device.type == "cpu" and query.dtype in _KINDS and key.shape[1] == query.shape[1]
    slow = query.dtype == torch.bfloat16 and torch.is_grad_enabled() and key.shape[2] <= PLAIN_UP_TO
    fused = dropout == 0.0 and not slow
    if fused or causal or not plain or not meant:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    scores_BALL = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), key.transpose(-1, -2))
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            lowest = torch.finfo(scores_BALL.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=scores_BALL.dtype).masked_fill_(
                ~attention_mask, lowest
            )
        scores_BALL = scores_BALL + attention_mask
    # A bf16 softmax over rows that are no multiple of 32 long takes four times as long as one in fp32, its way back 10.
    weights_BALL = scores_BALL.float().softmax(-1).to(value.dtype)
    if dropout > 0.0:
        weights_BALL = _Dropout.apply(weights_BALL, dropout)  # type: ignore[no-untyped-call]
    return torch.matmul(weights_BALL, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def quick(model: Any) -> Iterator[None]:
    """Within the block the model drops out and attends as above; after it, as before. Only on the CPU.

    Args:
        model: A transformers model; one with an attention of its own keeps it.
    """
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    swapped = [(name, part) for name, part in model.named_modules() if type(part) is nn.Dropout]
    for name, part in swapped:
        model.set_submodule(name, QuickDropout(part.p).train(part.training))
    try:
        with attending(model, NAME, lambda own: own == "sdpa"):
            yield
    finally:
        for name, part in swapped:
            model.set_submodule(name, part.train(model.training))
