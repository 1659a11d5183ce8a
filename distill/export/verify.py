"""Is this bundle what was shipped, and does it answer as it did? Asked on whatever machine it now is; no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import BundleError, DistillError, VerificationError
from distill.export.bundle import FORMAT, MANIFEST, golden_vectors
from distill.export.pieces import files_of
from distill.export.runtime import FULL, QUANTIZED, Bundle, inside, stored_by_hub
from distill.export.single_file import refuse_external_data
from distill.files import json_lines, sha256_file
from distill.machine import describe_machine

TOLERANCE = 0.05
"""Largest difference of a probability. Dynamic int8 rounds activations by their own range, which other instruction sets
compute with other last bits: of 500 sentences x86 and Arm differed by 0.034 at most, in 2 by more than 0.02, in half
not at all (benchmarks/clients). Another weight or tokenizer moves many answers, and those far."""

OF_THE_HUB = (".gitattributes", ".git/", ".cache/huggingface/")
"""How the names of files begin that the hub, its client and git put beside those of a repository."""

AVERAGE = 0.4
"""Part of the tolerance that the texts may use up on average."""


@dataclass
class Verification:
    """The verdict.

    Attributes:
        folder: Of the bundle.
        checks: By name, whether it holds and in what detail.
        facts: Largest differences and the like.
    """

    folder: Path
    checks: dict[str, tuple[bool, str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Every check holds."""
        return bool(self.checks) and all(holds for holds, _ in self.checks.values())

    def rows(self) -> list[list[str]]:
        """For a table: check, verdict, detail."""
        return [[name, "ok" if holds else "FAILED", detail] for name, (holds, detail) in self.checks.items()]

    def to_json(self) -> dict[str, Any]:
        """The verdict with the machine it was reached on."""
        checks = {name: {"ok": holds, "detail": detail} for name, (holds, detail) in self.checks.items()}
        return {
            "ok": self.ok,
            "checks": checks,
            "facts": self.facts,
            "machine": describe_machine(),
            "versions": {name: version(name) for name in ("distill", "onnxruntime", "tokenizers", "numpy")},
        }

    def error(self) -> VerificationError:
        """The failed checks as one line."""
        failed = "; ".join(f"{name}: {detail}" for name, (holds, detail) in self.checks.items() if not holds)
        return VerificationError(failed, where=str(self.folder), fix="Copy or export the bundle again.")


