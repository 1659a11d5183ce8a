"""On-policy distillation: the student writes part of a batch itself, and learns from what its teacher says of that.

A student that has only ever read human text is asked, once it writes, about texts that it never saw. Generalised
knowledge distillation (Agarwal et al. 2024, 2306.13649) lets it write some of its batches (their lambda, `share` here).
Which ones, and every token drawn, follow from (seed, step, number in the step's window, process) and the weights: a run
that was interrupted draws the same. Torch's own generator, which dropout reads, is not touched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.features import evaluating
from distill.recipe import OnPolicyRecipe

NO_LABEL = -100


class OnPolicy:
    """Rewrites batches of token ids.

    Args:
        recipe: How often, from which part on, at which temperature.
        ends: Ids that end a text.
        padding: Id that stands behind an end.
        seed: Of the run.
    """

    def __init__(self, recipe: OnPolicyRecipe, *, ends: Collection[int], padding: int, seed: int) -> None:
        self._recipe, self._ends, self._padding, self._seed = recipe, sorted(ends), padding, seed

    def __call__(self, model: Any, batch: Mapping[str, Tensor], *place: int) -> dict[str, Tensor]:
        """The batch as it is or, for `share` of the places, with a continuation by `model`.

        Args:
            model: The student; it is run in evaluation mode and left as it was.
            batch: `input_ids`, `attention_mask` (B, L), whatever else stays.
            place: Step, number in the step's window, process.
        """
        draw = np.random.default_rng([self._seed, *place])
        if draw.random() >= self._recipe.share:
            return dict(batch)
        begin = max(1, int(self._recipe.prompt * int(batch["attention_mask"].sum(1).min())))
        ids = batch["input_ids"]
        if begin >= ids.shape[1]:
            return dict(batch)
        generator = torch.Generator(ids.device).manual_seed(int(draw.integers(2**62)))
        with evaluating(model):
            written, mask = self._write(model, ids[:, :begin], ids.shape[1], generator)
        # A position is scored for the token behind it: those that were drawn, an end included.
        scored = torch.zeros_like(mask, dtype=torch.bool)
        scored[:, begin - 1 : -1] = mask[:, begin:].bool()
        return {
            **batch,
            "input_ids": written,
            "attention_mask": mask,
            "scored": scored,
            "labels": torch.full_like(batch["labels"], NO_LABEL),  # its own words are no gold
        }

    @torch.no_grad()
    def _write(self, model: Any, prompt: Tensor, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, length) behind a prompt without padding, drawn from the model's own distribution."""
        ids, mask, past = prompt, torch.ones_like(prompt), None
        alive = torch.ones_like(prompt[:, :1])
        ends = torch.tensor(self._ends, dtype=ids.dtype, device=ids.device)
        given = prompt
        while ids.shape[1] < length:
            output = model(input_ids=given, attention_mask=mask, past_key_values=past, use_cache=True)
            past = output.past_key_values
            chances = (output.logits[:, -1].float() / self._recipe.temperature).softmax(-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            given = torch.where(alive.bool(), drawn, self._padding)
            ids, mask = torch.cat([ids, given], 1), torch.cat([mask, alive], 1)
            alive = alive * ~torch.isin(given, ends)
        return ids, mask
