"""From the terms of a recipe to what an objective does, with everything checked that can be known beforehand.

Three names among a loss's own options mean something here: `causal` is set where both models are; `relation_heads` is
filled in where it is 0, and must divide both widths; `heads` as "mean" or "sum" says that scores are merged over heads,
whose numbers may then differ.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.encoders import FAMILIES, Architecture
from distill.errors import ObjectiveError
from distill.objectives.attention import head_relation, shared_heads
from distill.objectives.base import Loss
from distill.objectives.layer_map import Kind, LayerMap, resolve_layer_map
from distill.objectives.projection import INITS, SHARINGS, Init, Sharing
from distill.objectives.schedule import DYNAMIC, Schedule, schedule_of, schedule_problems, silent_stretch
from distill.recipe import TermRecipe

PROJECTION_OPTIONS: dict[str, Any] = {"projection": "layer", "projection_init": "normal"}
"""Options of every term whose loss projects, and their defaults."""

DYNAMIC_OPTIONS: dict[str, Any] = {"dynamic": "", "beta": 1.0, "gamma": 2.0}
"""Options of every term on logits with a temperature: `dynamic` is "", "flsw" or "cwsm"."""

EMD_OPTIONS: dict[str, Any] = {"emd_temperature": 1.0}
"""Options of a term with `layers = "emd"`."""

MEMORY_OPTIONS: dict[str, Any] = {"memory": 0}
"""Options of a loss that remembers: teacher rows of earlier batches that are kept."""

CHOICES: dict[str, tuple[str, ...]] = {"projection": SHARINGS, "projection_init": INITS, "dynamic": ("", *DYNAMIC)}
"""What the options above may be."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One term, ready to be computed.

    Attributes:
        name: Unique in the objective: the loss's name, with a number from the second on.
        loss: Entry of the table.
        weight: Factor over training.
        temperature: Over training; None where the loss has none.
        options: For the loss's function.
        layers: Pairs; empty where the loss reads logits.
        widths: Student and teacher width where a projection stands between, else None.
        sharing: One projection a layer, or one for all.
        init: How projections start.
        emd_temperature: Set where layers are weighed by optimal transport.
        memory: Teacher rows to keep of earlier batches, and their width; empty where nothing is remembered.
        dynamic: Temperature by example: `kind`, `beta` and `gamma`; empty for one temperature.
    """

    name: str
    loss: Loss
    weight: Schedule
    temperature: Schedule | None
    options: Mapping[str, Any]
    layers: LayerMap
    widths: tuple[int, int] | None = None
    sharing: Sharing = "layer"
    init: Init = "normal"
    emd_temperature: float | None = None
    memory: tuple[int, ...] = ()
    dynamic: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reads_padding(self) -> bool:
        """Its convention counts what stands behind a text, of which no cache keeps what the teacher says."""
        convention = self.options.get("convention")
        by_token = self.loss.feature != "logits" or "inside" in self.loss.inputs
        return by_token and convention in ("distilbert", "mobilebert", "paddle", "tinybert")

    @property
    def student_taps(self) -> set[str]:
        """Taps of the student that the loss reads."""
        if not self.loss.feature or self.loss.feature == "logits":
            return {"logits"}
        return {f"{self.loss.feature}.{mine}" for mine, _ in self.layers}

    @property
    def teacher_taps(self) -> set[str]:
        """Taps of the teacher that the loss reads."""
        if not self.loss.feature or self.loss.feature == "logits":
            return {self.loss.feature} - {""}
        return {f"{self.loss.feature}.{theirs}" for _, theirs in self.layers}


def plan_terms(
    terms: Sequence[TermRecipe],
    student: Architecture,
    teacher: Architecture,
    losses: Mapping[str, Loss],
    inherited: Sequence[tuple[int, int]] | None = None,
) -> list[Plan]:
    """Checks all terms and says what each will do.

    Args:
        terms: Of the recipe or a preset.
        student: Shape of the student.
        teacher: Shape of the teacher.
        losses: The table of losses.
        inherited: (student, teacher) layers from 1, as the student was built.

    Raises:
        ObjectiveError: Naming every problem of every term at once.
    """
    problems = term_problems(terms, losses) if terms else ["the objective has no terms; give one at least, or a preset"]
    plans = []
    for term, name in _named(terms):
        if term.loss in losses:
            plans.append(_plan(term, name, losses, (student, teacher), inherited, problems))
    quiet = silent_stretch([plan.weight for plan in plans]) if plans and not problems else None
    if quiet:
        problems.append(f"every weight is 0 from {quiet[0]:.0%} to {quiet[1]:.0%} of training; let the stages meet")
    if problems:
        raise ObjectiveError("; ".join(problems), where="objective")
    return plans


def term_problems(terms: Sequence[TermRecipe], losses: Mapping[str, Loss]) -> list[str]:
    """What is wrong with terms whatever the models are, one line each: names, options, schedules."""
    problems = []
    for term, name in _named(terms):
        if term.loss not in losses:
            problems.append(f"loss {term.loss!r} does not exist; {_near(term.loss, losses)}")
            continue
        loss = losses[term.loss]
        problems += _option_problems(term, name, loss, _own_options(term, loss))
        problems += schedule_problems(schedule_of(term.weight), f"weight of {name}", positive=False)
        if term.temperature is None:
            continue
        if "temperature" in loss.options:
            problems += schedule_problems(schedule_of(term.temperature), f"temperature of {name}", positive=True)
        else:
            having = ", ".join(key for key, other in losses.items() if "temperature" in other.options)
            problems.append(f"{name} has no temperature; take it away (these have one: {having})")
    return problems


def _named(terms: Sequence[TermRecipe]) -> Iterator[tuple[TermRecipe, str]]:
    return zip(terms, unique_names([term.loss for term in terms]), strict=True)


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, from a second time on with a number: hidden_mse, hidden_mse_2."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def _plan(
    term: TermRecipe,
    name: str,
    losses: Mapping[str, Loss],
    models: tuple[Architecture, Architecture],
    inherited: Sequence[tuple[int, int]] | None,
    problems: list[str],
) -> Plan:
    loss = losses[term.loss]
    own = _own_options(term, loss)
    options = _options(term, loss, own)
    layers = _layers(term, name, loss, models, inherited, problems)
    if "relation_heads" in loss.options and not options["relation_heads"]:
        options["relation_heads"] = shared_heads(*(shape.attention_width for shape in models))
    if "causal" in loss.options:
        options["causal"] = options["causal"] or all(shape.causal for shape in models)
    problems += [f"{name}: {problem}" for problem in _misfits(loss, options, models)]
    idle = [key for key in PROJECTION_OPTIONS if key in term.options]
    if loss.projects and idle and _widths(loss, models) is None:
        width = models[0].width if loss.feature == "hidden" else models[0].attention_width
        problems.append(
            f"{name}: student and teacher are both {width} wide: there is nothing to project; "
            f"take {' and '.join(idle)} away"
        )
    kinds = {key: options[key] for key in DYNAMIC_OPTIONS if key in own} if options.get("dynamic") else {}
    return Plan(
        name=name,
        loss=loss,
        weight=schedule_of(term.weight),
        temperature=_temperature(term, loss),
        options={key: value for key, value in options.items() if key not in own},
        layers=layers,
        widths=_widths(loss, models),
        sharing=options.get("projection", "layer"),
        init=options.get("projection_init", "normal"),
        emd_temperature=options.get("emd_temperature"),
        memory=(options["memory"], models[1].width) if options.get("memory") else (),
        dynamic=kinds,
    )


def _own_options(term: TermRecipe, loss: Loss) -> dict[str, Any]:
    """Options that the objective, not the loss, acts upon."""
    own = dict(PROJECTION_OPTIONS) if loss.projects else {}
    by_row = loss.feature == "logits" and not loss.in_batch and "inside" not in loss.inputs
    if by_row and "temperature" in loss.options:
        own |= DYNAMIC_OPTIONS
    if loss.remembers:
        own |= MEMORY_OPTIONS
    if term.layers == "emd" and loss.feature not in ("", "logits"):
        own |= EMD_OPTIONS
    return own


def _options(term: TermRecipe, loss: Loss, own: Mapping[str, Any]) -> dict[str, Any]:
    """All options with their values, temperature aside."""
    known = {key: value for key, value in {**own, **loss.options}.items() if key != "temperature"}
    return {**known, **{key: value for key, value in term.options.items() if key in known}}


def _option_problems(term: TermRecipe, name: str, loss: Loss, own: Mapping[str, Any]) -> list[str]:
    known, problems = _options(term.model_copy(update={"options": {}}), loss, own), []
    for key, value in term.options.items():
        if key == "temperature":
            problems.append(f"{name}: temperature stands beside `options`, not in it")
        elif key not in known:
            problems.append(f"{name} has no option {key!r}; {_near(key, known)}")
        elif not _same_kind(value, known[key]):
            problems.append(f"{name}: option {key} must be like {known[key]!r}; got {value!r}")
        elif value not in (choices := _choices(key, loss, own) or (value,)):
            listed = ", ".join(repr(choice) for choice in choices)
            problems.append(f"{name}: option {key} must be one of {listed}; got {value!r}")
        elif key in MEMORY_OPTIONS and not (isinstance(value, int) and 0 <= value <= 1_000_000):
            problems.append(
                f"{name}: {key} must be a whole number of rows up to 1,000,000; got {value!r}; 4096 would do"
            )
    return problems


def _choices(option: str, loss: Loss, own: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an option may be where that is a closed list."""
    return CHOICES.get(option, ()) if option in own else loss.choices(option)


