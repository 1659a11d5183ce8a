"""Which implementation of attention a model runs with, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    before = [(part, own) for part in parts.values() if (own := part.config._attn_implementation) is not None]
    try:
        _tell((part, implementation if where(own) else own) for part, own in before)
        yield
    finally:
        _tell(before)


def _tell(wanted: Iterable[tuple[PreTrainedModel, str]]) -> None:
    """Sets what is not so yet, from the outside in: what a model is told, it passes on to those inside."""
    for part, implementation in wanted:
        if part.config._attn_implementation != implementation:
            part.set_attn_implementation(implementation)
