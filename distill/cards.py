"""Teacher and student cards: one TOML file each, found by name or by path, checked as a whole.

A teacher card is a checkpoint and what may be expected of it; a student card is a shape and what it inherits. Adding
a teacher or a student adds one file to `teachers/` or `students/`.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.errors import CardError

Count = Annotated[int, Field(ge=1)]
Part = Literal["embeddings", "layers", "head"]
LayerChoice = Literal["even", "first", "last"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Card(_Table):
    folder: ClassVar[str]
    kind: ClassVar[str]

    name: str = Field(min_length=1, description="What a recipe calls it; the file's name without `.toml`.")


class Floor(_Table):
    """The score below which a run stops, because it is not the teacher it should be."""

    metric: str = Field(description="The task's metric, such as `accuracy`.")
    value: float = Field(ge=0.0, le=1.0, description="The least score that is believed.")
    data: str = Field("", description="What it was measured on.")


class TeacherCard(_Card):
    """A checkpoint and its contract."""

    folder: ClassVar[str] = "teachers"
    kind: ClassVar[str] = "teacher"

    checkpoint: str = Field(min_length=1, description="Hub id, or a folder.")
    revision: str = Field("main", description="Commit, tag or branch of a hub id.")
    package: str = Field("", description="Installed package and folder in it that carry the same files.")
    task: str = Field(description="The task it was trained for, such as `text-classification`.")
    labels: list[str] = Field([], description="Label names in the order of its logits; empty: none trained yet.")
    max_length: Count = Field(512, description="Tokens it reads at most, special tokens included.")
    licence: str = Field(min_length=1, description="SPDX id of the weights' licence, or what is known of it.")
    floor: Floor | None = Field(None, description="Score below which a run stops.")
    notes: str = Field("", description="What a person should know before using it.")

    @property
    def fine_tuned(self) -> bool:
        """False for a pretrained starting point, which has no labels of its own."""
        return bool(self.labels)

    def location(self) -> str:
        """Where to load it from: the folder of an installed package that carries it, else the checkpoint."""
        if self.package:
            package, _, inside = self.package.partition("/")
            spec = find_spec(package)
            if spec is not None and spec.origin is not None:
                folder = Path(spec.origin).parent / inside
                if folder.is_dir():
                    return str(folder)
        return self.checkpoint


class Inherits(_Table):
    """What a student takes over from its teacher, wherever shapes agree."""

    parts: list[Part] = Field(["embeddings", "layers", "head"], description="Parts that are copied.")
    layers: LayerChoice | list[Count] = Field(
        "even", description="Which teacher layers: even (first to last), first, last, or their numbers from 1."
    )


class Declared(_Table):
    """The size a card promises; a test builds the student and compares."""

    teacher: Literal["bert-base"] = Field(
        description="`bert-base`: 12 layers of 768, 30,522 tokens, two labels, as google-bert/bert-base-uncased."
    )
    parameters: Count = Field(description="Parameters of the student of that teacher.")
    int8_bytes: Count = Field(description="Bytes of its int8 ONNX file.")


class StudentCard(_Card):
    """A shape, and what it inherits. `"teacher"` takes the teacher's own value."""

    folder: ClassVar[str] = "students"
    kind: ClassVar[str] = "student"

    description: str = Field(min_length=1, description="One sentence: what it is and whom it suits.")
    source: str = Field("", description="Paper or model that defines the shape.")
    family: str = Field("teacher", description="transformers model type, such as `distilbert`.")
    layers: Count = Field(description="Transformer layers; of an encoder and decoder, those of the encoder.")
    decoder_layers: Count | Literal["same"] = Field(
        "same",
        description="Layers of a decoder behind an encoder; `same` takes as many as `layers`, as far as there are.",
    )
    hidden_size: Count | Literal["teacher"] = Field("teacher", description="Width of a hidden state.")
    embedding_size: Count | Literal["teacher"] = Field(
        "teacher", description="Numbers a token in the table, widened by a product; for families that have one."
    )
    attention_heads: Count | Literal["teacher"] = Field("teacher", description="Heads a layer.")
    head_size: Count | None = Field(
        None, description="Width of one head; gives `attention_heads` from the width when that is `teacher`."
    )
    intermediate_size: Count | Literal["teacher", "teacher/2", "teacher/4"] = Field(
        "teacher", description="Width inside the feed-forward; `teacher/2` is half of the teacher's."
    )
    bottleneck_size: Count | None = Field(
        None, description="Width inside a layer, between two products, in MobileBERT's manner; for its family only."
    )
    feed_forwards: Count = Field(1, description="Feed-forwards of a bottleneck layer, one behind the other.")
    activation: str = Field("teacher", description="Activation inside the feed-forward, such as `gelu` or `relu`.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | Literal["teacher"] | None = Field(
        None,
        description="Share of values dropped while it learns, wherever its teacher drops some; none: the task's.",
    )
    inherits: Inherits = Field(default_factory=Inherits, description="What it takes over from its teacher.")
    declared: Declared | None = Field(None, description="The size it promises for a named teacher.")


