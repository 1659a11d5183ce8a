"""The teacher: loaded safely, trusted only above its floor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import cached_file

from distill.encoders import token_embedding, written_config
from distill.errors import DataError, TeacherError, first_line
from distill.features import Features, TappedModel
from distill.files import sha256_json
from distill.heads import HEADS
from distill.heads.images import CONFIG
from distill.readers import ImageReader, image_reader
from distill.tasks import Padding, Task

_QUIET: dict[str, Any] = {
    f"_raise_exceptions_for_{case}": False for case in ("gated_repo", "missing_entries", "connection_errors")
}
"""A file that is not there is no error here."""

UNREAD = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type", "transformers_version")
"""What of a config bears on no answer."""


class Teacher(Protocol):
    """What the trainer asks a teacher for; a live one and a cached one are the same to it."""

    def features(self, batch: Mapping[str, Tensor]) -> Features:
        """The taps of this teacher for the rows of `batch`, without gradients."""


@dataclass
class Checkpoint:
    """A loaded model with all that belongs to it.

    Attributes:
        model: In fp32, on the CPU, in evaluation mode.
        tokenizer: The fast tokenizer it was trained with, or the `ImageReader` of a model that reads images.
        labels: Label names by class number.
        source: The folder or hub id it came from.
    """

    model: Any
    tokenizer: Any
    labels: list[str]
    source: str
    notes: list[str] = field(default_factory=list)

    @property
    def padding(self) -> Padding:
        """What fills short rows of a batch."""
        return padding_of(self.tokenizer, self.model.config)

    def weights_hash(self) -> str:
        """sha256 over names, shapes, dtypes and bytes of all weights, and over what the config says of using them."""
        config = {name: value for name, value in self.model.config.to_diff_dict().items() if name not in UNREAD}
        return sha256_json([hash_tensors(self.model.state_dict()), config])

    def tokenizer_hash(self) -> str:
        """sha256 of the tokenizer's own serialisation, without what it was last asked to cut and to pad to."""
        if isinstance(self.tokenizer, ImageReader):
            return self.tokenizer.digest()
        said = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return sha256_json({**said, "truncation": None, "padding": None})

    def save(self, folder: Path, task: Task, max_length: int) -> None:
        """Writes model and tokenizer as transformers' own loaders read them, with what the task adds."""
        task.save(self.model, folder, max_length)
        self.tokenizer.save_pretrained(folder)


def padding_of(tokenizer: Any, config: Any = None) -> Padding:
    """What fills short rows of a batch, by a tokenizer of transformers, and what a decoder of `config` starts with."""
    if isinstance(tokenizer, ImageReader):
        words = Padding() if tokenizer.tokenizer is None else padding_of(tokenizer.tokenizer, config)
        return replace(words, images=tokenizer.images)
    kinds = int(getattr(tokenizer, "pad_token_type_id", 0) or 0)
    fill = int(tokenizer.pad_token_id)
    values = {"input_ids": fill, "token_type_ids": kinds, "decoder_input_ids": fill}
    return Padding(values, int(getattr(config, "decoder_start_token_id", None) or 0))


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def load_config(source: str, revision: str = "") -> Any:
    """The configuration of a checkpoint, without its weights.

    Raises:
        TeacherError: Nothing readable is there.
    """
    try:
        return transformers.AutoConfig.from_pretrained(source, revision=revision or None, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"no readable checkpoint ({first_line(error)})",
            where=source,
            fix="Give a folder with config.json and model.safetensors, or a hub id that this machine can reach.",
        ) from error