def _same_kind(value: Any, default: Any) -> bool:
    """Whether a recipe's value can stand where `default` stands; None as a default takes anything."""
    if default is None or value is None:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float)
    return isinstance(value, list | tuple) if isinstance(default, list | tuple) else isinstance(value, type(default))


def _temperature(term: TermRecipe, loss: Loss) -> Schedule | None:
    default = loss.options.get("temperature")
    if default is None:
        return None
    return schedule_of(default if term.temperature is None else term.temperature)


def _layers(
    term: TermRecipe,
    name: str,
    loss: Loss,
    models: tuple[Architecture, Architecture],
    inherited: Sequence[tuple[int, int]] | None,
    problems: list[str],
) -> LayerMap:
    student, teacher = models
    if loss.feature in ("", "logits"):
        if term.layers != TermRecipe.model_fields["layers"].default:
            problems.append(f"{name} reads logits, which have no layers; take `layers` away (got {term.layers!r})")
        return []
    if loss.feature != "hidden":
        lacking = [f"{side} {shape.family!r}" for side, shape in _sides(models) if shape.family not in FAMILIES]
        if lacking:
            problems.append(
                f"{name} reads {loss.feature}, which is not known for {' and '.join(lacking)} "
                f"(known: {', '.join(FAMILIES)}); take a loss on logits or hidden states"
            )
    kind: Kind = "hidden" if loss.feature == "hidden" else "attention"
    try:
        layers = resolve_layer_map(term.layers, student.layers, teacher.layers, kind=kind, inherited=inherited)
    except ValueError as error:
        problems.append(f"{name}: {error}")
        return []
    if loss.layers_per_item > 1 and (len(layers) < loss.layers_per_item or term.layers == "emd"):
        problems.append(
            f"{name} compares {loss.layers_per_item} neighbouring layers; layer map {term.layers!r} has none"
        )
    return layers


