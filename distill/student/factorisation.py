"""A narrow embedding table and a product that widens it again, in place of a wide table.

Teacher: LN(word + position + segment), then its own widening product where it has one. Student: the same at width r,
and then a product r -> H. LN(x) is nearly linear, since x has nearly the same deviation s for all tokens:
f(x) = g (x - mean(x)) / s. So rows f(word) of all tokens, through the teacher's own product, are cut to their r
strongest directions (SVD), tables become coordinates there, and the product leads back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
_PRODUCTS = {"electra": "embeddings_project", "albert": "encoder.embedding_hidden_mapping_in"}
"""By family, the product that widens a narrow embedding."""


@dataclass(frozen=True, slots=True)
class Factorised:
    """Tables and product of a narrower embedding, by their names in the student's encoder.

    Attributes:
        values: Parameters, fp32.
        kept: Share of what told the tokens apart (variance of their rows) that the narrower table holds.
    """

    values: Mapping[str, Tensor]
    kept: float


def product_of(family: str) -> str:
    """Name of the product that widens a narrow embedding, inside the encoder; empty where a family has none."""
    return _PRODUCTS.get(family, "")


@torch.no_grad()
def factorise(source: Mapping[str, Tensor], rank: int, *, product: str, teacher_product: str = "") -> Factorised:
    """Cuts an embedding to `rank` numbers a token.

    Args:
        source: The teacher's parameters by their name inside its encoder, such as
            `embeddings.word_embeddings.weight`.
        rank: r, less than the width of the tables.
        product: Where the student keeps its widening product.
        teacher_product: Where the teacher keeps its own; empty where it has none.
    """
    tables = {name: source[key].float() for name in _TABLES if (key := f"embeddings.{name}.weight") in source}
    gain, shift = (source[f"embeddings.LayerNorm.{kind}"].float() for kind in ("weight", "bias"))
    word_VE = tables["word_embeddings"]
    usual_E = torch.stack([table.mean(0) for name, table in tables.items() if name != "word_embeddings"]).sum(0)
    deviation = (word_VE + usual_E).std(-1, unbiased=False).mean()
    widen_HE = source.get(f"{teacher_product}.weight", torch.eye(len(gain)).to(gain)).float()

    def through(rows_NE: Tensor) -> Tensor:
        centred = rows_NE - rows_NE.mean(-1, keepdim=True)
        return gain * centred / deviation @ widen_HE.T

    rows_VH = through(word_VE + usual_E)
    middle_H = rows_VH.mean(0)
    _, strengths, directions = torch.linalg.svd(_covariance(rows_VH - middle_H))
    basis_rH = _spread(directions[:rank])
    narrow = {name: through(table) @ basis_rH.T for name, table in tables.items()}
    # Taken off every token alike, and put back by the product's bias.
    narrow["word_embeddings"] = narrow["word_embeddings"] - middle_H @ basis_rH.T
    usual_r = torch.stack([table.mean(0) for name, table in narrow.items() if name != "word_embeddings"]).sum(0)
    scale = (narrow["word_embeddings"] + usual_r).std(-1, unbiased=False).mean()
    own_shift_H = F.linear(shift, widen_HE, source.get(f"{teacher_product}.bias"))
    values = {f"embeddings.{name}.weight": table for name, table in narrow.items()}
    values |= {
        "embeddings.LayerNorm.weight": scale.expand(rank).clone(),
        "embeddings.LayerNorm.bias": torch.zeros(rank),
        f"{product}.weight": basis_rH.T.contiguous(),
        f"{product}.bias": own_shift_H + middle_H,
    }
    return Factorised(values, float(strengths[:rank].sum() / strengths.sum()))


def _covariance(rows_VH: Tensor) -> Tensor:
    """(H, H): its singular vectors are the rows' right ones, at a fraction of the work."""
    return rows_VH.T @ rows_VH


def _spread(directions_rH: Tensor) -> Tensor:
    """The same directions, turned so that the weakest lies along the mean, which the student's LayerNorm takes away."""
    rank = len(directions_rH)
    mirror_r = torch.full((rank,), -1.0 / math.sqrt(rank)).to(directions_rH)
    mirror_r[-1] += 1.0
    norm = mirror_r.norm()
    if norm < 1e-6:
        return directions_rH
    mirror_r = mirror_r / norm
    return directions_rH - 2.0 * torch.outer(mirror_r, mirror_r @ directions_rH)
