"""Objectives by name: published recipes as plain data, and the choice that `preset = "auto"` makes.

Weights are those of the papers or of their code, turned into our units: a sum over valid items divided by their count,
and the mean over mapped layers, where TinyBERT and TextBrewer add layers up. The papers that first distil and then
fine-tune do so here in two stages of one training run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from distill.encoders import FAMILIES, Architecture
from distill.errors import ObjectiveError
from distill.objectives.attention import shared_heads
from distill.objectives.losses import LOSSES
from distill.recipe import ObjectiveRecipe, TermRecipe

CACHE_LIMIT = 20e9
"""Bytes of hidden states that `auto` finds too many to keep; half precision, TOKENS an example."""

SOFT = ("soft_labels", "soft_labels_multilabel", "soft_spans", "jsd", "reverse_kl", "total_variation")
"""Losses whose temperature `objective.temperature` replaces."""

TOKENS = 32
"""Tokens that `auto` takes an example to have: it knows the number of examples only."""


def _stage(begin: float, until: float, weight: float = 1.0) -> dict[str, Any]:
    return {"schedule": "stages", "start": weight, "from": begin, "until": until}


_SOFT: dict[str, Any] = {"loss": "soft_labels", "temperature": 4.0}
_LABELS: dict[str, Any] = {"loss": "hard_labels"}

_HIDDEN: dict[str, Any] = {"loss": "hidden_mse", "layers": "inherited"}
_RELATIONS: tuple[dict[str, Any], ...] = tuple(
    {"loss": f"{kind}_relation", "weight": 1 / 3, "layers": "final"} for kind in ("query", "key", "value")
)

PRESETS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    # What a student reaches without a teacher.
    "none": (_LABELS,),
    "logits": (_SOFT,),
    # Projected where the student is narrower.
    "logits+hidden": (_SOFT, _HIDDEN),
    # MiniLMv2's relations beside the logits: for a narrower student, since they need no projection.
    "logits+relations": (_SOFT, *_RELATIONS),
    # The same beside the gold labels, where there are any.
    "labels+logits": (_LABELS, _SOFT),
    "labels+logits+hidden": (_LABELS, _SOFT, _HIDDEN),
    "labels+logits+relations": (_LABELS, _SOFT, *_RELATIONS),
    # One vector a text and its similarities to others of the batch, beside hidden states (projected where narrower).
    "embedding": (
        {"loss": "embedding", "layers": "final"},
        {"loss": "pairwise_cosine", "layers": "final", "weight": 10.0},
        _HIDDEN,
    ),
    # CLIP-KD (2307.12732): both rankings within a batch, and the vectors themselves.
    "image-text": ({"loss": "similarity_kl"}, {"loss": "pair_mse", "weight": 10.0}),
    # Word-level distillation of 1606.07947: the teacher's next token and the text's own, in equal parts.
    "language": ({"loss": "soft_labels", "temperature": 1.0}, _LABELS),
    # The teacher alone, for language models: all it thinks possible, its main answers, or between the two (2306.13649).
    "forward-kl": ({"loss": "soft_labels", "temperature": 1.0},),
    "reverse-kl": ({"loss": "reverse_kl", "temperature": 1.0},),
    "jsd": ({"loss": "jsd", "temperature": 1.0},),
    # TextBrewer's DistillationConfig as it comes: no hard labels, no intermediate matches.
    "textbrewer-default": ({**_SOFT, "options": {"convention": "textbrewer"}},),
    # 1910.01108; README of its code: alpha_ce 5, alpha_mlm 2, alpha_cos 1 on the last layer, temperature 2.
    "distilbert": (
        {"loss": "soft_labels", "temperature": 2.0, "weight": 5.0},
        {"loss": "hard_labels", "weight": 2.0},
        {"loss": "hidden_cosine", "layers": "final"},
    ),
    # 1909.10351: embeddings, hidden states and scores first; then soft labels alone, at temperature 1.
    "tinybert": (
        {"loss": "hidden_mse", "layers": "uniform", "weight": _stage(0.0, 0.75)},
        {"loss": "attention_mse", "layers": "uniform", "weight": _stage(0.0, 0.75)},
        {"loss": "soft_labels", "temperature": 1.0, "weight": _stage(0.75, 1.0)},
    ),
    # 2002.10957: attention and value relation of the last layer, then the task. (Values in shared relation heads.)
    "minilm-v1": (
        {"loss": "attention_kl", "layers": "final", "weight": _stage(0.0, 0.5)},
        {"loss": "value_relation", "layers": "final", "weight": _stage(0.0, 0.5)},
        {**_SOFT, "weight": _stage(0.5, 1.0)},
    ),
    # 2012.15828: query, key and value relations, equal weights, then the task.
    "minilm-v2": (
        *(
            {"loss": f"{kind}_relation", "layers": "final", "weight": _stage(0.0, 0.5)}
            for kind in ("query", "key", "value")
        ),
        {**_SOFT, "weight": _stage(0.5, 1.0)},
    ),
    # 1908.09355: alpha 0.5, beta 100 on a mean over 768 numbers, where ours is their sum; PKD-Skip.
    "pkd": (
        {"loss": "soft_labels", "temperature": 10.0, "weight": 0.5},
        {"loss": "hard_labels", "weight": 0.5},
        {"loss": "pkd", "layers": "skip", "weight": 100 / 768},
    ),
    # 2004.02984: feature maps and attention of every layer, then the prediction layer.
    "mobilebert": (
        {"loss": "feature_map", "layers": "uniform", "weight": _stage(0.0, 0.75)},
        {"loss": "attention_ce", "layers": "uniform", "weight": _stage(0.0, 0.75)},
        {"loss": "soft_labels", "temperature": 1.0, "weight": _stage(0.75, 1.0)},
    ),
}
"""Terms as a recipe would write them."""


def preset_terms(name: str) -> list[TermRecipe]:
    """The terms of a preset.

    Raises:
        ObjectiveError: There is no preset of that name.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise ObjectiveError(
            f"preset {name!r} does not exist",
            where="objective.preset",
            fix=f"Did you mean {near[0]!r}?" if near else f"Known: auto, {', '.join(PRESETS)}.",
        )
    return [TermRecipe.model_validate(dict(term)) for term in PRESETS[name]]