def _misfits(loss: Loss, options: Mapping[str, Any], models: tuple[Architecture, Architecture]) -> list[str]:
    """What of the two shapes does not go together for this loss."""
    student, teacher = models
    if loss.feature in ("", "logits") and loss.paired != student.paired:
        if loss.paired:
            return [f"reads the vectors of a text and an image, which a {student.family!r} student does not give"]
        return ["reads logits, and two encoders give vectors; take similarity_kl, pair_mse or pair_labels"]
    if loss.feature == "logits" and student.labels != teacher.labels:
        return [
            f"the student has {student.labels} labels, the teacher {teacher.labels}; give both the same, or take a "
            f"loss on hidden states"
        ]
    by_head = loss.feature in ("scores", "attention") and options.get("heads") not in ("mean", "sum")
    if by_head and student.heads != teacher.heads:
        merged = "set heads = 'mean', " if "heads" in loss.options else ""
        return [
            f"compares head by head, and the student has {student.heads}, the teacher {teacher.heads}; "
            f"{merged}give the student {teacher.heads} heads, or take a relation loss"
        ]
    heads = options.get("relation_heads")
    widths = [shape.width if loss.feature == "hidden" else shape.attention_width for shape in models]
    if heads and any(width % heads for width in widths):
        fitting = ", ".join(str(number) for number in _common_divisors(*widths))
        return [f"relation_heads = {heads} must divide {widths[0]} and {widths[1]}; {fitting} would do"]
    if heads == 1 and loss.function is head_relation:
        fitting = ", ".join(str(number) for number in _common_divisors(*widths)[1:])
        instead = f"set relation_heads to one of {fitting}" if fitting else "take a loss on hidden states"
        return [f"one relation head has no other to relate to; {instead}"]
    return []


def _common_divisors(one: int, other: int) -> list[int]:
    both = math.gcd(one, other)
    return [number for number in range(1, both + 1) if both % number == 0]


def _widths(loss: Loss, models: tuple[Architecture, Architecture]) -> tuple[int, int] | None:
    """Student and teacher width where they differ and the loss wants them equal."""
    mine, theirs = (shape.width if loss.feature == "hidden" else shape.attention_width for shape in models)
    return (mine, theirs) if loss.projects and mine != theirs else None


def _sides(models: tuple[Architecture, Architecture]) -> list[tuple[str, Architecture]]:
    return list(zip(("student", "teacher"), models, strict=True))


def _near(word: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(names)}" if names else "it has none"
