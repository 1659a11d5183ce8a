"""Where the time of training goes: every moment belongs to one part of a step, and the parts add up to the whole."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from distill.machine import peak_bytes
from distill.training.products import count_products

PARTS = ("data", "teacher", "student", "losses", "backward", "clipping", "optimiser", "measuring", "rest")
"""In the order of a step. `measuring` is evaluation, checkpoints and logging; `rest` is the loop around it all."""


class StepClock(TrainerCallback):
    """Counts seconds by part, and the rows and tokens that were trained on.

    On a GPU the parts are those of the processor, which runs ahead of the card, unless `wait` is set.

    Args:
        wait: Wait for the card at the end of every part: true parts, slower steps.
    """

    def __init__(self, *, wait: bool = False) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.rows = self.tokens = self.pairs = self.padded = self.steps = 0
        self._on_card: Tensor | None = None
        self._wait = wait and torch.cuda.is_available()
        self._now, self._since = "rest", time.perf_counter()

    def _turn(self, part: str) -> str:
        """Charges the time until now to the part that ends; gives its name."""
        if self._wait:
            torch.cuda.synchronize()
        now, before = time.perf_counter(), self._now
        self.seconds[before] += now - self._since
        self._now, self._since = part, now
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time inside belongs to `name`, but for what a part inside it takes."""
        before = self._turn(name)
        try:
            yield
        finally:
            self._turn(before)

    def count(self, mask: Tensor) -> None:
        """One batch, by its attention mask (B, L); on a card nothing waits for the sums."""
        lengths = mask.sum(1)
        self.rows += len(mask)
        self.padded += mask.numel()
        sums = torch.stack([lengths.sum(), (lengths * lengths).sum()])
        self._on_card = sums if self._on_card is None else self._on_card + sums
        if mask.device.type == "cpu":
            self._fetch()

    def _fetch(self) -> None:
        tokens, pairs = (0, 0) if self._on_card is None else self._on_card.tolist()
        self.tokens, self.pairs, self._on_card = self.tokens + tokens, self.pairs + pairs, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins anew: what was before is no training."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._now, self._since = "rest", time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser's step begins."""
        self._turn("optimiser")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser's step is done."""
        self._turn("rest")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logging, measuring and saving follow."""
        self.steps += 1
        self._turn("measuring")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """They are over."""
        self._turn("rest")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Charges the last part."""
        self._turn("rest")

    def table(self) -> list[list[str]]:
        """Part, milliseconds a step, share."""
        whole = sum(self.seconds.values()) or 1.0
        steps = max(1, self.steps)
        return [[part, f"{1e3 * took / steps:.1f}", f"{took / whole:.1%}"] for part, took in self.seconds.items()]

    def facts(self, model: Any, *, bf16: bool) -> dict[str, Any]:
        """Speed of this process: nothing of what a run did before it was killed.

        Args:
            model: The trained model, for the products that a row takes.
            bf16: In which precision they ran.

        Returns:
            `samples_per_second`, without measuring and saving; `flops_per_token` (forward and backward, products of
            linear layers and of attention, where they learn); `flops_share`, of what one large product reaches on this
            device (MFU); `padding`, the share of positions that held no token; `peak_bytes`; `seconds` by part.
        """
        took = sum(took for part, took in self.seconds.items() if part != "measuring")
        self._fetch()
        if not self.rows or not took:
            return {}
        flops = 3 * count_products(model, learning=True).forward(self.rows, self.tokens, self.pairs)
        device = next(model.parameters()).device
        reached = flops / took
        return {
            "samples_per_second": round(self.rows / took, 1),
            "flops_per_token": round(flops / self.tokens),
            "flops_share": round(reached / peak_flops(device, bf16=bf16), 3),
            "padding": round(1 - self.tokens / self.padded, 3),
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_bytes(),
            "seconds": {part: round(value, 3) for part, value in self.seconds.items()},
        }


def peak_flops(device: torch.device, *, bf16: bool) -> float:
    """Operations a second of one large matrix product here, with the threads this process has; the best of a few."""
    size = 8192 if device.type == "cuda" else 768
    one = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        _ = one @ one
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def speed_lines(facts: Mapping[str, Any]) -> list[str]:
    """What `StepClock.facts` comes to, in words; nothing where nothing was trained."""
    if not facts:
        return []
    peak = f", {facts['peak_bytes'] / 1e9:.2f} GB at most" if facts["peak_bytes"] else ""
    return [
        f"{facts['samples_per_second']:,.0f} samples/s a process, {facts['flops_share']:.0%} of what a large product "
        f"reaches here, {facts['padding']:.1%} padding{peak}"
    ]
