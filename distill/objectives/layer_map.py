"""Which student layer learns from which teacher layer.

Layers count from 1 as in the taps `hidden.1`, `query.1`; hidden states have a 0 too, the embeddings. With S student and
T teacher layers:

Map        Student m from teacher                    Convention
uniform    m * T / S, rounded; 0 from 0              TinyBERT where S divides T, rounded to the nearest elsewhere
tinybert   m * T / S; 0 from 0                       TinyBERT (1909.10351), refused where S does not divide T
even       1 + (m - 1) * (T - 1) / (S - 1), rounded  DistilBERT and distil-whisper: the first and the last are always in
first      m                                         the first S layers
last       m + T - S                                 the last S layers; hidden 0 from T - S (XtremeDistil)
skip       m * (T div S), for 0 < m < S              PKD-Skip (1908.09355): the last is left to the logits
final      T, for m = S alone                        MiniLM (2002.10957)
inherited  what the student card says                as the student was initialised; `even` where nothing is known
emd        every layer from every layer              BERT-EMD (2010.06133): weights by optimal transport
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

LayerMap = list[tuple[int, int]]
"""Pairs (student layer, teacher layer)."""

Kind = Literal["hidden", "attention"]
"""What is mapped: hidden states 0..N, or what every attention has, 1..N."""

MAPS = ("uniform", "tinybert", "even", "first", "last", "skip", "final", "inherited", "emd")


def resolve_layer_map(
    choice: str | Sequence[tuple[int, int]],
    student_layers: int,
    teacher_layers: int,
    *,
    kind: Kind = "hidden",
    inherited: Sequence[tuple[int, int]] | None = None,
) -> LayerMap:
    """The pairs that a recipe's `layers` stands for.

    Args:
        choice: A name of this module's table, or pairs.
        student_layers: S.
        teacher_layers: T.
        kind: Hidden states begin at 0, attention at 1.
        inherited: (student, teacher) layers from 1, as the student was built.

    Raises:
        ValueError: With one line that says what is wrong and what would do.
    """
    S, T = student_layers, teacher_layers
    if not isinstance(choice, str):
        return _explicit([(int(mine), int(theirs)) for mine, theirs in choice], S, T, kind)
    if choice not in MAPS:
        near = difflib.get_close_matches(choice, MAPS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(MAPS)}, or [student, teacher] pairs"
        raise ValueError(f"layer map {choice!r} does not exist; {hint}")
    first = 0 if kind == "hidden" else 1
    if choice == "emd":
        return [(mine, theirs) for mine in range(first, S + 1) for theirs in range(first, T + 1)]
    if choice in ("first", "last", "skip") and S > T:
        raise ValueError(
            f"layer map {choice!r} needs no more student than teacher layers; got {S} and {T}; take 'even'"
        )
    return _named(choice, S, T, first, inherited)


def _named(choice: str, S: int, T: int, first: int, inherited: Sequence[tuple[int, int]] | None) -> LayerMap:
    layers = range(first, S + 1)
    if choice == "tinybert" and T % S:
        fitting = [n for n in range(1, T + 1) if T % n == 0]
        raise ValueError(
            f"layer map 'tinybert' needs {T} teacher layers to be a multiple of {S} student layers; "
            f"take 'uniform', or a student of {_listed(fitting)} layers"
        )
    if choice in ("uniform", "tinybert"):
        return [(m, _rounded(m * T, S)) for m in layers]
    if choice == "final":
        return [(S, T)]
    if choice == "skip":
        if S == 1:
            raise ValueError("layer map 'skip' leaves out the last layer, and this student has 1; take 'final'")
        return [(m, m * (T // S)) for m in range(1, S)]
    if choice in ("first", "last"):
        offset = T - S if choice == "last" else 0
        return [(m, m + offset) for m in layers]
    pairs = sorted(inherited or []) if choice == "inherited" else []
    pairs = pairs or [(m, 1 + _rounded((m - 1) * (T - 1), S - 1)) if S > 1 else (1, T) for m in range(1, S + 1)]
    embeddings = [(0, 0)] if first == 0 else []
    return _explicit([*embeddings, *pairs], S, T, "hidden" if first == 0 else "attention")


def _rounded(numerator: int, denominator: int) -> int:
    """To the nearest, halves up, in whole numbers."""
    return (2 * numerator + denominator) // (2 * denominator)


def _explicit(pairs: LayerMap, S: int, T: int, kind: Kind) -> LayerMap:
    first = 0 if kind == "hidden" else 1
    if not pairs:
        raise ValueError("a layer map must have one [student, teacher] pair at least; got none")
    for mine, theirs in pairs:
        for side, layer, depth in (("student", mine, S), ("teacher", theirs, T)):
            if not first <= layer <= depth:
                raise ValueError(
                    f"layer map [{mine}, {theirs}] names {side} layer {layer}; the {side}'s are {first} to {depth}"
                )
    return pairs


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def layer_rows(pairs: LayerMap) -> list[list[str]]:
    """Student layer, teacher layers: for a printed table."""
    by_student: dict[int, list[int]] = {}
    for mine, theirs in pairs:
        by_student.setdefault(mine, []).append(theirs)
    return [[_called(mine), ", ".join(_called(layer) for layer in theirs)] for mine, theirs in by_student.items()]


def _called(layer: int) -> str:
    return str(layer) if layer else "embeddings"


def layer_text(pairs: LayerMap) -> str:
    """The map in a few words: `1 from 2, 2 from 4`."""
    rows = layer_rows(pairs)
    if len(rows) > 1 and all(theirs == rows[0][1] and "," in theirs for _, theirs in rows):
        return f"{len(rows)} from each of {len(rows[0][1].split(', '))}"
    return ", ".join(f"{mine} from {theirs}" for mine, theirs in rows)


class EarthMover(nn.Module):
    """Weights of all pairs of layers by optimal transport, as BERT-EMD (2010.06133) moves knowledge between layers.

    Each side's layers hold weights that sum to 1, even at first. The flow F that carries the one to the other at the
    least cost sum_ij F_ij D_ij is found anew for each batch; layers that were cheap to reach then weigh more:
    c_i = sum_j F_ij D_ij / w_i, w_i <- softmax_i(sum_k c_k / c_i / temperature). One guard the reference lacks: every
    layer keeps a hundredth of an even share, so that a layer that is learnt perfectly does not take all the weight for
    good. The weights are part of the module's state: a resume goes on from them. Flow and weights follow each
    micro-batch, so a split of the batch changes the value a little.

    Args:
        pairs: All pairs of student and teacher layers.
        temperature: Higher keeps the weights more even.
    """

    student_weights: Tensor
    teacher_weights: Tensor

    def __init__(self, pairs: LayerMap, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.students = sorted({mine for mine, _ in pairs})
        self.teachers = sorted({theirs for _, theirs in pairs})
        self.temperature = temperature
        for name, layers in (("student_weights", self.students), ("teacher_weights", self.teachers)):
            self.register_buffer(name, torch.full((len(layers),), 1.0 / len(layers), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, costs: Tensor) -> Tensor:
        """The flow for a matrix of costs.

        Args:
            costs: (S, T) mean loss of each pair, students in rows; read without gradient.

        Returns:
            (S, T) fp32 weights that sum to 1.
        """
        matrix = costs.detach().double().cpu()
        mine, theirs = self.student_weights.cpu(), self.teacher_weights.cpu()
        if not matrix.isfinite().all():
            # Left to the trainer, which stops on a loss that is not finite and names the term.
            return torch.outer(mine, theirs).to(costs.device, torch.float32)
        flow = transport(matrix.numpy(), mine.numpy(), theirs.numpy())
        if self.training:
            moved = torch.from_numpy(flow) * matrix
            self.student_weights.copy_(self._cheaper(moved.sum(1), mine))
            self.teacher_weights.copy_(self._cheaper(moved.sum(0), theirs))
        return torch.from_numpy(flow).to(costs.device, torch.float32)

    def _cheaper(self, moved: Tensor, weights: Tensor) -> Tensor:
        costs = moved.clamp(min=1e-12) / weights  # an inherited embedding layer costs nothing at first
        return 0.99 * (costs.sum() / costs / self.temperature).softmax(0) + 0.01 / len(costs)


def transport(costs: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The cheapest flow from `sources` to `targets`: a linear program, solved exactly.

    Args:
        costs: (S, T).
        sources: (S,), not negative, the same sum as `targets`.
        targets: (T,).

    Returns:
        (S, T), rows summing to `sources`, columns to `targets`.
    """
    from scipy.optimize import linprog  # type: ignore[import-untyped,unused-ignore]

    S, T = costs.shape
    rows, columns = np.kron(np.eye(S), np.ones(T)), np.kron(np.ones(S), np.eye(T))
    # One constraint follows from the others; without it rounding cannot make them contradict each other.
    constraints, amounts = np.vstack([rows, columns])[:-1], np.concatenate([sources, targets])[:-1]
    found = linprog(costs.ravel(), A_eq=constraints, b_eq=amounts, bounds=(0, None), method="highs")
    flow: np.ndarray = found.x.reshape(S, T)
    return flow
