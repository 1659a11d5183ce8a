"""The objective: weighted terms, each a sum over valid items and their count, and the projections that go with them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.cache.top_k import TOP, reduce_both
from distill.encoders import Architecture
from distill.errors import ObjectiveError
from distill.features import Features
from distill.objectives.base import Loss, SumCount, Unit, count_units
from distill.objectives.layer_map import EarthMover, LayerMap, layer_text
from distill.objectives.losses import LOSSES
from distill.objectives.memory import Memory
from distill.objectives.plan import Plan, plan_terms
from distill.objectives.projection import Projections
from distill.objectives.relational import pool
from distill.objectives.schedule import dynamic_temperature
from distill.recipe import TermRecipe

ON_DISTRIBUTIONS = ("soft_labels", "jsd", "reverse_kl", "total_variation")
"""Losses that compare two distributions whatever their classes are: they can read the likeliest classes alone."""

_BATCH_NAMES = {"mask": "attention_mask"}
"""What a loss calls a column of the batch, where that differs."""


class Objective(nn.Module):
    """Mixes losses. Its parameters are projections, trained with the student; they do not ship.

    Args:
        plans: Checked terms, of `plan_terms`.
        seed: For the projections' starting weights.

    Attributes:
        student_taps: Features wanted of the student.
        teacher_taps: Features wanted of the teacher; empty where the labels are enough.
        units: What each term is divided by: one of the keys of `counts`.
    """

    def __init__(self, plans: Sequence[Plan], *, seed: int = 0) -> None:
        super().__init__()
        self.plans = tuple(plans)
        self.student_taps: frozenset[str] = frozenset().union(*(plan.student_taps for plan in plans))
        self.teacher_taps: frozenset[str] = frozenset().union(*(plan.teacher_taps for plan in plans))
        self.units: dict[str, Unit] = {plan.name: plan.loss.unit for plan in plans}
        self.projections = nn.ModuleDict()
        self.movers = nn.ModuleDict()
        self.memories = nn.ModuleDict()
        for plan in plans:
            if plan.widths is not None:
                layers = [mine for mine, _ in plan.layers]
                self.projections[plan.name] = Projections(
                    layers, *plan.widths, sharing=plan.sharing, init=plan.init, seed=seed, name=plan.name
                )
            if plan.memory:
                self.memories[plan.name] = nn.ModuleDict(
                    {f"{mine}-{theirs}": Memory(*plan.memory) for mine, theirs in plan.layers}
                )
            if plan.emd_temperature is not None:
                self.movers[plan.name] = EarthMover(plan.layers, temperature=plan.emd_temperature)

    def counts(self, batch: Mapping[str, Tensor]) -> dict[Unit, Tensor]:
        """Every unit of the batch as an fp32 scalar: summed over a window, they divide the terms' sums."""
        return count_units(batch)

    def weights(self, progress: float) -> dict[str, float]:
        """The factor of each term at this share of training."""
        return {plan.name: plan.weight(progress) for plan in self.plans}

    def forward(
        self, student: Features, teacher: Features, batch: Mapping[str, Tensor], progress: float = 0.0
    ) -> dict[str, SumCount]:
        """(sum, count) of each term whose weight is not 0 at this progress; weights are not applied.

        A term over several layers gives the mean of their sums. No gradient flows to the teacher.

        Args:
            student: At least `student_taps`.
            teacher: At least `teacher_taps`; `logits.ids` and `logits.top` of `cache.top_k` may stand for `logits`.
            batch: `attention_mask` (B, L), `scored`, `labels` as the terms read them.
            progress: Share of training done, in [0, 1].
        """
        teacher = {name: value.detach() for name, value in teacher.items()}
        return {
            plan.name: self._term(plan, student, teacher, batch, progress)
            for plan in self.plans
            if plan.weight(progress) != 0.0
        }

    def _term(
        self, plan: Plan, student: Features, teacher: Features, batch: Mapping[str, Tensor], progress: float
    ) -> SumCount:
        call = _bind(plan, batch, progress)
        feature = plan.loss.feature
        if not plan.layers:
            mine, theirs = student["logits"], teacher.get("logits")
            if feature and TOP in teacher:
                check_top_k([plan])
                mine, theirs = reduce_both(mine, teacher, batch["scored"])
            return _on_logits(plan, call, mine, theirs, batch, progress)
        pairs = [
            (self._projected(plan, student[f"{feature}.{mine}"], mine), teacher[f"{feature}.{theirs}"])
            for mine, theirs in plan.layers
        ]
        if plan.loss.layers_per_item == 2:
            neighbours = itertools.pairwise(pairs)
            results = [call((low[0], high[0]), (low[1], high[1])) for low, high in neighbours]
        elif plan.memory:
            results = [
                call(mine, theirs, memory=self._remembered(plan, pair, theirs, batch))
                for pair, (mine, theirs) in zip(plan.layers, pairs, strict=True)
            ]
        else:
            results = [call(mine, theirs) for mine, theirs in pairs]
        sums = torch.stack([total for total, _ in results])
        count = results[0][1]
        if plan.emd_temperature is None:
            return sums.mean(), count
        costs = sums.view(len({mine for mine, _ in plan.layers}), -1)  # (S, T): pairs stand student by student
        return (self.movers[plan.name](costs.detach() / count.clamp(min=1.0)) * costs).sum(), count

    def _remembered(self, plan: Plan, pair: tuple[int, int], teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        ring = self.memories[plan.name][f"{pair[0]}-{pair[1]}"]  # type: ignore[index]
        remembered: Tensor = ring(pool(teacher, batch["attention_mask"], plan.options["pooling"]))
        return remembered

    def _projected(self, plan: Plan, feature: Tensor, layer: int) -> Tensor:
        if plan.widths is None:
            return feature
        projected: Tensor = self.projections[plan.name](feature, layer)
        return projected

    @property
    def layer_maps(self) -> dict[str, LayerMap]:
        """(student, teacher) layers of each term that reads layers."""
        return {plan.name: list(plan.layers) for plan in self.plans if plan.layers}

    def rows(self) -> list[list[str]]:
        """Term, weight, what it reads, layers (student from teacher): for a printed table."""
        return [[plan.name, str(plan.weight), _reads(plan), layer_text(plan.layers)] for plan in self.plans]

    def describe(self) -> list[dict[str, Any]]:
        """Each term as plain data, for a report and for keys: equal descriptions compute the same."""
        return [
            {
                "term": plan.name,
                "loss": plan.loss.name,
                "weight": str(plan.weight),
                "temperature": "" if plan.temperature is None else str(plan.temperature),
                "reads": _reads(plan),
                "layers": [list(pair) for pair in plan.layers],
                "options": {**plan.options, **plan.dynamic, **_training_options(plan)},
            }
            for plan in self.plans
        ]


def check_top_k(plans: Iterable[Plan]) -> None:
    """Refuses terms that need all logits where only the likeliest classes are kept.

    Raises:
        ObjectiveError: Naming the terms.
    """
    needs_all = {"shift": False, "standardise": False, "convention": "distill"}
    wrong = [
        plan.name
        for plan in plans
        if plan.loss.feature == "logits"
        and (
            plan.loss.name not in ON_DISTRIBUTIONS
            or plan.dynamic.get("dynamic") == "flsw"  # which takes cosines of logits
            or any(plan.options.get(k, v) != v for k, v in needs_all.items())
        )
    ]
    if wrong:
        raise ObjectiveError(
            f"{', '.join(wrong)} needs all logits, and only the likeliest classes are kept",
            where="objective",
            fix=f"Set cache.top_k = 0, or take plain {', '.join(ON_DISTRIBUTIONS)}.",
        )


def build_objective(
    terms: Sequence[TermRecipe],
    student: Architecture,
    teacher: Architecture,
    layer_map: LayerMap | None = None,
    *,
    losses: Mapping[str, Loss] = LOSSES,
    seed: int = 0,
) -> Objective:
    """Checks terms against both shapes and builds the objective.

    Args:
        terms: Of a recipe or a preset.
        student: Of `describe(student)`.
        teacher: Of `describe(teacher)`.
        layer_map: (student, teacher) layers from 1 as the student was built; what `layers = "inherited"` stands for.
        losses: The table of losses; a larger one adds losses of your own.
        seed: For the projections' starting weights.

    Raises:
        ObjectiveError: Naming every problem at once.
    """
    return Objective(plan_terms(terms, student, teacher, losses, layer_map), seed=seed)


def _bind(plan: Plan, batch: Mapping[str, Tensor], progress: float) -> Callable[..., SumCount]:
    """The loss with its options and its columns of the batch filled in."""
    options = dict(plan.options)
    if plan.temperature is not None:
        options["temperature"] = plan.temperature(progress)
    columns = {name: _BATCH_NAMES.get(name, name) for name in plan.loss.inputs}
    inputs = {name: batch[column] for name, column in columns.items() if column in batch}
    unit = count_units(batch)[plan.loss.unit]

    def call(student: Any, teacher: Any, **more: Any) -> SumCount:
        total, count = plan.loss.function(student, teacher, **inputs, **{**options, **more})
        # A convention may divide by something else than the unit, such as padding too: the trainer divides by the unit.
        return total * (unit / count.clamp(min=1.0)) if options.get(
            "convention", "distill"
        ) != "distill" else total, unit

    return call


def _on_logits(
    plan: Plan,
    call: Callable[..., SumCount],
    student: Tensor,
    teacher: Tensor | None,
    batch: Mapping[str, Tensor],
    progress: float,
) -> SumCount:
    if not plan.dynamic or teacher is None or plan.temperature is None:
        return call(student, teacher)
    scored = batch["scored"]
    temperatures = torch.full(scored.shape, plan.temperature(progress), device=student.device)
    chosen = {"kind": plan.dynamic["dynamic"], "beta": plan.dynamic["beta"], "gamma": plan.dynamic["gamma"]}
    base = plan.temperature(progress)
    temperatures[scored] = dynamic_temperature(student[scored], teacher[scored], base=base, **chosen).squeeze(-1)
    return call(student, teacher, temperature=temperatures)


def _training_options(plan: Plan) -> dict[str, Any]:
    """What of the objective's own options bears on the result."""
    options: dict[str, Any] = {}
    if plan.widths is not None:
        options |= {"projection": plan.sharing, "projection_init": plan.init}
    if plan.memory:
        options["memory"] = plan.memory[0]
    if plan.emd_temperature is not None:
        options["emd_temperature"] = plan.emd_temperature
    return options


def _reads(plan: Plan) -> str:
    parts = [plan.loss.feature or "logits and labels"]
    if plan.temperature is not None:
        parts.append(f"temperature {plan.temperature}")
    if plan.dynamic:
        parts.append(f"by example ({plan.dynamic['dynamic']})")
    if plan.widths is not None:
        one = "one projection" if plan.sharing == "shared" else "projected"
        parts.append(f"{one} {plan.widths[0]} to {plan.widths[1]}")
    return ", ".join(parts)
