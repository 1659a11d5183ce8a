"""Which stages of a run are done, for which inputs: what makes the same command go on where it was."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill import processes
from distill.errors import OutputError, RecipeError
from distill.files import read_json, sha256_json, write_json, write_text
from distill.recipe import Recipe

FOLDER = "{output}"
"""Stands for the output folder in what stages sum up, since it may be moved."""


class Ledger:
    """The stages of one output folder.

    A stage is done when it was recorded with the same inputs. Inputs that differ clear the stage's unfinished work, so
    nothing is ever resumed that was made from something else.

    Args:
        folder: `work/state` of the output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if processes.is_main():  # which looks first whether the folder is free
            folder.mkdir(parents=True, exist_ok=True)

    def once(
        self,
        stage: str,
        inputs: Mapping[str, Any],
        work: Callable[[], dict[str, Any]],
        *,
        scratch: Path | None = None,
        makes: list[Path] | None = None,
    ) -> dict[str, Any]:
        """Runs `work` unless it has been done for these inputs and what it made is still there.

        Args:
            stage: Name of the stage.
            inputs: Everything the result depends on, as JSON values.
            work: Returns the facts to keep, as JSON values.
            scratch: Its folder for unfinished work; cleared when the inputs have changed and when it is done.
            makes: What must exist for the stage to count as done.

        Returns:
            The facts, with `seconds` of work in all sittings.
        """
        path = self.folder / f"{stage}.json"
        fingerprint = sha256_json(inputs)
        known = read_json(path) or {}
        same = known.get("fingerprint") == fingerprint
        whole = same and known.get("done") and all(made.exists() for made in makes or [])
        if not same and scratch is not None and processes.is_main():
            shutil.rmtree(scratch, ignore_errors=True)
        found = processes.agree(lambda: dict(known["facts"]) if whole else None)
        if found is not None:
            return found
        if not processes.is_main():
            work()
            return processes.agree(dict)
        before = float(known.get("seconds", 0.0)) if same and not known.get("done") else 0.0
        write_json(path, {"fingerprint": fingerprint, "done": False, "seconds": before})
        start = time.monotonic()
        try:
            facts = work()
        except BaseException:
            spent = before + time.monotonic() - start
            write_json(path, {"fingerprint": fingerprint, "done": False, "seconds": spent})
            raise
        facts = {**facts, "seconds": round(before + time.monotonic() - start, 3)}
        write_json(path, {"fingerprint": fingerprint, "done": True, "facts": facts})
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        return processes.agree(lambda: facts)

    def facts(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage found out, None if it is not done."""
        known = read_json(self.folder / f"{stage}.json") or {}
        return known["facts"] if known.get("done") else None


@contextmanager
def claim(recipe: Recipe, *, replace: bool = False) -> Iterator[Ledger]:
    """Takes an output folder for one recipe and one process, or the processes of one launch.

    Args:
        recipe: Whose folder is taken; the resolved recipe is kept in it.
        replace: Take it though it holds another recipe's work: stages whose inputs differ are then done again.

    Raises:
        OutputError: The folder holds another recipe's work, of one stage at least, or another process is using it.
    """
    folder = recipe.folder
    if not processes.is_main():  # the first process holds the folder for all
        yield Ledger(folder / "work" / "state")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise OutputError(
            f"cannot be written ({error.strerror})", where=str(folder), fix="Set `output` to another folder."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                "another process is working here", where=str(folder), fix="Wait for it, or set another `output`."
            ) from None
        _keep_recipe(recipe, folder, replace)
        yield Ledger(folder / "work" / "state")


def _keep_recipe(recipe: Recipe, folder: Path, replace: bool) -> None:
    path = folder / "recipe.toml"
    begun = any((folder / "work" / "state").glob("*.json"))
    if path.exists() and begun and not replace:
        try:
            differing = _differences(Recipe.load(path), recipe)
        except RecipeError as error:  # no TOML, or settings of another version
            raise OutputError(
                f"is no recipe of this version ({'; '.join(error.problems)})",
                where=str(path),
                fix="Set another `output`, or give --replace to redo the stages that differ.",
            ) from error
        if differing:
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise OutputError(
                f"holds another recipe's work ({'; '.join(differing[:3])}{more})",
                where=str(folder),
                fix="Set another `output`, or give --replace to redo the stages that differ.",
            )
    foreign = [entry.name for entry in folder.iterdir() if entry.name not in (".lock", "recipe.toml")]
    if foreign and not path.exists() and not replace:
        raise OutputError(
            f"holds files that distill did not make ({', '.join(sorted(foreign)[:3])})",
            where=str(folder),
            fix="Set `output` to a new folder.",
        )
    write_text(path, recipe.to_toml())


def _differences(before: Recipe, recipe: Recipe) -> list[str]:
    """`key was 3, is 5` for every setting that changes what is made."""
    old, new = _flat(before), _flat(recipe)
    return [f"{key} was {old[key]!r}, is {new[key]!r}" for key in new if old.get(key) != new[key]]


def _flat(recipe: Recipe) -> dict[str, Any]:
    values = recipe.model_dump(mode="json", by_alias=True, exclude={"output", "bench", "name"})
    flat: dict[str, Any] = {}
    for section, fields in values.items():
        if isinstance(fields, dict):
            flat.update({f"{section}.{key}": value for key, value in fields.items()})
        else:
            flat[section] = fields
    return flat