def verify_bundle(folder: str | Path, *, tolerance: float = TOLERANCE) -> Verification:
    """Checks checksums, single files, labels, tokenizer and golden vectors.

    Args:
        folder: The bundle.
        tolerance: Largest difference of a golden probability that is let pass. A label may flip within it: then two
            labels were so close that another CPU's rounding decides.

    Returns:
        A verdict that names every check; the ones after a failed checksum of the files they need are still made.

    Raises:
        BundleError: The folder is no bundle at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BundleError("there is no such folder", where=str(folder), fix="Name the folder of a bundle.")
    manifest = _read_manifest(folder)
    verdict = Verification(folder)
    _check(verdict, "files", lambda: _files(folder, manifest))
    _check(verdict, "single files", lambda: _single_files(folder, manifest))
    for file in (QUANTIZED, FULL):
        name = files_of(folder / file)[-1].name
        _check(verdict, f"{name} loads", lambda file=file: _labels(Bundle.load(folder, file=file), manifest))  # type: ignore[misc]
    if verdict.checks[f"{files_of(folder / QUANTIZED)[-1].name} loads"][0]:
        _check(verdict, "golden vectors", lambda: _golden(Bundle.load(folder), verdict.facts, tolerance))
    return verdict


def _check(verdict: Verification, name: str, check: Callable[[], str]) -> None:
    """Records what `check` says, or why it failed."""
    try:
        verdict.checks[name] = (True, check())
    except DistillError as error:
        verdict.checks[name] = (False, error.what if error.where == str(verdict.folder) else str(error))
    except Exception as error:  # a graph that is not its tokenizer's may fail in any way: that too is a verdict
        verdict.checks[name] = (False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(inside(folder, MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise BundleError(f"{MANIFEST} cannot be read", where=str(folder), fix="Copy the whole bundle again.") from None
    if known != FORMAT:
        raise BundleError(
            f"{MANIFEST} has format {known!r}, this version of distill reads {FORMAT}",
            where=str(folder),
            fix="Upgrade distill, or export the bundle again.",
        )
    files, labels = manifest.get("files"), manifest.get("labels")
    whole = isinstance(files, dict) and all(isinstance(facts, dict) and "sha256" in facts for facts in files.values())
    if not whole or not isinstance(labels, list):
        raise BundleError(f"{MANIFEST} names no files or labels", where=str(folder), fix="Copy the whole bundle again.")
    return dict(manifest)


def _files(folder: Path, manifest: dict[str, Any]) -> str:
    expected: dict[str, Any] = manifest["files"]
    problems = [problem for name, facts in expected.items() if (problem := _problem(folder, name, facts["sha256"]))]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    more = [name for name in sorted(found - set(expected) - {MANIFEST}) if not name.startswith(OF_THE_HUB)]
    problems += [f"{name} did not ship with it" for name in more]
    if problems:
        rest = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise BundleError(", ".join(problems[:4]) + rest, where=str(folder))
    return f"{len(expected)} files as shipped"


def _problem(folder: Path, name: str, sha256: str) -> str:
    """What is wrong with a file of the manifest, empty if nothing is."""
    try:
        path = inside(folder, name)
    except BundleError as error:
        return error.what
    if path.is_symlink() and not stored_by_hub(folder, path):
        return f"{name} is a link"
    return "" if sha256_file(path) == sha256 else f"{name} has changed since it was shipped"


def _single_files(folder: Path, manifest: dict[str, Any]) -> str:
    graphs = {part.relative_to(folder).as_posix() for file in (QUANTIZED, FULL) for part in files_of(folder / file)}
    for name in sorted({*graphs, *(name for name in manifest["files"] if name.endswith(".onnx"))}):
        refuse_external_data(inside(folder, name))
    return "no ONNX file points outside itself"


def _labels(bundle: Bundle, manifest: dict[str, Any]) -> str:
    if bundle.labels != manifest["labels"]:
        raise BundleError(
            f"the graph's labels {bundle.labels[:4]} are not the manifest's {manifest['labels'][:4]}",
            where=str(bundle.folder),
        )
    return f"{len(bundle.labels)} labels, at most {bundle.max_length} tokens"


def _golden(bundle: Bundle, facts: dict[str, Any], tolerance: float) -> str:
    where = str(bundle.folder)
    try:
        kept = json_lines(inside(bundle.folder, "golden.jsonl"))
        texts = [bundle.head.asked(line) for line in kept]
        then = [np.atleast_1d(np.array(line[bundle.head.proof], np.float64)) for line in kept]
        ids = [line["ids"] for line in kept]
    except (ValueError, KeyError, TypeError):
        raise VerificationError("golden.jsonl cannot be read", where=where) from None
    if not kept:
        raise VerificationError("golden.jsonl holds no text, so nothing is proved", where=where)
    read = [row["input_ids"] for row in bundle.encode(texts)]
    changed = [number for number, (old, new) in enumerate(zip(ids, read, strict=True), 1) if old != new]
    if changed:
        raise VerificationError(f"golden.jsonl:{changed[0]} is now split into other tokens", where=where)
    answers = golden_vectors(bundle, texts)
    now = [np.atleast_1d(np.array(answer[bundle.head.proof], np.float64)) for answer in answers]
    odd = [number for number, (old, new) in enumerate(zip(then, now, strict=True), 1) if old.shape != new.shape]
    if odd:
        raise VerificationError(f"golden.jsonl:{odd[0]} is now answered in another shape", where=where)
    scale = _scale(np.concatenate([old.reshape(-1) for old in then]), bundle.head.counts)
    moved = np.array([np.abs(new - old).max(initial=0.0) for old, new in zip(then, now, strict=True)]) / scale
    worst, average = float(moved.max()), float(moved.mean())
    flips = sum(bool((new.argmax(-1) != old.argmax(-1)).any()) for old, new in zip(then, now, strict=True))
    facts.update(golden=len(kept), golden_max_difference=worst if np.isfinite(worst) else None, golden_flips=flips)
    if bundle.head.counts:
        what, lost, same = "values in parts of their range", "", ""
    elif bundle.labels:
        what, lost = "probabilities", f", {flips} of {len(kept)} labels flip"
        same = f"{flips} labels too close to call flip, " if flips else "same labels, "
    else:
        what, lost, same = bundle.head.proof.replace("_", " "), "", ""
    if not (worst <= tolerance and average <= AVERAGE * tolerance):  # written so that NaN fails
        raise VerificationError(
            f"golden {what} differ by up to {worst:.4f} and by {average:.4f} on average "
            f"(allowed {tolerance} and {AVERAGE * tolerance:g}){lost}",
            where=where,
        )
    return f"{len(kept)} texts: same tokens, {same}{what} within {worst:.1e}"


def _scale(then: np.ndarray, counts: bool) -> float:
    """What differences are parts of: 1 of probabilities; of numbers their range, or the number where all are one."""
    span = float(np.ptp(then))
    return (span or float(np.abs(then).max()) or 1.0) if counts else max(1.0, span)
