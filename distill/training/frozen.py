"""First layers that stay the teacher's: they neither learn nor drop out, and what they say is read from the teacher.

A layer that is an exact copy says of a text what the teacher's says. So the states above the frozen layers come with
the teacher's answers, from the cache where there is one, and a step runs the layers that learn alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distill.encoders import find_encoder
from distill.errors import TrainingError
from distill.features import Features, evaluating, record
from distill.recipe import TrainingRecipe


@contextmanager
def frozen(student: Any, layers: int) -> Iterator[None]:
    """Within the block the embeddings and first layers neither learn nor drop out: the way back ends above them.

    Args:
        student: A transformers model.
        layers: How many.

    Raises:
        TrainingError: It has no more layers than that.
    """
    encoder = find_encoder(student)
    if layers >= len(encoder.layers) or encoder.layers[layers] in encoder.layers[:layers]:
        most = len(set(encoder.layers)) - 1
        raise TrainingError(
            f"`training.freeze_layers` is {layers}, the student has {most + 1} layers of its own",
            where="training",
            fix=f"Set it to {most}{' or less' if most else ''}: something must learn.",
        )
    parts = list(dict.fromkeys([*below(student), *encoder.layers[:layers]]))  # shared ones once
    for part in parts:
        part.requires_grad_(False)
        part.eval()
        object.__setattr__(part, "train", lambda mode=True, part=part: part)  # the Trainer asks the whole model to
    try:
        yield
    finally:
        for part in parts:
            object.__delattr__(part, "train")
            part.train(student.training)


EARLY = ("layernorm_embedding",)
"""What BART and its kin run before their layers, though it stands behind them."""


def below(student: Any) -> list[Any]:
    """The modules of the encoder that run before its first layer: all that holds no layer and stands before them."""
    encoder = find_encoder(student)
    first = next(iter(encoder.layers[0].parameters()))
    found: list[Any] = []
    holder = student.base_model
    while True:  # down to the first layer: each module that stands before it on the way
        found += [part for name, part in holder.named_children() if name in EARLY]
        for name, part in holder.named_children():
            if any(value is first for value in part.parameters()):
                holder = part
                break
            if name not in EARLY:
                found.append(part)
        if holder is encoder.layers[0]:
            return found


def check_copies(student: Any, teacher: Any, layers: int, batch: Mapping[str, Tensor]) -> None:
    """Refuses to freeze what is not the teacher's own: other weights, or the same ones that say something else.

    Args:
        student: Before its first step.
        teacher: The model that it was made from.
        layers: How many of its first layers are to be frozen, with all that runs before them.
        batch: Any, on the CPU as both models.

    Raises:
        TrainingError: One of them differs from the teacher's of the same number.
    """
    mine, theirs = find_encoder(student).layers, find_encoder(teacher).layers
    pairs = [("embeddings", one, other) for one, other in zip(below(student), below(teacher), strict=False)]
    pairs += [(f"layer {n}", one, other) for n, (one, other) in enumerate(zip(mine, theirs, strict=False), 1)][:layers]
    for name, one, other in pairs:
        ours, its = one.state_dict(), other.state_dict()
        if ours.keys() != its.keys() or any(not torch.equal(ours[key], its[key]) for key in ours):
            raise _no_copy(f"{name} is no copy of the teacher's", layers)
    said = []
    for model in (student, teacher):
        with evaluating(model), torch.no_grad(), record(model, [f"hidden.{layers}"]) as tapped:
            said.append(tapped(batch)[f"hidden.{layers}"])
    if not torch.allclose(said[0], said[1], rtol=1e-4, atol=1e-5):  # another activation, other heads
        raise _no_copy(f"layer {layers} has the teacher's weights and says something else", layers)


def _no_copy(what: str, layers: int) -> TrainingError:
    return TrainingError(
        f"`training.freeze_layers` is {layers}, and the student's {what}",
        where="training",
        fix='Set it to 0, or let the student begin with the teacher\'s first layers: inherit_layers = "first", '
        'vocabulary = "full", of the teacher\'s shape.',
    )


def states_read(settings: TrainingRecipe, student_taps: Iterable[str]) -> frozenset[str]:
    """The teacher's taps that stand for the frozen layers; empty where a step must run these.

    It must where an objective reads inside one, and where the student is compiled or divided over processes.

    Args:
        settings: Of the recipe.
        student_taps: What the objective reads of the student.
    """
    layers = settings.freeze_layers
    if not layers or settings.compile or settings.sharding != "none":
        return frozenset()
    kinds = {(kind, int(number)) for kind, _, number in (tap.partition(".") for tap in student_taps) if number}
    if any(kind != "hidden" and number <= layers for kind, number in kinds):
        return frozenset()
    read = {number for kind, number in kinds if kind == "hidden" and 0 < number < layers}
    return frozenset(f"hidden.{number}" for number in read | {layers})


class GivenStates:
    """Lets a student's frozen layers pass on states that they are given; where none are given they compute.

    Args:
        student: A transformers model, its layers frozen.
        layers: How many.
        taps: Of the teacher, that stand for them: `states_read`.

    Attributes:
        alone: No layer that has run gave more than its states.
    """

    def __init__(self, student: Any, layers: int, taps: frozenset[str]) -> None:
        self._layers, self.taps = find_encoder(student).layers[:layers], taps
        self._states: Features = {}
        self._tuples: set[int] = set()
        self.alone = True

    @contextmanager
    def given(self, teacher: Features) -> Iterator[None]:
        """Within the block layer k gives `hidden.k`, and where nothing reads that, what it was given itself.

        Args:
            teacher: What it says of the batch; where it does not say all that is read, the layers compute.
        """
        self._states = {tap: teacher[tap] for tap in self.taps} if self.taps <= teacher.keys() else {}
        try:
            yield
        finally:
            self._states = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block the layers do as this class says."""
        for number, layer in enumerate(self._layers, start=1):
            layer.forward = self._forward(number, layer.forward)
        try:
            yield
        finally:
            for layer in dict.fromkeys(self._layers):
                del layer.forward

    def _forward(self, number: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._states:
                output = compute(*args, **kwargs)
                if isinstance(output, tuple):
                    self._tuples.add(number)
                    self.alone = self.alone and all(more is None for more in output[1:])
                return output
            entered = args[0] if args else kwargs["hidden_states"]
            states = self._states.get(f"hidden.{number}", entered).to(entered)
            return (states, None) if number in self._tuples else states

        return forward


@contextmanager
def states_given(
    student: Any, settings: TrainingRecipe, student_taps: Iterable[str], batch: Mapping[str, Tensor]
) -> Iterator[GivenStates | None]:
    """What passes the teacher's states through the frozen layers, within the block; None where they must run.

    Whether this student says the same either way is tried first: T5's first layer makes position biases for all.

    Args:
        student: As in `lighter`, its layers frozen.
        settings: Of the recipe.
        student_taps: What the objective reads of the student.
        batch: Any, on the student's device.
    """
    states = states_read(settings, student_taps)
    if not states or find_encoder(student).family is None:  # which may cut or pad what its layers see
        yield None
        return
    given = GivenStates(student, settings.freeze_layers, states)
    with given.installed():
        yield given if _same(student, given, sorted({*student_taps, *states}), batch) else None


def _same(student: Any, given: GivenStates, taps: Sequence[str], batch: Mapping[str, Tensor]) -> bool:
    """Whether the student says the same of a batch when its frozen layers are given what they said.

    And whether they will go on to say it: DeBERTa's read relative embeddings that learn with the layers above.
    """
    with evaluating(student), record(student, taps) as tapped:
        computed = tapped(batch)
        if not given.alone or any(computed[tap].requires_grad for tap in given.taps):
            return False
        with given.given(computed), torch.no_grad():
            passed = tapped(batch)
    return all(torch.allclose(passed[tap], computed[tap], rtol=1e-4, atol=1e-5) for tap in taps)


def states_passed(
    student: Any, teacher: Any, settings: TrainingRecipe, student_taps: Iterable[str], batch: Mapping[str, Tensor]
) -> frozenset[str]:
    """`states_read`, where this student passes such states on; empty where its frozen layers run all the same.

    Args:
        student: Before its first step, on the CPU; it stays as it is.
        teacher: The model that it was made from.
        settings: Of the recipe.
        student_taps: What the objective reads of the student.
        batch: Any.

    Raises:
        TrainingError: The layers cannot be frozen.
    """
    tried = copy.deepcopy(student)
    with frozen(tried, settings.freeze_layers):
        check_copies(tried, teacher, settings.freeze_layers, batch)
        with states_given(tried, settings, student_taps, batch) as given:
            return given.taps if given else frozenset()
