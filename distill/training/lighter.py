"""What makes the steps of a run lighter, in time or in memory, for as long as the run lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from distill.encoders import token_embedding
from distill.errors import TrainingError
from distill.recipe import TrainingRecipe
from distill.training.frozen import frozen
from distill.training.quick import quick


@contextmanager
def lighter(student: Any, settings: TrainingRecipe, *, on_processor: bool) -> Iterator[None]:
    """Within the block the student's steps are what `settings` make them; after it, it is as before.

    Args:
        student: A transformers model. What is frozen stays so after the block.
        settings: Of the recipe.
        on_processor: It is trained on the CPU: where a student is now says nothing, the Trainer moves it.

    Raises:
        TrainingError: Layers are computed again, or frozen, that this model does not have so.
    """
    with ExitStack() as stack:
        stack.enter_context(all_layers(student))
        if settings.threads and on_processor:
            stack.enter_context(threads(settings.threads))
        if settings.freeze_embeddings:
            token_embedding(student).requires_grad_(False)
        if settings.compile:
            stack.enter_context(compiled(student))
        elif on_processor:
            stack.enter_context(quick(student))
        if settings.freeze_layers:  # the modules that are there now: quick ones stand in the place of others
            stack.enter_context(frozen(student, settings.freeze_layers))
        if settings.gradient_checkpointing:
            stack.enter_context(recomputed(student))
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block PyTorch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def all_layers(student: Any) -> Iterator[None]:
    """Within the block every layer runs: BART and its kin can leave some out at random (LayerDrop, 1909.11556).

    A small student has none to spare, and a layer that did not run has no states to learn from.
    """
    dropped = [(part, part.layerdrop) for part in student.modules() if getattr(part, "layerdrop", 0.0)]
    for part, _ in dropped:
        part.layerdrop = 0.0
    try:
        yield
    finally:
        for part, share in dropped:
            part.layerdrop = share


@contextmanager
def recomputed(student: Any) -> Iterator[None]:
    """Within the block a layer keeps its input alone and is computed again on the way back (1604.06174).

    Gradients are the same bit for bit, dropout included: its random state is kept too. Hooks that record what passes by
    do so the first time, since they are silent on the way back.

    Raises:
        TrainingError: transformers cannot do it for this model.
    """
    if not getattr(student, "supports_gradient_checkpointing", False):
        raise TrainingError(
            f"{type(student).__name__} cannot compute its layers again",
            where="training",
            fix="Set training.gradient_checkpointing = false.",
        )
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    student.disable_input_require_grads()  # switched on for adapters, and a way back through what is frozen
    try:
        yield
    finally:
        student.gradient_checkpointing_disable()


@contextmanager
def compiled(student: Any, backend: str = "inductor") -> Iterator[None]:
    """Within the block the student runs compiled, for batches of any shape; names of its weights stay what they are.

    Args:
        student: A transformers model.
        backend: Of `torch.compile`.
    """
    student.compile(dynamic=True, backend=backend)
    try:
        yield
    finally:
        student._compiled_call_impl = None
