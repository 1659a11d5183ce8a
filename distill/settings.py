"""Settings in a TOML file: written out, overridden on the command line, and what is wrong with them in plain words."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel

from distill.errors import RecipeError

KINDS = ("str", "int", "float", "bool", "none", "dict", "list", "tuple")
"""What pydantic calls the kinds of a value that may have several."""


def apply_override(values: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in `values`."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError([f"`--set {override}` must be KEY=VALUE, such as training.epochs=3."], where="--set")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    try:
        target: Any = values
        for step in path:
            target = target[int(step)] if isinstance(target, list) else target.setdefault(step, {})
        target[int(last) if isinstance(target, list) else last] = value
    except (IndexError, ValueError, TypeError, AttributeError):
        problem = f"`--set {override}` leads nowhere: the recipe has no {key.strip()}"
        raise RecipeError([problem], where="--set") from None


def explain(errors: Iterable[Any], whole: type[BaseModel]) -> list[str]:
    """Pydantic's findings in the words of the file, one a setting: of what may be two things it names both."""
    said: dict[tuple[str, str], list[str]] = {}
    for item in errors:
        path = _named(item, whole)
        problem, _, got = _explain(item, path, whole).partition("; got ")
        said.setdefault((".".join(path), got), []).append(problem)
    return [
        " or ".join([first, *(other.removeprefix(f"`{key}` ") for other in more)]) + (f"; got {got}" if got else "")
        for (key, got), (first, *more) in said.items()
    ]


def _named(item: Any, whole: type[BaseModel]) -> list[str]:
    """Where a problem is, in the file's own keys: pydantic names the kinds that a value might have too."""
    path: list[str] = []
    for step in item["loc"]:
        known = _known_keys(path, whole)
        stranger = item["type"] == "extra_forbidden" and step == item["loc"][-1]
        if (
            isinstance(step, int)
            or step in known
            or stranger
            or (not known and step not in KINDS and step.isidentifier())
        ):
            path.append(str(step))
    return path


def _explain(item: Any, path: list[str], whole: type[BaseModel]) -> str:
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], _known_keys(path[:-1], whole), n=1)
        hint = f" Did you mean `{near[0]}`?" if near else f" Known here: {', '.join(_known_keys(path[:-1], whole))}"
        return f"`{key}` is not a setting.{hint}"
    if item["type"] == "missing":
        return f"`{key}` must be given"
    if item["type"] in ("model_type", "model_attributes_type"):
        keys = ", ".join(_known_keys(path, whole)[:3])
        return f"`{key}` must be a section with settings such as {keys}; got {item['input']!r}"
    message = str(item["msg"])
    return f"`{key}` {message[0].lower()}{message[1:]}; got {item['input']!r}"


def _known_keys(path: list[str], whole: type[BaseModel]) -> list[str]:
    model: Any = whole
    for step in path:
        if step.isdigit():
            continue
        field = getattr(model, "model_fields", {}).get(step)
        model = _model_of(field.annotation) if field else None
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_of(annotation: Any) -> Any:
    """The section model inside an annotation such as `list[TermRecipe]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _model_of(argument))), None)


def render_toml(whole: BaseModel, *, comments: str = "") -> str:
    """Writes settings as TOML: `comments` first and each field under its documentation, where it is not empty."""
    lines = [f"# {comments}"] if comments else []
    fields = type(whole).model_fields
    scalars = {name for name in fields if not isinstance(getattr(whole, name), BaseModel)}
    lines += _render_fields(whole, scalars, bool(comments))
    for name in fields:
        if name not in scalars:
            lines += _render_section(name, getattr(whole, name), bool(comments))
    return "\n".join(lines).strip() + "\n"


def _render_section(name: str, section: BaseModel, comments: bool) -> list[str]:
    own = {key for key in type(section).model_fields if not isinstance(getattr(section, key), BaseModel)}
    tables = {key for key in own if _is_tables(getattr(section, key))}
    header = ["", *(f"# {line}" for line in _docs(section) if comments), f"[{name}]"]
    lines = header + _render_fields(section, own - tables, comments)
    for key in sorted(tables):
        for item in getattr(section, key):
            values = item.model_dump(mode="json", by_alias=True, exclude_none=True)
            lines += ["", f"[[{name}.{key}]]", *(f"{k} = {_toml(v)}" for k, v in values.items())]
    for key in type(section).model_fields:
        if key not in own:
            lines += _render_section(f"{name}.{key}", getattr(section, key), comments)
    return lines


def _render_fields(section: BaseModel, names: set[str], comments: bool) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        if name not in names:
            continue
        value = getattr(section, name)
        if comments:
            lines += ["", f"# {field.description}"]
        if value is not None:
            lines.append(f"{field.alias or name} = {_toml(value)}")
        elif comments:
            lines.append(f"# {field.alias or name} =")
    return lines


def _docs(section: BaseModel) -> list[str]:
    return [line.strip() for line in (type(section).__doc__ or "").strip().splitlines()]


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], BaseModel)


def _toml(value: Any) -> str:
    """A TOML value. JSON strings, numbers and booleans are TOML but for U+007F; tables are written inline."""
    if isinstance(value, dict):
        inside = ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