def load_checkpoint(source: str, task: Task, *, revision: str = "", labels: Sequence[str] | None = None) -> Checkpoint:
    """Loads model and tokenizer from safetensors, never running code that comes with them.

    Args:
        source: A hub id or a folder.
        task: Its auto class loads the model.
        revision: Commit or tag of a hub id.
        labels: Given for a pretrained model: a new head is made for them. None keeps the head that is there.

    Raises:
        TeacherError: The weights are missing or not safetensors, the head is missing, or the tokenizer does not fit.
    """
    config = load_config(source, revision)
    beside = _beside(source, revision, task.beside)
    reason = task.misfit(beside)
    if reason:
        raise TeacherError(reason, where=source, fix="Give a teacher that does the same.")
    auto_class = getattr(transformers, task.auto_class)
    options: dict[str, Any] = {"revision": revision or None, "trust_remote_code": False}
    if labels is not None:
        task.configure(config, labels)
    try:
        model, info = auto_class.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TeacherError(
            f"its weights cannot be loaded as {task.auto_class} ({first_line(error)})",
            where=source,
            fix="They must be safetensors: save the model again with model.save_pretrained(FOLDER).",
        ) from error
    missing = sorted(info["missing_keys"])
    if labels is None and missing:
        raise TeacherError(
            f"these weights are not in the file: {', '.join(missing[:4])}; an untrained head teaches nothing",
            where=source,
            fix="Fine-tune it first: name it as `teacher.start` instead of `teacher.checkpoint`.",
        )
    task.restore(model, beside, lambda path: _file(source, revision, path))
    tokenizer = load_reader(source, task, revision)
    words = tokenizer.tokenizer if isinstance(tokenizer, ImageReader) else tokenizer
    if words is not None:
        _check_tokenizer(words, model, source)
    found = [str(model.config.id2label[number]) for number in range(model.config.num_labels)] if task.named else []
    return Checkpoint(model.eval(), tokenizer, found, source)


def _beside(source: str, revision: str, paths: Iterable[str]) -> dict[str, Any]:
    """Those of the JSON files that a checkpoint has."""
    found = {path: _file(source, revision, path) for path in paths}
    return {path: json.loads(file.read_text(encoding="utf-8")) for path, file in found.items() if file}


def _file(source: str, revision: str, path: str) -> Path | None:
    found = cached_file(source, path, revision=revision or None, **_QUIET)
    return Path(found) if found else None


def load_reader(source: str, task: Task, revision: str = "") -> Any:
    """What turns rows of the data into what the model reads: a tokenizer, or an `ImageReader` that may hold one.

    Raises:
        TeacherError: It is missing or cannot be used.
    """
    words = load_tokenizer(source, revision, words=task.inputs == "words") if "text" in task.reads else None
    if words is not None and HEADS[task.name].goes_on:
        words.truncation_side = "right"  # nothing is lost at either side, and windows are counted from the beginning
    if "image" not in task.reads:
        return words
    config: dict[str, Any] = {}
    for name in (CONFIG, "processor_config.json"):  # CLIP's processors write the second
        config = config or _beside(source, revision, [name]).get(name, {})
    shape, tokens = task.images(load_config(source, revision))
    try:
        return image_reader(config.get("image_processor", config), shape, tokens, words)
    except DataError as error:
        raise TeacherError(
            f"its images cannot be read as it did ({error.where}: {error.what})",
            where=source,
            fix="Save its image processor beside the weights: processor.save_pretrained(FOLDER).",
        ) from error


def load_tokenizer(source: str, revision: str = "", *, words: bool = False) -> Any:
    """The fast tokenizer of a checkpoint.

    Args:
        source: A hub id or a folder.
        revision: Commit or tag of a hub id.
        words: It is given words, and has to split them as it splits the text that they stand in.

    Raises:
        TeacherError: There is none, it has no token to pad with, or it splits words otherwise than texts.
    """
    tokenizer = _load_tokenizer(source, revision)
    if not words or _splits_alike(tokenizer):
        return tokenizer
    tokenizer = _load_tokenizer(source, revision, add_prefix_space=True)
    if not _splits_alike(tokenizer):
        raise TeacherError(
            "its tokenizer splits words given one by one otherwise than the text they stand in",
            where=source,
            fix='Let its tokenizer.json put a space before each word ("add_prefix_space": true).',
        )
    return tokenizer


