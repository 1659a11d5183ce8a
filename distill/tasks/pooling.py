"""From a text's hidden states to its vector, and how sentence-transformers writes that beside a model.

A vector is pooled, perhaps brought to another width by a linear map (`sentence_projection`, a part of the model that
training kept), and brought to length 1. What pools stands in the model's config as `sentence_pooling`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.errors import TeacherError
from distill.files import write_json

POOLINGS = {"mean": "mean", "cls": "first", "max": "max", "lasttoken": "last"}
"""By sentence-transformers' name, what losses call it."""
MODES = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
"""Names in its older files that differ from those."""
FOLDER, WEIGHTS, IDENTITY = "2_Dense", "2_Dense/model.safetensors", "torch.nn.modules.linear.Identity"


def pooling_of(config: Any) -> str:
    """A key of `POOLINGS`."""
    return str(getattr(config, "sentence_pooling", "mean"))


def vectors(model: Any, states: Any, mask: Any) -> Any:
    """(B, H) fp32 of length 1 from the hidden states (B, L, H) of `model`; padding does not reach them."""
    import torch

    kind = pooling_of(model.config)
    if kind == "cls":
        pooled = states[:, 0]
    elif kind == "max":
        pooled = states.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(torch.float32).min).amax(1)
    elif kind == "lasttoken":
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        pooled = states.gather(1, last[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)
    else:
        weight = mask.unsqueeze(-1).to(states.dtype)
        pooled = (states * weight).sum(1) / weight.sum(1).clamp(min=1.0)
    projection = getattr(model, "sentence_projection", None)
    if projection is not None:
        pooled = projection(pooled)
    return pooled / pooled.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def read_pooling(beside: Mapping[str, Any]) -> list[str]:
    """The poolings that a checkpoint's files name; one where it is usual, none where they name none."""
    given = beside.get("1_Pooling/config.json", {})
    names = [name.removeprefix("pooling_mode_") for name, on in given.items() if on is True and "_mode_" in name]
    names += [str(given["pooling_mode"])] if "pooling_mode" in given else []
    return list(dict.fromkeys(MODES.get(name, name) for name in names))


def files(model: Any, max_length: int) -> dict[str, Any]:
    """What sentence-transformers reads beside a model, by path: its steps, and how each is set."""
    dense = getattr(model, "sentence_projection", None)
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense is not None else []), "Normalize"]
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": f"{place}_{kind}" if place else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, kind in enumerate(kinds)
    ]
    modes = {name: pooling_of(model.config) == kind for name, kind in (*MODES.items(), ("lasttoken", "lasttoken"))}
    found = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "1_Pooling/config.json": {
            "word_embedding_dimension": model.config.hidden_size,
            **{f"pooling_mode_{name}": on for name, on in modes.items()},
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    if dense is not None:
        found[f"{FOLDER}/config.json"] = {
            "in_features": dense.in_features,
            "out_features": dense.out_features,
            "bias": dense.bias is not None,
            "activation_function": IDENTITY,
        }
    return found


def save(model: Any, folder: Path) -> None:
    """Writes the model as transformers reads it, and its projection as sentence-transformers reads it."""
    import safetensors.torch

    own = {name: value for name, value in model.state_dict().items() if not name.startswith("sentence_projection.")}
    model.save_pretrained(folder, state_dict=own)
    dense = getattr(model, "sentence_projection", None)
    if dense is not None:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        tensors = {f"linear.{name}": value.detach().cpu().contiguous() for name, value in dense.state_dict().items()}
        safetensors.torch.save_file(tensors, folder / WEIGHTS)


def restore(model: Any, beside: Mapping[str, Any], find: Callable[[str], Path | None]) -> None:
    """Gives a loaded model its pooling and its projection back.

    Raises:
        TeacherError: It has a projection whose weights are no safetensors.
    """
    import safetensors.torch
    from torch import nn

    for kind in read_pooling(beside):
        model.config.sentence_pooling = kind
    given, weights = beside.get(f"{FOLDER}/config.json"), find(WEIGHTS)
    if given and not weights:
        raise TeacherError(
            f"its Dense layer has no {WEIGHTS}",
            where=str(getattr(model, "name_or_path", "") or FOLDER),
            fix="Load it with sentence-transformers and save it again: weights are read from safetensors alone.",
        )
    if given and weights:
        dense = nn.Linear(given["in_features"], given["out_features"], bias=given["bias"])
        tensors = safetensors.torch.load_file(weights)
        dense.load_state_dict({name.removeprefix("linear."): value for name, value in tensors.items()})
        model.sentence_projection = dense


def write_files(model: Any, folder: Path, max_length: int) -> None:
    """`files`, written."""
    for name, value in files(model, max_length).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, value)