def resolve_terms(
    recipe: ObjectiveRecipe,
    preset: str,
    student: Architecture,
    teacher: Architecture,
    *,
    examples: int,
    labelled: bool = False,
    same_tokens: bool = True,
    losses: Mapping[str, str] | None = None,
) -> tuple[list[TermRecipe], str]:
    """The terms that a recipe asks for, and why these.

    Args:
        recipe: Its own terms come first, then its preset; its temperature stands for that of every soft-label term.
        preset: The task's own, for `auto`.
        student: Of `describe(student)`.
        teacher: Of `describe(teacher)`.
        examples: Rows of the transfer set.
        labelled: Some of them have a gold label.
        same_tokens: The student splits every text as the teacher does, so that they can be compared token by token.
        losses: What stands for a preset's loss in this task.

    Raises:
        ObjectiveError: A term compares what the task does not give.
    """
    if recipe.terms:
        terms, reason = list(recipe.terms), "the recipe's own terms"
    elif recipe.preset == "auto":
        terms, reason = auto(preset, student, teacher, examples, labelled=labelled, same_tokens=same_tokens)
    else:
        terms, reason = preset_terms(recipe.preset), f"{recipe.preset}: asked for by the recipe"
    if recipe.temperature is not None:
        changed = {"temperature": recipe.temperature}
        terms = [term.model_copy(update=changed) if term.loss in SOFT else term for term in terms]
    terms = terms if recipe.terms else translate(terms, losses or {})
    _refuse_classes(terms, losses or {})
    return terms, reason


