"""The one TOML file that says everything about a run.

Each section is a model whose fields carry their own documentation: `distill new` writes it out as comments, so the
words a person reads in the file are the words below. A recipe that cannot be used says all of its problems at once.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.errors import RecipeError
from distill.settings import apply_override, explain, render_toml

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
_FIRST_LINE = "A recipe of distill. `distill compress THIS_FILE` runs it; every value below is the default."


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class FinetuneRecipe(_Section):
    """`distill finetune`: how a pretrained checkpoint becomes the teacher."""

    epochs: Positive = Field(3.0, description="Passes over the training data.")
    batch_size: int = Field(32, ge=1, description="Sentences a step and process.")
    learning_rate: Positive = Field(5e-5, description="Peak learning rate of AdamW.")
    warmup: Fraction = Field(0.06, description="Share of the steps over which the rate rises to its peak.")
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW's decoupled weight decay.")


class TeacherRecipe(_Section):
    """The large model that is to be compressed."""

    checkpoint: str = Field("", description="Fine-tuned model: a hub id or a folder.")
    card: str = Field("", description="Teacher card by name or path; it fills in what stands empty here.")
    start: str = Field("", description="Pretrained model that is fine-tuned first when `checkpoint` is empty.")
    revision: str = Field("", description="Commit or tag of a hub id; empty takes the newest.")
    floor: Fraction = Field(
        0.0, description="The run stops when the teacher's own metric on validation data is below this."
    )
    label_map: dict[str, str] = Field(
        {}, description="Teacher label = data label, where the two are named differently."
    )
    ensemble: list[str] = Field(
        [], description="Further fine-tuned models: their logits are averaged with the first's."
    )
    ensemble_weights: list[Annotated[float, Field(ge=0.0)]] = Field(
        [], description="One for the first model and one for each further one; empty counts all alike."
    )
    batch_size: int = Field(64, ge=1, description="Sentences a forward pass when labelling.")
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="Where it runs beside the student in several processes: whole in each, or `fsdp`, a part in each.",
    )
    finetune: FinetuneRecipe = Field(default_factory=FinetuneRecipe, description="Used with `start`.")


class StudentRecipe(_Section):
    """The small model that ships."""

    card: str = Field("layers-4", description="Student card by name or path: `distill student list`.")
    layers: int | None = Field(None, ge=1, description="Overrides the card's number of layers.")
    decoder_layers: int | None = Field(
        None, ge=1, description="Layers of the decoder, where there is one behind an encoder; none given: as `layers`."
    )
    hidden_size: int | None = Field(None, ge=1, description="Overrides the card's width.")
    attention_heads: int | None = Field(None, ge=1, description="Overrides the card's attention heads.")
    intermediate_size: int | None = Field(None, ge=1, description="Overrides the card's feed-forward width.")
    activation: str | None = Field(None, description="Overrides the card's activation: gelu, gelu_new, relu.")
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | Literal["teacher"] | None = Field(
        None, description="Overrides the card's share of values that are dropped while it learns."
    )
    inherit_layers: (
        Literal["card", "even", "first", "last", "important"] | Annotated[list[Count], Field(min_length=1)]
    ) = Field(
        "card",
        description="Teacher layers it starts from: the card's, even, first, last, `important` (measured), or numbers.",
    )
    init: Literal["teacher", "copy", "random"] = Field(
        "teacher",
        description="`teacher` copies what agrees and fits what was cut; `copy` only copies; `random` does neither.",
    )
    vocabulary: Count | Literal["full", "used"] = Field(
        "full",
        description="`full` keeps every token; `used` keeps those the transfer set needs; a number keeps that many.",
    )


class AugmentRecipe(_Section):
    """New texts made from the training texts, for the teacher to label softly: for small sets."""

    copies: int = Field(0, ge=0, description="New texts tried for each training text; 0 makes none.")
    ways: list[Literal["drop", "mix", "neighbours", "masked"]] = Field(
        ["drop", "mix", "neighbours"],
        min_length=1,
        description="`drop` words, `mix` sentences, swap words for the teacher's `neighbours` or a `masked` model's.",
    )
    drop: Fraction = Field(0.1, description="Share of the words that `drop` leaves out.")
    replace: Fraction = Field(0.4, description="Share of the words that `neighbours` and `masked` replace.")
    model: str = Field("", description="Masked language model of `masked`: a hub id or a folder.")


class DataRecipe(_Section):
    """Where text and labels come from: a hub id, a CSV, TSV, JSONL, Parquet or text file, or an Arrow folder."""

    train: str = Field("", description="Labelled training data.")
    validation: str = Field("", description="Chooses checkpoints; split off `train` by content when empty.")
    test: str = Field("", description="Only reported on; the validation data reports when empty.")
    unlabelled: list[str] = Field([], description="Texts without labels that the teacher labels softly.")
    text: str = Field("text", description="Column with the text.")
    text_pair: str = Field("", description="Column with the second sentence of a pair.")
    label: str = Field("label", description="Column with the label.")
    prefix: str = Field(
        "",
        description="Stands before each text, as T5 and E5 were taught: `translate English to German: `, `query: `. "
        "The bundle puts it there by itself.",
    )
    group: str = Field("", description="Column by whose values measures are told too, such as the language.")
    labels: list[str] = Field([], description="Label names in order; found in the data when empty.")
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="Share of `train` set aside, by a hash of each text, when `validation` is empty."
    )
    max_length: int = Field(128, ge=4, description="Tokens at most, special tokens included; longer texts are cut.")
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="What an unusable row does: stop the run, or be left out and counted."
    )
    augment: AugmentRecipe = Field(default_factory=AugmentRecipe, description="More text for a small set.")


class CacheRecipe(_Section):
    """What is written down of the teacher's answers."""

    max_bytes: int = Field(
        0,
        ge=0,
        description="What the cache may take: logits always; the rest in fp16, else int8, else the teacher runs along. "
        "0 sets no limit.",
    )
    store: str = Field(
        "", description="URL (`s3://...`, whatever fsspec reads) where finished caches are kept for other machines."
    )
    top_k: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Classes or tokens whose logits are kept, the likeliest; all others count as one. 0 keeps all; "
        "`auto` keeps 64 of more than 4,096 tokens, where the objective can read them.",
    )


