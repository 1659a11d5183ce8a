"""Sequence-level distillation (1606.07947): the student learns the texts that its teacher writes, not the data's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.evaluation import TorchPredictor
from distill.files import read_json, sha256_json, write_json
from distill.heads.generation import Rules
from distill.progress import SILENT, Progress
from distill.tasks import Task
from distill.tasks.writing import spelled
from distill.teacher import Checkpoint

BEAMS = 4
"""The teacher searches with so many at least, whatever it does in an app."""
KEPT = 256
"""Texts between two writes to the disk: what a kill can cost."""


def rewritten(
    texts: Sequence[str],
    teacher: Checkpoint,
    task: Task,
    path: Path,
    *,
    max_length: int,
    batch_size: int = 32,
    progress: Progress = SILENT,
) -> list[str]:
    """What the teacher writes for each text, by beam search; kept in `path`, and gone on with after a kill.

    Args:
        texts: The sources.
        teacher: An encoder with a decoder.
        task: Encodes the sources and says how the teacher writes.
        path: JSON; what is there for other texts or another teacher is replaced.
        max_length: Tokens of a source, and of what is written, at most.
        batch_size: Texts a call.
        progress: Told about every batch.
    """
    rules = Rules.of(task.rules(teacher.model))
    rules = replace(rules, beams=max(rules.beams, BEAMS), max_new_tokens=min(rules.max_new_tokens, max_length))
    key = sha256_json([teacher.weights_hash(), teacher.tokenizer_hash(), max_length, str(rules), list(texts)])
    kept = read_json(path) or {}
    done: list[str] = kept["texts"] if kept.get("key") == key else []
    if len(done) == len(texts):
        return done
    writer = TorchPredictor(teacher.model, task)
    with progress.stage("Writing with the teacher", total=len(texts), unit="texts") as stage:
        stage.advance(len(done))
        for begin in range(len(done), len(texts), KEPT):
            chunk = list(texts[begin : begin + KEPT])
            encoded = task.encode({"text": chunk, "label": [None] * len(chunk)}, teacher.tokenizer, max_length)
            order = np.argsort(encoded.lengths, kind="stable")
            said: dict[int, Any] = {}
            for first in range(0, len(order), batch_size):
                rows = order[first : first + batch_size].tolist()
                batch = task.collate([encoded[row] for row in rows], teacher.padding)
                said.update(zip(rows, writer.write(batch, rules), strict=True))
                stage.advance(len(rows))
            ids = [said[row] for row in range(len(chunk))]
            done += spelled(teacher.tokenizer, ids)
            write_json(path, {"key": key, "texts": done})
    return done
