"""First form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from distill.objectives.base import SumCount, Unit, count_units
from distill.recipe import TermRecipe


class Objective(nn.Module):
    def __init__(self, terms: Sequence[TermRecipe], student: Any, teacher: Any, layer_map: Any = None) -> None:
        super().__init__()
        self.terms = list(terms)
        n, m = student.layers, teacher.layers
        self.pairs = [(i, round(i * m / n)) for i in range(n + 1)]
        self.units = {
            t.loss: {"soft_labels": Unit.SCORED, "hard_labels": Unit.LABELLED, "hidden_mse": Unit.TOKENS}[t.loss]
            for t in terms
        }
        hid = any(t.loss == "hidden_mse" for t in terms)
        self.student_taps = frozenset(["logits"] + [f"hidden.{a}" for a, _ in self.pairs if hid])
        self.teacher_taps = frozenset(
            (["logits"] if "soft_labels" in self.units else []) + [f"hidden.{b}" for _, b in self.pairs if hid]
        )

    def counts(self, batch: Mapping[str, Tensor]) -> dict[Unit, Tensor]:
        return count_units(batch)

    def weights(self, progress: float) -> dict[str, float]:
        return {t.loss: float(t.weight) for t in self.terms}

    def rows(self) -> list[list[str]]:
        return [[t.loss, str(t.weight), "", ""] for t in self.terms]

    def describe(self) -> list[dict[str, Any]]:
        return [{"term": t.loss, "weight": t.weight} for t in self.terms]

    def forward(self, student: Any, teacher: Any, batch: Any, progress: float = 0.0) -> dict[str, SumCount]:
        c = count_units(batch)
        out = {}
        for t in self.terms:
            if t.loss == "soft_labels":
                T = float(t.temperature or 1.0)
                p = (teacher["logits"] / T).softmax(-1)
                out[t.loss] = (
                    F.kl_div((student["logits"] / T).log_softmax(-1), p, reduction="sum") * T * T,
                    c[Unit.SCORED],
                )
            elif t.loss == "hard_labels":
                out[t.loss] = (
                    F.cross_entropy(student["logits"], batch["labels"], reduction="sum", ignore_index=-100),
                    c[Unit.LABELLED],
                )
            else:
                m = batch["attention_mask"].unsqueeze(-1).float()
                s = sum(
                    (((student[f"hidden.{a}"] - teacher[f"hidden.{b}"]) ** 2).mean(-1, keepdim=True) * m).sum()
                    for a, b in self.pairs
                )
                out[t.loss] = (s / len(self.pairs), c[Unit.TOKENS])
        return out


def build_objective(terms: Any, student: Any, teacher: Any, layer_map: Any = None) -> Objective:
    return Objective(terms, student, teacher, layer_map)
