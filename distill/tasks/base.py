"""What a task is: how its rows become token ids, how a batch is padded, what is measured, what the graph returns.

Nothing here needs a model. Batches are NumPy arrays, so that PyTorch and ONNX Runtime are fed by one code path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from distill.heads import HEADS
from distill.tasks.architectures import loads, modalities
from distill.tasks.encoded import (
    NO_LABEL,
    Array,
    Batch,
    Encoded,
    Padding,
)


@dataclass(frozen=True)
class GraphSpec:
    """What the exported graph takes and returns.

    Attributes:
        inputs: Names of the int64 inputs in order.
        outputs: Names in order; what existing clients look for comes first.
        head: From the model's own output to the tensors named in `outputs`.
        axes: Dynamic axes of each input and output: position to name.
        run: From the model and its inputs by name to those tensors, where the model's output alone is not enough.
        sample: From ids and mask (B, L) to a tensor an input that it is traced with, where more goes in than those.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    head: Callable[[Any], tuple[Any, ...]]
    axes: Mapping[str, Mapping[int, str]]
    run: Callable[[Any, Mapping[str, Any]], tuple[Any, ...]] | None = None
    sample: Callable[[Any, Any], tuple[Any, ...]] | None = None


class Predictor(Protocol):
    """A model of any kind: NumPy batch in, named NumPy outputs out."""

    def predict(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs for a batch; of its columns, those that the model reads are used."""


class Task(ABC):
    """A kind of problem. It holds no state: one instance serves every model.

    What is written out here is right for one label a row; other tasks put their own in its place.

    Attributes:
        name: What recipes and bundles call it.
        auto_class: The transformers class that loads its models.
        metric: The measure that chooses checkpoints, higher is better, in [0, 1].
        preset: Name of the default objective.
        losses: What stands for the losses of presets, `soft_labels` and `hard_labels`, where those do not fit.
        logits: Its models give logits, which losses may read.
        suffixes: How the names of its architectures end.
        problems: Values of `config.problem_type` that are its own.
        problem: The one that is written into its models, so that other clients treat them as it does.
        outputs: How many outputs its models give, where that is fixed.
        inputs: Kind of the column `data.text`: a key of `distill.data.fields.INPUTS`.
        target: Kind of the column `data.label`: a key of `distill.data.fields.TARGETS`.
        pairs: `data.text_pair` may be used, must be (`required`), or must not (`none`).
        named: Classes have names, matched by name between teacher and data.
        augments: New texts can be made from the training texts.
        follows: Output whose values by the teacher stand for labels, in `Encoded.given` too; else empty.
        unmeasured: Outputs of the graph that no measure reads.
        cached: The teacher's answers are written down once; else it runs beside the student.
        beside: Paths of JSON files beside a checkpoint that say what it computes.
        trims: The student may have fewer tokens than its teacher.
        relative: The metric may be far below 1: what int8 may lose is counted in hundredths of it.
        cut: The graph ships in two files: encoder and decoder, of texts or of images (`captioner`), or one that reads
            texts and one that reads images.
        kin: Name of the task that a recipe may say instead, where the teacher is of this one.
        on_policy: The student may learn from texts that it writes itself.
        prefixes: The same words may stand before every text: `data.prefix`.
        feeds: Columns of a batch that its models may be given.
        dropout: What its students drop while they learn, where neither recipe nor card says; None: as the teacher.
        stretches: Rows may be cut and joined to any length; else every one has as many tokens as an image has patches.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    metric: ClassVar[str]
    preset: ClassVar[str]
    losses: ClassVar[Mapping[str, str]] = {}
    logits: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]]
    problems: ClassVar[tuple[str | None, ...]] = (None,)
    problem: ClassVar[str | None] = None
    outputs: ClassVar[int | None] = None
    inputs: ClassVar[str] = "text"
    target: ClassVar[str] = "class"
    pairs: ClassVar[Literal["allowed", "required", "none"]] = "none"
    named: ClassVar[bool] = True
    augments: ClassVar[bool] = False
    follows: ClassVar[str] = ""
    unmeasured: ClassVar[frozenset[str]] = frozenset()
    cached: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ()
    trims: ClassVar[bool] = True
    relative: ClassVar[bool] = False
    cut: ClassVar[Literal["", "decoder", "towers", "captioner"]] = ""
    kin: ClassVar[str] = ""
    on_policy: ClassVar[bool] = False
    prefixes: ClassVar[bool] = False
    feeds: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
    dropout: ClassVar[float | None] = None
    stretches: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[str, ...]:
        """What its models read: `text`, `image`."""
        return HEADS[self.name].reads

    def fits(self, architecture: str) -> bool:
        """Whether models of an architecture are its own: by name, by what loads them, and by what they read."""
        named = architecture.endswith(self.suffixes) and loads(self.auto_class, architecture)
        return named and bool(read := modalities(architecture)) and read <= frozenset(self.reads)

    @abstractmethod
    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, max_length: int) -> Encoded:
        """Token ids of `rows`: columns `text`, optionally `text_pair`, and `label` (None where there is none)."""

    def vary(self, row: Mapping[str, Any], seed: int, epoch: int) -> Mapping[str, Any]:
        """A row as it is trained on in this epoch: a pure function of both numbers and the row's `example`."""
        return row

    @abstractmethod
    def collate(self, rows: Sequence[Mapping[str, Any]], padding: Padding) -> Batch:
        """Pads encoded rows to the longest among them."""

    @abstractmethod
    def metrics(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Measures `outputs` against the labels.

        Args:
            outputs: What the graph returns: an entry a row, or, of outputs in `by_token`, an entry a token, rows end to
                end as in `encoded.ragged`.
            encoded: The rows.
            settings: Of `calibrate`.
        """

    @abstractmethod
    def graph(self, inputs: Iterable[str]) -> GraphSpec:
        """What the exported graph looks like for a tokenizer that gives `inputs`."""

    def inputs_of(self, encoded: Encoded) -> list[str]:
        """What the graph for these rows is fed: token types where there are others than 0, else they are folded in."""
        typed = "token_type_ids" in encoded.ragged and bool(encoded.ragged["token_type_ids"].any())
        return ["input_ids", "attention_mask", *(["token_type_ids"] if typed else [])]

    def exported(self, model: Any, inputs: Iterable[str]) -> GraphSpec:
        """`graph`, with what only this model tells, such as how many layers remember."""
        return self.graph(inputs)

    def longest(self, config: Any, max_length: int) -> int:
        """Tokens of a row at most: the recipe's maximum, or what an image has."""
        return max_length

    def images(self, config: Any) -> tuple[tuple[int, int, int], int]:
        """(C, H, W) of the images that a model reads, and how many tokens one is to it."""
        raise NotImplementedError(f"{self.name} reads no images")

    def rules(self, model: Any) -> dict[str, Any]:
        """What a bundle needs to write texts, as `distill.heads.generation.Rules` reads it; empty where it does not."""
        return {}

    def around(self, tokenizer: Any) -> dict[str, Any]:
        """`around`: the ids before and behind a target, where other ones stand around a source; else nothing."""
        return {}

    def unfollowed(self, model: Any) -> list[str]:
        """`name = value` of each option of the model's own writing that those rules leave out."""
        return []

    @abstractmethod
    def postprocess(self, outputs: Mapping[str, Any]) -> dict[str, Array]:
        """Adds to a PyTorch model's outputs what the exported graph adds to them.

        Args:
            outputs: What `read` found, and `attention_mask`.
        """

    @property
    def by_token(self) -> frozenset[str]:
        """Outputs of the graph that have a value for each token."""
        spec = self.graph(("input_ids",))
        return frozenset(name for name in spec.outputs if spec.axes[name].get(1) == "length")

    def shipped(self, model: Any) -> Any:
        """The part of a PyTorch model that is exported."""
        return model

    def judge(self, predictor: Predictor, model: Any) -> Predictor:
        """What `metrics` reads of a predictor of the exported part, where that takes more of the PyTorch model."""
        return predictor

    def examine(self, predictor: Predictor, model: Any) -> Predictor:
        """As `judge`, for the numbers that are reported: what takes too long at every step is asked here alone."""
        return self.judge(predictor, model)

    def golden(self, row: Mapping[str, Any]) -> Any:
        """What a bundle is asked for a row of the data, to keep the answer as a proof."""
        return (row["text"], row["text_pair"]) if "text_pair" in row else row["text"]

    def tokens(self, batch: Batch) -> Array:
        """(B,): how many values each row has of the outputs in `by_token`."""
        return np.asarray(batch["attention_mask"].sum(axis=1))

    def counts(self, encoded: Encoded) -> Array:
        """(rows,): the same of encoded rows."""
        return encoded.lengths

    def read(self, output: Any) -> dict[str, Any]:
        """The tensors of a PyTorch model's output that `postprocess` needs."""
        return {"logits": output.logits}

    def ask(self, model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What a PyTorch model says of tensors by name, as `postprocess` needs it."""
        return self.read(model(**inputs))

    def digest(self, outputs: Mapping[str, Array], batch: Batch) -> dict[str, Array]:
        """What measures read of a batch's outputs where those are too large to keep, beside what is kept of them."""
        return {}

    def configure(self, config: Any, labels: Sequence[str]) -> None:
        """Prepares the config of a pretrained model, in place, for a new head with these labels."""
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
        config.problem_type = self.problem

    def save(self, model: Any, folder: Path, max_length: int) -> None:
        """Writes a model as transformers' own loaders read it, with what other libraries read beside it."""
        model.save_pretrained(folder)

    def misfit(self, beside: Mapping[str, Any]) -> str:
        """Why a checkpoint with these of its `beside` is not what the task computes; empty where it is."""
        return ""

    def restore(  # noqa: B027 (nothing to do for most tasks)
        self, model: Any, beside: Mapping[str, Any], find: Callable[[str], Path | None]
    ) -> None:
        """Gives a loaded model what transformers' loader leaves out: from JSON, by path, and from files by path."""

    def teaches(self, model: Any) -> str:
        """Why a student cannot learn what this model says; empty where it can."""
        return ""

    def options(self, teacher: Any) -> dict[str, Any]:
        """Options of every loss that has them and is not told otherwise."""
        return {}

    def keep(self, student: Any, teacher: Any, objective: Any) -> None:  # noqa: B027
        """Makes parts of the objective parts of the student, which then train and ship with it."""

    def number(self, label: Any, numbers: Mapping[str, int]) -> Any:
        """A label of the data as `encode` takes it: names are replaced by class numbers; None where there is none."""
        return None if label is None else numbers[label]

    def plain(self, text: Any) -> str:
        """What a value of the column `text` says, as one string."""
        return str(text)

    def labelled(self, encoded: Encoded) -> bool:
        """Some row has a label to compare with."""
        return bool((encoded.flat["labels"] != NO_LABEL).any())

    def spread(self, encoded: Encoded) -> float:
        """How far apart its outputs lie by their nature: 1 of logits and probabilities; of numbers, by their unit."""
        return 1.0

    @property
    def calibrates(self) -> bool:
        """Something is chosen on validation data."""
        return type(self).calibrate is not Task.calibrate

    def calibrate(self, outputs: Mapping[str, Array], encoded: Encoded) -> dict[str, Any]:
        """What is chosen on validation data and ships with the model, such as thresholds; plain values."""
        return {}

    def answers(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> Array:
        """What is chosen, one entry a scored item in the order of the data: models agree where these are equal."""
        return np.asarray(outputs["logits"].argmax(axis=-1))

    def agreement(self, one: Array, other: Array) -> float:
        """Share of the `answers` that are the same, in [0, 1]; `one` is the reference."""
        return float((one == other).mean())

    def told(
        self, outputs: Mapping[str, Array], encoded: Encoded, settings: Mapping[str, Any] | None = None
    ) -> list[tuple[str, float]]:
        """By row of the data: the answer in words, and how sure it is (a probability) or, of numbers, the value."""
        chosen = outputs["probabilities"].argmax(axis=-1)
        return [
            (encoded.names[number], float(row[number]))
            for number, row in zip(chosen, outputs["probabilities"], strict=True)
        ]

    def apart(self, one: tuple[str, float], other: tuple[str, float]) -> float:
        """How worth showing it is that two models told these of one row; 0 where they agree."""
        return one[1] + other[1] if one[0] != other[0] else 0.0

    def gold(self, encoded: Encoded) -> list[str | None]:
        """By row of the data: the label in the words of `told`; None where there is none."""
        return [None if number == NO_LABEL else encoded.names[number] for number in encoded.flat["labels"]]
