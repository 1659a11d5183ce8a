"""Compress a fine-tuned Transformer into a small, verified int8 ONNX bundle.

    from distill import Recipe, compress

    result = compress(Recipe.load("recipe.toml"))

Importing this package loads no torch: each name below is fetched when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.errors import DistillError
    from distill.export.runtime import Bundle
    from distill.pipeline import compress, finetune
    from distill.recipe import Recipe
    from distill.training.fit import DistillationTrainer

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "distill.export.runtime",
    "DistillError": "distill.errors",
    "DistillationTrainer": "distill.training.fit",
    "Recipe": "distill.recipe",
    "compress": "distill.pipeline",
    "finetune": "distill.pipeline",
}

__all__ = [
    "Bundle",
    "DistillError",
    "DistillationTrainer",
    "Recipe",
    "__version__",
    "compress",
    "finetune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
