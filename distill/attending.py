"""Which implementation of attention a model runs with, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel


@contextmanager
def attending(model: Any, implementation: str, where: Callable[[str], bool]) -> Iterator[None]:
    """Within the block, the model and all models in it attend by `implementation`; after it, as before.

    Each is told by itself: transformers 5.17 passes no word on to parts whose configuration is of the same class, as
    those of T5's two stacks are.

    Args:
        model: A transformers model.
        implementation: As `set_attn_implementation` takes it.
        where: From the implementation that a part has now to whether it is to change.
    """
    parts: dict[int, PreTrainedModel] = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            parts.setdefault(id(part.config), part)
    before = [(part, part.config._attn_implementation) for part in parts.values()]
    changed = [(part, own) for part, own in before if own is not None and where(own)]
    for part, _ in changed:
        part.set_attn_implementation(implementation)
    try:
        yield
    finally:
        for part, own in changed:
            part.set_attn_implementation(own)