AnyCard = TypeVar("AnyCard", TeacherCard, StudentCard)


def load_teacher_card(name_or_path: str | Path) -> TeacherCard:
    """Reads a teacher card by its name, or by the path of a TOML file.

    Raises:
        CardError: When there is none, or naming everything wrong with it.
    """
    return _load(TeacherCard, name_or_path)


def load_student_card(name_or_path: str | Path) -> StudentCard:
    """Reads a student card by its name, or by the path of a TOML file.

    Raises:
        CardError: When there is none, or naming everything wrong with it.
    """
    return _load(StudentCard, name_or_path)


def list_cards(kind: Literal["teacher", "student"] = "student") -> list[str]:
    """Names of the cards that come with distill, in alphabetical order."""
    folder = _folder(f"{kind}s")
    return sorted(path.stem for path in folder.glob("*.toml"))


def replace_card(card: AnyCard, changes: dict[str, Any], *, where: str = "") -> AnyCard:
    """The same card with other values; those that are None are left as they were.

    A changed card no longer promises its declared size.

    Args:
        card: The card, which stays as it is.
        changes: Field name to value.
        where: Named in the error, such as `student` for the recipe's section.

    Raises:
        CardError: Naming every value that a card may not hold.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    if not given:
        return card
    values = card.model_dump() | given
    if "declared" in values:
        values["declared"] = None
    return _check(type(card), values, where or f"{card.kind} card {card.name!r}")


def _load(card_type: type[AnyCard], name_or_path: str | Path) -> AnyCard:
    text = str(name_or_path)
    if text.endswith(".toml") or "/" in text or "\\" in text:
        path = Path(text)
        if not path.is_file():
            raise CardError(f"there is no {card_type.kind} card at {text!r}", fix="Give the path of a TOML file.")
    else:
        path = _folder(card_type.folder) / f"{text}.toml"
        if not path.is_file():
            raise _unknown(card_type.kind, text)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CardError(f"not a readable TOML file ({error})", where=str(path)) from None
    values.setdefault("name", path.stem)
    card = _check(card_type, values, str(path))
    if card.name != path.stem:
        raise CardError(
            f"`name` is {card.name!r} but the file is called {path.name!r}",
            where=str(path),
            fix="Give both the same name.",
        )
    return card


def _unknown(kind: str, name: str) -> CardError:
    known = [path.stem for path in sorted(_folder(f"{kind}s").glob("*.toml"))]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return CardError(
        f"there is no {kind} card {name!r}",
        fix=f"{hint}There are: {', '.join(known)}. The path of a TOML file will do too.",
    )


def _folder(name: str) -> Path:
    """`distill/_cards/NAME` in an installed wheel, `NAME` beside the package in a source tree."""
    package = Path(__file__).resolve().parent
    installed = package / "_cards" / name
    return installed if installed.is_dir() else package.parent / name


def _check(card_type: type[AnyCard], values: dict[str, Any], where: str) -> AnyCard:
    try:
        return card_type.model_validate(values)
    except ValidationError as error:
        problems = [_explain(card_type, item) for item in error.errors()]
        raise CardError("; ".join(dict.fromkeys(problems)), where=where) from None


def _explain(card_type: type[_Card], item: Any) -> str:
    """One finding in the card's own words, with the value that is wrong."""
    fields = list(card_type.model_fields)
    path = [str(step) for step in item["loc"]]
    key = ".".join(step for step in path if step.isidentifier() or step.isdigit())
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], fields, n=1) if len(path) == 1 else []
        hint = f"Did you mean `{near[0]}`?" if near else f"A {card_type.kind} card holds {', '.join(fields)}."
        return f"`{key}` is not a field. {hint}"
    if item["type"] == "missing":
        return f"`{key}` is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"`{key}`: {message[0].lower()}{message[1:]}; got {item['input']!r}"
