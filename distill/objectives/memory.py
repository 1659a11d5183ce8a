"""Teacher rows of earlier batches, for losses that want more rows to compare than a batch holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """The newest `size` rows that the teacher gave, one ring for a term and teacher layer.

    The teacher does not change, so what it said of a text stays true however long ago (CRD, 1910.10699; SEED's queue,
    2101.04731). Rows are buffers: they are checkpointed with the projections, a resume goes on from them, and they go
    where the objective goes, not into the student. Of several processes all have what the first one saw.

    Args:
        size: Rows that are kept.
        width: H of the teacher.
    """

    rows: Tensor
    seen: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, rows_BH: Tensor) -> Tensor:
        """The rows remembered so far, (M, H), M from 0 to `size`; then, in training, `rows_BH` join them."""
        size, seen = len(self.rows), int(self.seen)
        remembered = self.rows[: min(seen, size)].clone()
        if self.training:
            newest = rows_BH.detach()[-size:].to(self.rows)
            first = seen + len(rows_BH) - len(newest)
            places = torch.arange(first, first + len(newest), device=self.rows.device) % size
            self.rows[places] = newest
            self.seen += len(rows_BH)
        return remembered