def _splits_alike(tokenizer: Any) -> bool:
    """Not so byte-level pieces that tell a space before a word from none: words alone have none before them."""
    said = ["play", "this", "song"]
    return bool(tokenizer(said, is_split_into_words=True)["input_ids"] == tokenizer(" ".join(said))["input_ids"])


def _load_tokenizer(source: str, revision: str, **options: Any) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision or None, trust_remote_code=False, use_fast=True, **options
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TeacherError(
            f"its tokenizer cannot be loaded ({first_line(error)})",
            where=source,
            fix="Save it beside the weights: tokenizer.save_pretrained(FOLDER).",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise TeacherError(
            "it has no fast tokenizer (tokenizer.json)",
            where=source,
            fix="Convert it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER).",
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one of nothing
        raise TeacherError(
            "its tokenizer's files are missing",
            where=source,
            fix="Save them beside the weights: tokenizer.save_pretrained(FOLDER).",
        )
    if tokenizer.pad_token_id is None:
        raise TeacherError(
            "its tokenizer has no padding token",
            where=source,
            fix="Set one: tokenizer.pad_token = tokenizer.eos_token; then save it again.",
        )
    return tokenizer


def _check_tokenizer(tokenizer: Any, model: Any, source: str) -> None:
    rows = token_embedding(model).weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise TeacherError(
            f"the tokenizer gives ids up to {largest}, the embedding has {rows} rows",
            where=source,
            fix="They belong to different models: put the tokenizer of this model into the folder.",
        )


def check_length(checkpoint: Checkpoint, max_length: int) -> None:
    """Refuses a maximum length past the model's positions.

    Raises:
        TeacherError: With the largest length that would do.
    """
    positions = position_limit(checkpoint.model.config)
    if positions is not None and max_length > positions:
        raise TeacherError(
            f"`data.max_length` is {max_length}, the model has {positions} positions",
            where=checkpoint.source,
            fix=f"Set data.max_length to {positions} or less.",
        )


def position_limit(config: Any) -> int | None:
    """Tokens that a model's learnt positions reach, None where they are computed.

    RoBERTa and its kin number positions from `padding_idx + 1`: that many rows of the table are never used.
    """
    config = written_config(config)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    offset = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2, "longformer": 2}
    return int(positions) - offset.get(config.model_type, 0)


def head_of(model: nn.Module, classes: int) -> nn.Linear | None:
    """The linear layer that gives the logits: the last one in the module tree with as many rows as classes."""
    found = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == classes]
    return found[-1] if found else None


def use_bf16(precision: str, device: torch.device | str = "cpu") -> bool:
    """Whether `precision` (auto, bf16, fp32) means bf16 autocast on this device."""
    if precision != "auto":
        return precision == "bf16"
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_floor(value: float, floor: float, metric: str, source: str) -> None:
    """Stops a run whose teacher is not the teacher it should be.

    Raises:
        TeacherError: `value` is below `floor`, or not a number.
    """
    if not math.isfinite(value) or value < floor:
        raise TeacherError(
            f"its {metric} on the validation data is {value:.3f}, below its floor of {floor:.3f}",
            where=source,
            fix="Look at label order and columns first; a lower teacher.floor is the last resort.",
        )


class LiveTeacher:
    """A teacher that runs its model for every batch.

    Args:
        model: In fp32; it is put into evaluation mode and never changed.
        taps: What to record, such as `logits` and `hidden.3`.
        bf16: Run under bf16 autocast.
    """

    def __init__(self, model: Any, taps: Iterable[str], *, bf16: bool = False) -> None:
        self.taps = frozenset(taps)
        self.bf16 = bf16
        self._model = model.eval()
        self._tapped = TappedModel(model, sorted(self.taps))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._model.parameters()).device

    def features(self, batch: Mapping[str, Tensor]) -> Features:
        """Every tap for the rows of `batch`: logits in fp32, the rest as the model computes it."""
        self._model.eval()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            features = self._tapped({name: value.to(self.device) for name, value in batch.items()})
        home = batch["attention_mask"].device
        return {name: value.float().to(home) for name, value in features.items()}
