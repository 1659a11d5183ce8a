"""The stages in a straight line, each done once for its inputs.

    teacher -> label -> train -> baseline -> evaluate -> export -> bundle -> bench -> report

Interrupted anywhere, the same call goes on where it was and ends with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from distill import learning, processes, shipping
from distill.checks import check_names
from distill.files import full_disk_is_an_error
from distill.ledger import FOLDER, claim
from distill.progress import SILENT, Progress
from distill.recipe import Recipe
from distill.run import Run
from distill.training.fit import flush_denormals

STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "teacher": learning.make_teacher,
    "label": learning.label,
    "train": learning.train,
    "baseline": learning.baseline,
    "evaluate": learning.measure,
    "export": shipping.export,
    "bundle": shipping.bundle,
    "bench": shipping.bench,
    "report": shipping.report,
}

SHARED = ("teacher", "label", "train", "baseline", "evaluate")
"""What all processes of a launch do together; the rest is the first one's."""

LAST = {
    "finetune": "teacher",
    "label": "label",
    "train": "baseline",
    "evaluate": "evaluate",
    "export": "bundle",
    "report": "report",
    "compress": "report",
}
"""The last stage of each command."""


SHARES = {
    "teacher": 25,
    "label": 3,
    "train": 30,
    "baseline": 30,
    "evaluate": 2,
    "export": 4,
    "bundle": 1,
    "bench": 4,
    "report": 1,
}
"""About what each stage costs of the whole, so that the display can say how much time is left."""


@dataclass(frozen=True)
class Result:
    """What a command made.

    Attributes:
        folder: The output folder.
        facts: By stage, what it found out.
    """

    folder: Path
    facts: dict[str, dict[str, Any]]

    @property
    def bundle(self) -> Path:
        """The folder that ships."""
        return self.folder / "bundle"

    def summary(self) -> list[str]:
        """The lines a person wants at the end."""
        lines = []
        for facts in self.facts.values():
            lines += facts.get("summary", [])
        return [line.replace(FOLDER, str(self.folder)) for line in lines]


def compress(recipe: Recipe, *, progress: Progress = SILENT, replace: bool = False) -> Result:
    """From a fine-tuned teacher to a verified int8 bundle, benchmark and report.

    Args:
        recipe: What to do.
        progress: Told about every long step.
        replace: Redo what differs though the output folder holds another recipe's work.

    Raises:
        DistillError: Any problem that a person can mend.
    """
    return run_stages(recipe, until="compress", progress=progress, replace=replace)


def finetune(recipe: Recipe, *, progress: Progress = SILENT, replace: bool = False) -> Result:
    """Makes a teacher from the pretrained model `teacher.start`."""
    return run_stages(recipe, until="finetune", progress=progress, replace=replace)


def run_stages(recipe: Recipe, *, until: str, progress: Progress = SILENT, replace: bool = False) -> Result:
    """Runs every stage that `until` needs and that is not done yet."""
    flush_denormals()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = list(STAGES)[: list(STAGES).index(LAST[until]) + 1]
    facts: dict[str, dict[str, Any]] = {}
    progress = progress if processes.is_main() else SILENT
    check_names(recipe)
    with claim(recipe, replace=replace) as ledger, full_disk_is_an_error(recipe.folder):
        run = Run(recipe, ledger, progress)
        with progress.stage("All stages", total=sum(SHARES[name] for name in names), unit="parts") as whole:

            def do(name: str) -> None:
                whole.note(name)
                facts[name] = STAGES[name](run)
                whole.advance(SHARES[name])

            with processes.together():
                for name in names:
                    if name in SHARED:
                        do(name)
                    if name == "teacher" and "export" in names:
                        shipping.try_export(run)
            if not processes.is_main():
                return Result(recipe.folder, {})
            for name in names:
                if name not in SHARED:
                    do(name)
    return Result(recipe.folder, facts)
