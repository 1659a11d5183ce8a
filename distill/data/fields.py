"""Kinds of columns: what a task's input and its label may be, what is wrong with a value, and how it is kept.

A task names its kinds; a new kind enters `INPUTS` or `TARGETS`.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import tokenize
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from distill.errors import DataError
from distill.heads.base import whole
from distill.heads.images import encode_image, read_image

LARGEST = 3.4028235e38
"""Largest number of 32 bits."""

Read = tuple[Any, str | None]
"""A value and None, or None and what is wrong with it."""


@dataclass(frozen=True)
class Input:
    """A kind of `data.text`.

    Attributes:
        feature: What the dataset keeps.
        read: From the value of a row and the column's name.
        content: What makes two rows the same.
        located: A value with what it names in the table's folder in its place.
        alone: It is what a model has seen, whatever text stands beside it: all its rows are on one side.
    """

    feature: Any
    read: Callable[[Any, str], Read]
    content: Callable[[Any], str]
    located: Callable[[Any, Path | None], Any] = lambda value, folder: value
    alone: bool = False


@dataclass(frozen=True)
class Target:
    """A kind of `data.label`.

    Attributes:
        feature: What the dataset keeps.
        read: From the value of a row, the column's name, and the names of a ClassLabel.
        names: Label names in a value; None where labels are no names.
        rename: A value with other names.
        fits: What is wrong with a label beside its text and second text.
        column: There is such a column.
        blank: The label of rows without such a column; told whether they are lines of a running text.
    """

    feature: Any
    read: Callable[[Any, str, Sequence[str] | None], Read]
    names: Callable[[Any], Sequence[str]] | None = None
    rename: Callable[[Any, Mapping[str, str]], Any] = lambda value, new: value
    fits: Callable[[Any, Any, Any], str | None] = lambda text, pair, value: None
    column: bool = True
    blank: Callable[[bool], Any] = lambda running: None


def _read_text(value: Any, column: str) -> Read:
    if isinstance(value, str):
        return (whole(value), None) if value.strip() else (None, f"{column!r} is empty")
    if missing(value):
        return None, f"{column!r} is missing"
    if isinstance(value, bytes) or (isinstance(value, Mapping) and "bytes" in value):
        return None, f"{column!r} holds images, not text; task image-classification reads those"
    return None, f"{column!r} is {type(value).__name__}, not text; it holds {value!r:.40}"


def _in_folder(value: Any, folder: Path | None) -> Any:
    """The bytes of the file that a path names, which must lie in the folder of the table; or what is wrong with it."""
    path = value.get("path") if isinstance(value, Mapping) and value.get("bytes") is None else value
    if not isinstance(path, str) or path.lstrip().startswith("["):
        return _from_json(value)
    if folder is None:
        return {"wrong": f"{path!r:.80} is a path, and the data is no file that it could stand beside"}
    file = folder / path
    if not file.resolve().is_relative_to(folder.resolve()):
        return {"wrong": f"the image {path!r:.80} lies outside {folder}"}
    if not file.is_file():
        return {"wrong": f"there is no image file {path!r:.80} in {folder}"}
    return {"bytes": file.read_bytes(), "path": path}


def _read_picture(value: Any, column: str) -> Read:
    """PNG, JPEG or what else Pillow decodes, as bytes; numbers become a PNG."""
    if missing(value):
        return None, f"{column!r} is missing"
    if isinstance(value, Mapping) and "wrong" in value:
        return None, str(value["wrong"])
    try:
        array = read_image(value)
    except DataError as error:
        return None, f"{column!r} holds no image: {error.what}"
    content = value.get("bytes") if isinstance(value, Mapping) else value
    named = value.get("path") if isinstance(value, Mapping) else None
    content = content if isinstance(content, bytes) else encode_image(array)
    return {"bytes": content, "path": named or "image"}, None


def _read_words(value: Any, column: str) -> Read:
    """A list of words, as JSON in a CSV, or a text that is cut at white space."""
    value = _from_json(value)
    if isinstance(value, str):
        value = value.split()
    if missing(value):
        return None, f"{column!r} is missing"
    if not isinstance(value, (list, tuple)) or not all(isinstance(word, str) for word in value):
        return None, f"{column!r} is {type(value).__name__}, not a list of words; it holds {value!r:.40}"
    if not value:
        return None, f"{column!r} is empty"
    blank = next((number for number, word in enumerate(value, 1) if not word.strip()), None)
    return (None, f"word {blank} of {column!r} is empty") if blank else ([whole(word) for word in value], None)


def read_class(value: Any, column: str, class_names: Sequence[str] | None) -> Read:
    """The label as a name, or what is wrong with it."""
    name: str | None = None
    if missing(value) or (isinstance(value, str) and value.strip().casefold() in ("", "nan")):
        return None, f"{column!r} is missing"
    if isinstance(value, str):
        name = whole(value.strip())
    elif isinstance(value, (list, tuple, dict)):
        pass
    elif class_names is not None:
        name = class_names[value] if 0 <= value < len(class_names) else None
    elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        name = str(value if isinstance(value, bool) else int(value))
    if name is None:
        return None, f"{column!r} is {type(value).__name__}, not the name or number of a class; it holds {value!r:.40}"
    return name, None


def _read_tags(value: Any, column: str, class_names: Sequence[str] | None) -> Read:
    value = _from_json(value)
    if isinstance(value, str):
        value = value.split()
    if missing(value):
        return None, f"{column!r} is missing"
    if not isinstance(value, (list, tuple)):
        return None, f"{column!r} is {type(value).__name__}, not a list of one tag a word; it holds {value!r:.40}"
    tags = []
    for number, one in enumerate(value, 1):
        name, problem = read_class(one, f"tag {number} of {column}", class_names)
        if problem is not None:
            return None, problem
        tags.append(name)
    return tags, None


def _read_number(value: Any, column: str, class_names: Sequence[str] | None) -> Read:
    if missing(value) or (isinstance(value, str) and not value.strip()):
        return None, f"{column!r} is missing"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None, f"{column!r} is no number; it holds {value!r:.40}"
    except OverflowError:
        number = math.inf
    finite = abs(number) <= LARGEST  # what a model computes with
    return (number, None) if finite else (None, f"{column!r} is {number}, not a finite number")


def _read_classes(value: Any, column: str, class_names: Sequence[str] | None) -> Read:
    """A list of labels, as JSON or with | between in a CSV; an empty one is a row to which no label applies."""
    value = _from_json(value)
    if isinstance(value, str):
        value = [part for part in value.split("|") if part.strip()]
    if missing(value):
        return None, f"{column!r} is missing"
    if not isinstance(value, (list, tuple)):
        return None, f"{column!r} is {type(value).__name__}, not a list of labels; it holds {value!r:.40}"
    names: list[str] = []
    for number, one in enumerate(value, 1):
        name, problem = read_class(one, f"label {number} of {column}", class_names)
        if problem is not None:
            return None, problem
        names.append(name)
    if len(set(names)) < len(names) and set(names) <= {"0", "1"}:
        return None, f"{column!r} has a 0 or 1 for every label; give the names of those that apply"
    return sorted(set(names)), None


def _read_span(value: Any, column: str, class_names: Sequence[str] | None) -> Read:
    """SQuAD's answers: texts and where they start; no text where the context has no answer."""
    value = _from_json(value)
    if missing(value):
        return None, f"{column!r} is missing"
    if isinstance(value, (list, tuple)) and all(isinstance(one, Mapping) for one in value):  # one mapping an answer
        value = {name: [one.get(name) for one in value] for name in ("text", "answer_start")}
    texts, starts = (
        (value.get(name) for name in ("text", "answer_start")) if isinstance(value, Mapping) else (None, None)
    )
    if isinstance(texts, str):
        texts, starts = [texts], [starts]
    if not isinstance(texts, (list, tuple)) or not isinstance(starts, (list, tuple)) or len(texts) != len(starts):
        return None, f"{column!r} has no `text` with an `answer_start` for each; it holds {value!r:.40}"
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return None, f"an answer of {column!r} is empty; leave `text` and `answer_start` empty where there is none"
    if not all(isinstance(start, int) and start >= 0 for start in starts):
        return None, f"an `answer_start` of {column!r} is no character's number; it holds {starts!r:.40}"
    return {"text": [whole(text) for text in texts], "answer_start": list(starts)}, None


