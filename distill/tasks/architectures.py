"""What transformers says of an architecture by its name: what loads it, and what it reads. No weights are touched."""

from __future__ import annotations

import inspect
from typing import Any


def loads(auto_class: str, architecture: str) -> bool:
    """Whether the class of transformers called `auto_class` loads models of an architecture."""
    import transformers

    mapping = getattr(getattr(transformers, auto_class, None), "_model_mapping", None)
    if mapping is None:  # a class of its own
        return auto_class == architecture
    names = mapping._model_mapping.values()  # by name: the classes themselves would all be imported
    return any(architecture == name or (isinstance(name, tuple) and architecture in name) for name in names)


def modalities(architecture: str) -> frozenset[str]:
    """What an architecture reads, `text` and `image` among others; nothing where transformers has none of this name."""
    made = _class(architecture)
    if made is None:
        return frozenset()
    named = getattr(made, "input_modalities", "text")
    found = frozenset((named,) if isinstance(named, str) else named)
    main = str(getattr(made, "main_input_name", "input_ids"))
    kinds = {"input_ids": "text", "pixel_values": "image"}
    # Where a class names no modality, `text` is the default even of one that is fed pixels.
    return found if kinds.get(main, main) in found else frozenset({kinds.get(main, main)})


def decodes(architecture: str) -> bool:
    """Whether an encoder's decoder is part of it: what it returns is said of another text than the one it reads."""
    made = _class(architecture)
    return made is not None and "decoder_input_ids" in inspect.signature(made.forward).parameters


def _class(architecture: str) -> Any:
    import transformers

    try:
        return getattr(transformers, architecture, None)
    except (ImportError, AttributeError):  # a class that needs what is not installed
        return None