class ScheduleRecipe(_Section):
    """A weight or a temperature that changes over training."""

    schedule: Literal["constant", "linear", "cosine", "stages"] = Field(
        "constant",
        description="How the value moves from `start` to `end`; `stages` is on within the window only.",
    )
    start: float = Field(1.0, description="Value at `from`.")
    end: float = Field(1.0, description="Value at `until`.")
    from_: Fraction = Field(0.0, alias="from", description="Share of training at which it begins.")
    until: Fraction = Field(1.0, description="Share of training at which it ends.")
    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)


class TermRecipe(_Section):
    """One loss of the objective."""

    loss: str = Field(description="Name of the loss: docs/objectives.md lists them.")
    weight: float | ScheduleRecipe = Field(1.0, description="Its factor in the sum, or a schedule.")
    temperature: float | ScheduleRecipe | None = Field(None, description="Softmax temperature, where it has one.")
    layers: str | list[tuple[int, int]] = Field(
        "inherited",
        description="Layer map: inherited (as the student was built), uniform, even, last, skip, first, final, emd, or "
        "[student, teacher] pairs.",
    )
    options: dict[str, Any] = Field({}, description="Settings of that loss alone.")


class OnPolicyRecipe(_Section):
    """Batches that the student writes itself, for its teacher to judge: generalised knowledge distillation."""

    share: Fraction = Field(
        0.0, description="Share of the batches whose end the student writes; the teacher then answers live."
    )
    prompt: Fraction = Field(0.25, description="Share of a text that is kept before it, one token at least.")
    temperature: Positive = Field(1.0, description="Softmax temperature at which it draws its tokens.")


class ObjectiveRecipe(_Section):
    """What the student learns from."""

    preset: str = Field(
        "auto",
        description="`auto` picks by task, widths and data; a name is a published recipe; `terms` override.",
    )
    targets: Literal["gold", "teacher"] = Field(
        "gold",
        description="Who writes what a translator learns; with `gold` the teacher does for unlabelled rows alone.",
    )
    temperature: Positive | None = Field(None, description="Replaces the temperature of every soft-label term.")
    terms: list[TermRecipe] = Field([], description="Losses and their weights; empty takes the preset's.")
    on_policy: OnPolicyRecipe = Field(
        default_factory=OnPolicyRecipe, description="For language models: texts by the student itself."
    )