def _in_context(text: Any, pair: Any, span: Any) -> str | None:
    for answer, start in zip(span["text"], span["answer_start"], strict=True):
        if pair[start : start + len(answer)] != answer:
            place = pair.find(answer)
            if place < 0:
                return f"the answer {answer!r:.60} is not in the context"
            return f"the answer {answer!r:.60} does not start at character {start} of the context but at {place}"
    return None


def _as_many(text: Any, pair: Any, tags: Any) -> str | None:
    return None if len(text) == len(tags) else f"{len(tags)} tags for {len(text)} words"


def _read_target(value: Any, column: str, class_names: Sequence[str] | None) -> Read:
    return _read_text(value, column)


def _read_nothing(value: Any, column: str, class_names: Sequence[str] | None) -> Read:
    return None, None


def _from_json(value: Any) -> Any:
    """What a CSV holds of a list or a mapping: JSON, or as Python, pandas and NumPy write them."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        for read in (json.loads, _from_python):
            try:
                return read(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
                continue
    return value


def _from_python(text: str) -> Any:
    """A literal of Python, or an array of texts as NumPy writes it: without the commas between them.

    Raises:
        ValueError: It is neither.
    """
    parts: list[str] = []
    before = tokenize.ENCODING
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.NL, tokenize.NEWLINE):
            parts += [","] if token.type == before == tokenize.STRING else []
            parts.append(token.string)
            before = token.type
    return ast.literal_eval(" ".join(parts))


def missing(value: Any) -> bool:
    """None or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _renamed(names: Sequence[str], new: Mapping[str, str]) -> list[str]:
    return [new.get(name, name) for name in names]


_TEXT, _TEXTS = datasets.Value("string"), datasets.Sequence(datasets.Value("string"))

INPUTS: dict[str, Input] = {
    "text": Input(_TEXT, _read_text, str),
    "words": Input(_TEXTS, _read_words, " ".join),
    "image": Input(
        {"bytes": datasets.Value("binary"), "path": _TEXT},
        _read_picture,
        lambda value: hashlib.sha256(value["bytes"]).hexdigest(),
        _in_folder,
        alone=True,
    ),
}
"""By the name that `Task.inputs` gives."""

TARGETS: dict[str, Target] = {
    "class": Target(_TEXT, read_class, lambda name: (name,), lambda name, new: new.get(name, name)),
    "tags": Target(_TEXTS, _read_tags, list, _renamed, _as_many),
    "classes": Target(_TEXTS, _read_classes, list, _renamed),
    "span": Target(
        {"text": _TEXTS, "answer_start": datasets.Sequence(datasets.Value("int64"))}, _read_span, fits=_in_context
    ),
    "number": Target(datasets.Value("float64"), _read_number),
    "text": Target(_TEXT, _read_target),
    "nothing": Target(_TEXT, _read_nothing, column=False),
    "end": Target(datasets.Value("bool"), _read_nothing, column=False, blank=lambda running: not running),
}
"""By the name that `Task.target` gives. `end` says of each text whether it ends behind its last word."""