def _refuse_classes(terms: Sequence[TermRecipe], losses: Mapping[str, str]) -> None:
    """Refuses losses over classes where the task's outputs are none: its own losses stand for theirs."""
    for term in terms:
        if "soft_labels" in losses and term.loss in LOSSES and LOSSES[term.loss].classes:
            raise ObjectiveError(
                f"{term.loss} compares distributions over classes, and this task's outputs are none",
                where="objective",
                fix=f"Take {losses['soft_labels']}, or a preset with soft_labels, which it stands for here.",
            )


def refuse_logits(terms: Sequence[TermRecipe], task: str) -> None:
    """Refuses losses on logits where models give none.

    Raises:
        ObjectiveError: Naming the first of them.
    """
    for term in terms:
        if term.loss in LOSSES and LOSSES[term.loss].feature in ("", "logits"):
            raise ObjectiveError(
                f"{term.loss} reads logits, and models for {task} give vectors",
                where="objective",
                fix='Take preset = "auto", or losses on hidden states: embedding, pairwise_cosine, rkd_distance, ...',
            )


def translate(terms: Sequence[TermRecipe], losses: Mapping[str, str]) -> list[TermRecipe]:
    """The terms with a task's own losses in place of those of one label a row, less settings they do not know."""
    result = []
    for term in terms:
        if term.loss in losses:
            loss = LOSSES[losses[term.loss]]
            known = {
                name: value
                for name, value in term.options.items()
                if name in loss.options and value in (loss.choices(name) or (value,))
            }
            temperature = term.temperature if "temperature" in loss.options else None
            term = term.model_copy(update={"loss": loss.name, "options": known, "temperature": temperature})
        result.append(term)
    return result


def auto(
    task_default: str,
    student: Architecture,
    teacher: Architecture,
    examples: int,
    *,
    labelled: bool = False,
    same_tokens: bool = True,
) -> tuple[list[TermRecipe], str]:
    """Chooses a preset by widths, depth and the transfer set.

    A task whose default is not `logits+hidden` keeps its default. Else: hidden states where the student is as wide as
    its teacher, relations where it is narrower and both families give queries and keys, and logits alone where the
    hidden states of the transfer set would fill a disk, or where a smaller vocabulary splits texts into other tokens.
    Gold labels are learnt from beside all of these, where there are any.

    Returns:
        The terms, and the reason in a line.
    """
    if task_default != "logits+hidden":
        return preset_terms(task_default), f"{task_default}: the task's default"
    name, why = _follow(student, teacher, examples, same_tokens)
    name = f"labels+{name}" if labelled else name
    return preset_terms(name), f"{name}: {why}"


def _follow(student: Architecture, teacher: Architecture, examples: int, same_tokens: bool) -> tuple[str, str]:
    """What of the teacher the student can follow: a preset, and why."""
    if not same_tokens:
        return "logits", "the student's vocabulary splits texts into other tokens than the teacher's"
    size = float(examples) * TOKENS * teacher.width * (student.layers + 1) * 2
    if size > CACHE_LIMIT:
        return "logits", f"hidden states of {examples:,} examples would take about {size / 1e9:.0f} GB"
    if student.width == teacher.width:
        why = f"both are {student.width} wide, so {student.layers} layers can follow the teacher's {teacher.layers}"
        return "logits+hidden", why
    widths = f"the student is {student.width} wide, the teacher {teacher.width}"
    if _relations_fit(student, teacher):
        return "logits+relations", f"{widths}; relations need no projection"
    return "logits+hidden", f"{widths}, with a projection between"


def _relations_fit(student: Architecture, teacher: Architecture) -> bool:
    """Both give queries, keys and values, and their widths can be cut into the same number of relation heads."""
    known = student.family in FAMILIES and teacher.family in FAMILIES
    return known and shared_heads(student.attention_width, teacher.attention_width) > 1
