"""A model's parts by their names: its encoder, its layers, its head."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from distill.student.shape import depth

Part = Literal["embeddings", "layers", "head"]


def part_of(model: PreTrainedModel, parameter: str) -> Part:
    """The part of a model that a parameter's name belongs to; poolers count as head."""
    base = base_name(model)
    if base and not parameter.startswith(f"{base}."):
        return "head"
    child = parameter.removeprefix(f"{base}.").split(".")[0]
    if child.startswith("embed") or isinstance(getattr(model.base_model, child, None), nn.Embedding):
        return "embeddings"
    return "head" if "pool" in child or child in ("classifier", "score", "lm_head") else "layers"


def base_name(model: PreTrainedModel) -> str:
    """Name of the encoder inside a model with a head; empty when the model is the encoder itself."""
    return next(name for name, module in model.named_modules() if module is model.base_model)


def layer_stack(model: PreTrainedModel) -> str:
    """Name of the list that holds the model's layers; empty where layers share their weights (ALBERT)."""
    return next(
        (
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == depth(model.config) and "group" not in name
        ),
        "",
    )


def decoder_stack(model: PreTrainedModel) -> str:
    """Name of the list that holds the layers of a decoder behind an encoder; empty where there is none."""
    return layer_stack(model).replace("encoder.", "decoder.", 1) if model.config.is_encoder_decoder else ""


def final_linear(model: PreTrainedModel) -> str:
    """Name of the product that gives one logit for each label; empty where there is none."""
    labels = model.config.num_labels
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == labels and part_of(model, name) == "head"
    ]
    return found[-1] if found else ""
