"""The three losses that the trainer needs first, until the whole table stands in `losses.py`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from distill.objectives.base import Loss, SumCount, Unit, has_label


def soft_labels(student: Tensor, teacher: Tensor, *, scored: Tensor, temperature: float = 4.0) -> SumCount:
    """T^2 * KL(teacher || student) at temperature T, summed over scored rows."""
    student, teacher = student[scored].float() / temperature, teacher[scored].float() / temperature
    total = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True)
    return total * temperature**2, scored.sum().float()


def hard_labels(student: Tensor, teacher: None, *, labels: Tensor, scored: Tensor) -> SumCount:
    """Cross-entropy with the gold labels, summed over scored rows that have one."""
    chosen = has_label(labels) & scored
    return F.cross_entropy(student[chosen].float(), labels[chosen], reduction="sum"), chosen.sum().float()


def hidden_mse(student: Tensor, teacher: Tensor, *, mask: Tensor) -> SumCount:
    """Squared difference of hidden states, mean over the width, summed over tokens."""
    squares = (student.float() - teacher.float()).square().mean(-1)
    return (squares * mask).sum(), mask.sum().float()


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("soft_labels", soft_labels, "logits", Unit.SCORED, ("scored",), {"temperature": 4.0}),
        Loss("hard_labels", hard_labels, "", Unit.LABELLED, ("labels", "scored")),
        Loss("hidden_mse", hidden_mse, "hidden", Unit.TOKENS, ("mask",), projects=True),
    )
}
