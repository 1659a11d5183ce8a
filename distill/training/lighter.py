"""What makes the steps of a run lighter, in time or in memory, for as long as the run lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from distill.encoders import find_encoder, token_embedding
from distill.errors import TrainingError
from distill.recipe import TrainingRecipe
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


@contextmanager
def frozen(student: Any, layers: int) -> Iterator[None]:
    """Within the block the embeddings and first layers neither learn nor drop out: the way back ends above them.

    Args:
        student: A transformers model.
        layers: How many.

    Raises:
        TrainingError: It has no more layers than that.
    """
    encoder = find_encoder(student)
    if layers >= len(encoder.layers) or encoder.layers[layers] in encoder.layers[:layers]:
        most = len(set(encoder.layers)) - 1
        raise TrainingError(
            f"`training.freeze_layers` is {layers}, the student has {most + 1} layers of its own",
            where="training",
            fix=f"Set it to {most}{' or less' if most else ''}: something must learn.",
        )
    parts = [*below(student), *encoder.layers[:layers]]
    for part in parts:
        part.requires_grad_(False)
        part.eval()
        object.__setattr__(part, "train", lambda mode=True, part=part: part)  # the Trainer asks the whole model to
    try:
        yield
    finally:
        for part in parts:
            object.__delattr__(part, "train")
            part.train(student.training)


EARLY = ("layernorm_embedding",)
"""What BART and its kin run before their layers, though it stands behind them."""


def below(student: Any) -> list[Any]:
    """The modules of the encoder that run before its first layer: all that holds no layer and stands before them."""
    encoder = find_encoder(student)
    first = next(iter(encoder.layers[0].parameters()))
    found: list[Any] = []
    holder = student.base_model
    while True:  # down to the first layer: each module that stands before it on the way
        found += [part for name, part in holder.named_children() if name in EARLY]
        for name, part in holder.named_children():
            if any(value is first for value in part.parameters()):
                holder = part
                break
            if name not in EARLY:
                found.append(part)
        if holder is encoder.layers[0]:
            return found


def check_copies(student: Any, teacher: Any, layers: int) -> None:
    """Refuses to freeze what is not the teacher's own.

    Args:
        student: Before its first step.
        teacher: The model that it was made from.
        layers: How many of its first layers are to be frozen, with all that runs before them.

    Raises:
        TrainingError: One of them differs from the teacher's of the same number.
    """
    mine, theirs = find_encoder(student).layers, find_encoder(teacher).layers
    pairs = [("embeddings", one, other) for one, other in zip(below(student), below(teacher), strict=False)]
    pairs += [(f"layer {n}", one, other) for n, (one, other) in enumerate(zip(mine, theirs, strict=False), 1)][:layers]
    for name, one, other in pairs:
        ours, its = one.state_dict(), other.state_dict()
        if ours.keys() != its.keys() or any(not torch.equal(ours[key], its[key]) for key in ours):
            raise TrainingError(
                f"`training.freeze_layers` is {layers}, and the student's {name} is no copy of the teacher's",
                where="training",
                fix='Set it to 0, or let the student begin with the teacher\'s first layers: inherit_layers = "first", '
                'vocabulary = "full".',
            )