class TrainingRecipe(_Section):
    """How the student is trained."""

    epochs: Positive = Field(5.0, description="Passes over the transfer set.")
    batch_size: int = Field(32, ge=1, description="Sentences a step and process.")
    batch_tokens: int = Field(
        0,
        ge=0,
        description="Tokens a step and process, padding included, instead of `batch_size` sentences; 0: off.",
    )
    gradient_accumulation: int = Field(1, ge=1, description="Batches summed before one optimiser step.")
    learning_rate: Positive = Field(1e-4, description="Peak learning rate of AdamW.")
    warmup: Fraction = Field(0.06, description="Share of the steps over which the rate rises to its peak.")
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(1.0, ge=0.0, description="Gradients are clipped to this norm; 0 does not clip.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="`auto` takes bf16 autocast where the processor has instructions for it."
    )
    teacher_device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="Where the teacher answers: `auto` where the student is, `cuda:1` on a second card, `cpu`."
    )
    freeze_embeddings: bool = Field(False, description="Leaves inherited embeddings as they are: faster steps.")
    freeze_layers: int = Field(
        0,
        ge=0,
        description="So many first layers, and the embeddings, stay the teacher's: they must be exact copies of its "
        "first ones. What they say is read from the teacher's answers, so that a step runs the layers above alone. Of "
        "CLIP's two encoders it means the text's.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Layers are computed again on the way back: less memory, slower steps."
    )
    compile: bool = Field(
        False, description="Compiles the student with torch.compile, which starts slowly: measure whether it pays."
    )
    threads: int = Field(
        0, ge=0, description="Threads of training and labelling on a processor; 0 leaves PyTorch's own."
    )
    checkpoint_seconds: Positive = Field(60.0, description="About how often progress is saved for a resume.")
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="In several processes: the whole student in each (DDP; ZeRO on the processors of one machine), or "
        "`fsdp`, in each a part of its weights, gradients and optimiser.",
    )
    profile: bool = Field(False, description="Prints where the time of a step goes, part by part.")
    baseline: bool = Field(True, description="Also trains the same student without the teacher, the honest comparison.")


class ExportRecipe(_Section):
    """The ONNX file that ships."""

    target: Literal["auto", "portable", "arm64", "x86-vnni", "x86-avx2", "wasm"] = Field(
        "arm64",
        description="Which processors the file is shaped for; `auto` tries several forms on this machine and keeps the "
        "fastest that is good enough.",
    )
    max_drop: float = Field(
        0.5,
        ge=0.0,
        description="Points of the metric that int8 may lose on validation data before it is refused; of a language "
        "model's likelihood, hundredths of what it is.",
    )
    weights: Literal["int8", "blocks-8", "blocks-4", "fp16", "fp32"] = Field(
        "int8",
        description="`int8` multiplies in int8; `blocks-8` and `blocks-4` keep a scale for every 32 weights, of 8 or 4 "
        "bits: more exact or smaller, and slower here; `fp16` and `fp32` ship a file that computes in fp32.",
    )
    embeddings: Literal["int8", "int4"] = Field(
        "int8",
        description="How the table of the tokens is stored: `int8` with a scale a row, or `int4` with one for 32 "
        "numbers, little more than half of that, kept where it loses no more than `max_drop` either.",
    )
    repair: bool = Field(
        True,
        description="Whether an int8 file that loses too much is made with more care; `false`: the plain one or none.",
    )
    int8_steps: int = Field(
        300,
        ge=0,
        description="Steps of training with int8's rounding in the loop where nothing cheaper repairs the file; 0 does "
        "without.",
    )
    ort: bool = Field(
        False,
        description="Also write the int8 file as .ort, and the operators that a reduced runtime needs.",
    )
    golden: int = Field(32, ge=1, description="Texts whose ids and answers are kept in the bundle as a proof.")


class BenchRecipe(_Section):
    """How latency is measured."""

    lengths: list[Count] = Field([16, 32, 64, 128], min_length=1, description="Sequence lengths in tokens.")
    batches: list[Count] = Field([1], min_length=1, description="Sentences a call.")
    threads: list[Count] = Field([1], min_length=1, description="Threads of one session.")
    runs: int = Field(100, ge=3, description="Timed calls a cell.")


