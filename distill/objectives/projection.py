"""Linear maps from student width to teacher width. They help training and are thrown away with the objective."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Sharing = Literal["layer", "shared"]
"""One projection for each mapped student layer (TextBrewer, TinyBERT's second checkpoints), or one for all of a term
(TinyBERT's first)."""

Init = Literal["normal", "xavier", "orthogonal"]
"""`normal`: N(0, 0.02) and a bias of 0 (TextBrewer, TinyBERT). `xavier`: uniform, no bias (DistillKit). `orthogonal`:
keeps lengths and angles of what it maps, no bias."""

SHARINGS: tuple[str, ...] = get_args(Sharing)
INITS: tuple[str, ...] = get_args(Init)


def make_projection(student_width: int, teacher_width: int, init: Init, generator: torch.Generator) -> nn.Linear:
    """A linear map (..., student_width) -> (..., teacher_width), drawn from `generator` alone.

    The global generator is left as it is: an objective must not change the dropout of what is trained with it.
    """
    bias = init == "normal"
    # Empty at first: nn.Linear's own start would draw from the global generator.
    layer = nn.Linear(student_width, teacher_width, bias=bias, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        if init == "normal":
            layer.weight.normal_(0.0, 0.02, generator=generator)
            layer.bias.zero_()
        elif init == "xavier":
            nn.init.xavier_uniform_(layer.weight, generator=generator)
        else:
            nn.init.orthogonal_(layer.weight, generator=generator)
    return layer


class Projections(nn.Module):
    """The projections of one term.

    Args:
        layers: Student layers that are mapped.
        student_width: H of the student.
        teacher_width: H of the teacher.
        sharing: One for each layer, or one for all.
        init: How they start.
        seed: With `name`, decides the starting weights.
        name: The term's.
    """

    def __init__(
        self,
        layers: list[int],
        student_width: int,
        teacher_width: int,
        *,
        sharing: Sharing = "layer",
        init: Init = "normal",
        seed: int = 0,
        name: str = "",
    ) -> None:
        super().__init__()
        self.shared = sharing == "shared"
        keys = ["all"] if self.shared else [str(layer) for layer in sorted(set(layers))]
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        self.maps = nn.ModuleDict({key: make_projection(student_width, teacher_width, init, generator) for key in keys})

    @property
    def last(self) -> nn.Linear:
        """That of the highest layer."""
        key = max(self.maps, key=lambda layer: -1 if layer == "all" else int(layer))
        found = self.maps[key]
        assert isinstance(found, nn.Linear)
        return found

    def forward(self, feature_BLH: Tensor, layer: int) -> Tensor:
        """The student's feature of `layer` at the teacher's width, (B, L, H teacher)."""
        linear = self.maps["all" if self.shared else str(layer)]
        projected: Tensor = linear(feature_BLH.to(next(linear.parameters()).dtype))
        return projected
