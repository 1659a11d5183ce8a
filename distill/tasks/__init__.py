"""The tasks a fine-tuned Transformer is used for, one file each."""

from __future__ import annotations

from collections.abc import Sequence

from distill.errors import TeacherError
from distill.tasks.base import GraphSpec, Task
from distill.tasks.captioning import Captioning
from distill.tasks.causal_lm import CausalLM
from distill.tasks.encoded import Batch, Encoded, Padding, concatenate
from distill.tasks.image_classification import ImageClassification
from distill.tasks.image_text import ImageText
from distill.tasks.masked_lm import MaskedLanguageModel
from distill.tasks.multi_label import MultiLabelClassification
from distill.tasks.question_answering import QuestionAnswering
from distill.tasks.regression import Regression
from distill.tasks.sentence_embedding import SentenceEmbedding
from distill.tasks.seq2seq import Seq2Seq
from distill.tasks.text_classification import TextClassification
from distill.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        TextClassification(),
        MultiLabelClassification(),
        Regression(),
        TokenClassification(),
        QuestionAnswering(),
        ImageClassification(),
        ImageText(),  # before sentence-embedding, which takes every other name that ends in Model
        CausalLM(),
        Captioning(),  # likewise
        Seq2Seq(),  # before sentence-embedding: MarianMTModel ends in Model
        SentenceEmbedding(),  # behind causal-lm: every name that ends in LMHeadModel ends in Model
        MaskedLanguageModel(),
    )
}

__all__ = ["TASKS", "Batch", "Encoded", "GraphSpec", "Padding", "Task", "concatenate", "find_task"]


def find_task(
    name: str, architectures: Sequence[str] = (), *, problem: str | None = None, where: str = "teacher"
) -> Task:
    """The task called `name`, or for `auto` the one that the checkpoint's architecture is made for.

    Args:
        name: A key of `TASKS` or `auto`. A task of the same kin is taken where the architecture is that one's.
        architectures: `config.architectures` of the teacher.
        problem: Its `config.problem_type`.
        where: What the error names when nothing fits.

    Raises:
        TeacherError: No task fits the architecture.
    """
    if name != "auto":
        near = [task for task in TASKS.values() if task.kin == name]
        return next((task for task in near if any(made.endswith(task.suffixes) for made in architectures)), TASKS[name])
    for task in TASKS.values():
        if problem in task.problems and any(task.fits(name) for name in architectures):
            return task
    raise TeacherError(
        f"its architecture {list(architectures)!r}{f' for {problem}' if problem else ''} belongs to no known task",
        where=where,
        fix=f"Tasks known here: {', '.join(TASKS)}. Fine-tune it for one first, with `teacher.start`.",
    )