class Recipe(_Section):
    """A whole run, from teacher to bundle. `name`, `task`, `output` and `seed` stand at the top of the file."""

    name: str = Field("", description="Name of the bundle; the recipe file's name when empty.")
    task: Literal[
        "auto",
        "text-classification",
        "masked-lm",
        "multi-label",
        "causal-lm",
        "question-answering",
        "regression",
        "sentence-embedding",
        "image-captioning",
        "image-classification",
        "image-text",
        "seq2seq",
        "token-classification",
    ] = Field("auto", description="`auto` reads it from the teacher's architecture.")
    output: str = Field("", description="Folder for everything this run makes; `runs/NAME` when empty.")
    seed: int = Field(0, ge=0, description="One seed, one result.")
    teacher: TeacherRecipe = Field(default_factory=TeacherRecipe)
    student: StudentRecipe = Field(default_factory=StudentRecipe)
    data: DataRecipe = Field(default_factory=DataRecipe)
    cache: CacheRecipe = Field(default_factory=CacheRecipe)
    objective: ObjectiveRecipe = Field(default_factory=ObjectiveRecipe)
    training: TrainingRecipe = Field(default_factory=TrainingRecipe)
    export: ExportRecipe = Field(default_factory=ExportRecipe)
    bench: BenchRecipe = Field(default_factory=BenchRecipe)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Recipe:
        """Reads a TOML file, applies `key=value` overrides and checks the whole.

        Args:
            path: The recipe. Relative paths inside it are relative to the folder the command runs in.
            overrides: Such as `training.epochs=3`; the value is TOML, or a plain string where TOML does not parse.

        Raises:
            RecipeError: Naming every problem at once.
        """
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise RecipeError(["there is no such file. `distill new` writes one."], where=str(path)) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError([f"not a readable TOML file ({error})."], where=str(path)) from None
        for override in overrides or []:
            apply_override(values, override)
        values["name"] = values.get("name") or path.stem
        return cls.parse(values, where=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], *, where: str = "recipe") -> Recipe:
        """Checks a mapping of sections, as `tomllib` reads it."""
        problems = _missing(values)
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            problems += explain(error.errors(), cls)
        if problems:
            raise RecipeError(problems, where=where)
        return recipe

    @property
    def folder(self) -> Path:
        """Where everything of this run goes."""
        return Path(self.output or f"runs/{self.name or 'run'}")

    def fingerprint(self) -> str:
        """sha256 of the resolved recipe without `output` and `bench`, which do not change what is made."""
        values = self.model_dump(mode="json", by_alias=True, exclude={"output", "bench"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_toml(self, *, comments: bool = False) -> str:
        """The resolved recipe with every field, as TOML; under its documentation where `comments` is set."""
        return render_toml(self, comments=_FIRST_LINE if comments else "")


def _missing(values: Mapping[str, Any]) -> list[str]:
    """What a recipe lacks that no default can stand for, and what contradicts itself."""
    teacher: Any = values.get("teacher") or {}
    data: Any = values.get("data") or {}
    if not isinstance(teacher, Mapping) or not isinstance(data, Mapping):
        return []  # which is told of first
    problems = []
    if not any(teacher.get(key) for key in ("checkpoint", "card", "start")):
        problems.append(
            "`teacher.checkpoint` must name a fine-tuned model; got ''. "
            "Give a hub id or a folder, or a pretrained model as `teacher.start`"
        )
    if not data.get("train"):
        problems.append("`data.train` must name the training data; got ''. Give a file or a hub id")
    members, weights = (_listed(teacher.get(key)) for key in ("ensemble", "ensemble_weights"))
    if weights and len(weights) != len(members) + 1:
        problems.append(f"`teacher.ensemble_weights` must be {len(members) + 1} numbers; got {weights!r}")
    elif weights and not any(weights):
        problems.append(f"`teacher.ensemble_weights` must not all be 0; got {weights!r}")
    problems += _sharding(values)
    problems += _embeddings(values)
    augment = data.get("augment") or {}
    if isinstance(augment, Mapping) and "masked" in _listed(augment.get("ways")) and not augment.get("model"):
        problems.append("`data.augment.model` must name a masked language model for the way `masked`; got ''")
    if isinstance(augment, Mapping) and augment.get("copies") and data.get("text_pair"):
        problems.append("`data.augment.copies` must be 0 with `data.text_pair`: pairs are not augmented")
    labels = _listed(data.get("labels"))
    if len({str(label) for label in labels}) != len(labels):
        problems.append(f"`data.labels` must be distinct; got {labels!r}")
    return problems


def _listed(value: Any) -> list[Any]:
    """A list of the recipe; empty where there is something else."""
    return value if isinstance(value, list) else []


def _sharding(values: Mapping[str, Any]) -> list[str]:
    """A student in parts writes no texts of its own, and is not compiled."""
    training: Any = values.get("training") or {}
    if not isinstance(training, Mapping) or training.get("sharding", "none") == "none":
        return []
    objective: Any = values.get("objective") or {}
    on_policy = objective.get("on_policy") if isinstance(objective, Mapping) else None
    share = on_policy.get("share") if isinstance(on_policy, Mapping) else None
    beside = 'with `training.sharding = "fsdp"`'
    problems = [f"`objective.on_policy.share` must be 0 {beside}; got {share!r}"] if share else []
    return problems + (["`training.compile` must be false " + beside] if training.get("compile") else [])


def _embeddings(values: Mapping[str, Any]) -> list[str]:
    """A table in int4 takes an operator of ONNX Runtime's own, beside weights that are stored in few bits too."""
    export: Any = values.get("export") or {}
    if not isinstance(export, Mapping) or export.get("embeddings") != "int4":
        return []
    weights = export.get("weights", "int8")
    if weights in ("fp16", "fp32"):
        return [f'`export.embeddings` must be "int8" with `export.weights = "{weights}"`, which stores tables alike']
    if weights == "int8" and export.get("target") == "portable":
        return [
            '`export.embeddings` must be "int8" with `export.target = "portable"`: standard ONNX has no operator that '
            "looks 4-bit numbers up"
        ]
    return []
