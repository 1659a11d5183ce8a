"""One model in one process, timed on request: JSON lines in, JSON lines out.

Started once a model, so that load time and memory are that model's alone:

    (it has loaded)   ->  {"load_ns": ..., "idle_bytes": ..., "vocabulary": 30522, "writes": false, "fixed": 0}
    {"batch": 1, "length": 16, "ids": 999, "calls": 20}  ->  {"ns": [...]}       ids drawn below 999
    {"texts": ["a text", ...]}                           ->  {"tokens": 17.3}    mean tokens of a text
    {"batch": 1, "length": 0, "ids": 999, "calls": 20}   ->  {"ns": [...]}       those texts in turn
    {"batch": 1, "length": 16, "ids": 999, "calls": 20, "step": true}  ->  {"ns": [...]}  one token behind 16 others
    {"memory": true}                                     ->  {"peak_bytes": 41234432}

`fixed` is the number of tokens of a graph that reads images: it is asked at that length alone.
What goes wrong is answered as {"error": "what", "fix": "what to do"}. The process ends when its input does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distill.errors import BundleError, DistillError
from distill.export.pieces import files_of, towers
from distill.machine import peak_bytes, resident_bytes

Array = np.ndarray
SEED = 0
MOST_IDS = 2**18
"""Where the search for the size of a vocabulary ends."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "pixel_values")
PIXELS = INPUTS[-1]
DTYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}


class Model(Protocol):
    """A loaded model."""

    def __call__(self, batch: Mapping[str, Array]) -> Any:
        """Answers one batch: `input_ids`, `attention_mask`, `token_type_ids`, `position_ids`, (B, L) int64 each.

        A model that reads images is given as many random ones.
        """

    def count_ids(self) -> int:
        """How many token ids it knows."""

    @property
    def writes(self) -> bool:
        """It takes keys and values of the tokens before."""

    @property
    def fixed(self) -> int:
        """Tokens of an image, where it reads nothing but images; else 0."""

    def behind(self, batch: Mapping[str, Array]) -> Callable[[], Any]:
        """A call that reads one token, with the batch before it."""


def main(path: str, threads: int) -> None:
    """Loads `path`, says how long that took, then answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    for answer in _answers(Path(path), threads):
        answers.write(json.dumps(answer) + "\n")


def _answers(path: Path, threads: int) -> Iterator[dict[str, Any]]:
    try:
        load = prepare_torch(path, threads) if path.is_dir() else prepare_onnx(path, threads)
        idle, start = resident_bytes(), time.perf_counter_ns()
        model = load()
        taken = time.perf_counter_ns() - start
        facts = {"vocabulary": model.count_ids(), "writes": model.writes, "fixed": model.fixed}
        yield {"load_ns": taken, "idle_bytes": idle, **facts}
    except Exception as error:  # told to the driver, which raises it as one line
        yield _told(error)
        return
    texts = _Texts(path)
    for line in sys.stdin:
        try:
            yield _answer(json.loads(line), model, texts)
        except Exception as error:  # a shape that the graph refuses; the next one may fit
            yield _told(error)


def _answer(request: dict[str, Any], model: Model, texts: _Texts) -> dict[str, Any]:
    if "memory" in request:
        return {"peak_bytes": peak_bytes()}
    if "texts" in request:
        return {"tokens": texts.take(request["texts"])}
    rows, length, calls = request["batch"], request["length"], request["calls"]
    if length:
        batch = random_batch(rows, length, request["ids"])
        if request.get("step"):
            call = model.behind(batch)
            return {"ns": [_time(call) for _ in range(calls)]}
        return {"ns": [_time(lambda: model(batch)) for _ in range(calls)]}
    return {"ns": [_time(lambda: model(texts.next_batch(rows))) for _ in range(calls)]}


def _time(call: Callable[[], Any]) -> int:
    start = time.perf_counter_ns()
    call()
    return time.perf_counter_ns() - start


def _told(error: Exception) -> dict[str, Any]:
    if isinstance(error, DistillError):
        return {"error": error.what, "fix": error.fix}
    return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300], "fix": ""}


def random_batch(rows: int, length: int, ids: int) -> dict[str, Array]:
    """Full rows of ids drawn evenly from [0, ids): no padding, the same for every model that is asked."""
    values = np.random.default_rng(SEED).integers(0, ids, (rows, length), np.int64)
    return _whole(values, np.ones_like(values))


@cache
def random_images(rows: int, shape: tuple[int, ...]) -> Array:
    """(rows, *shape) fp32, the same ones each time."""
    return np.random.default_rng(SEED).standard_normal((rows, *shape), np.float32)


def _whole(ids: Array, mask: Array) -> dict[str, Array]:
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids),
        "position_ids": np.ascontiguousarray(positions),
    }


# ONNX -----------------------------------------------------------------------------------------------------------------


class _Onnx:
    """A session, fed what its inputs list, in the types they list."""

    def __init__(self, path: Path, threads: int) -> None:
        from distill.export.onnx_model import OnnxModel

        self._model = OnnxModel(path, threads=threads)
        self._session = self._model.session
        given = [value for value in self._session.get_inputs() if value.name not in self._model.memory]
        self._inputs = [(value.name, DTYPES.get(value.type), value.shape) for value in given]
        for name, dtype, shape in self._inputs:
            if name not in INPUTS or dtype is None or len(shape) != (4 if name == PIXELS else 2):
                raise BundleError(
                    f"its input {name!r} is none that bench can fill",
                    fix=f"Give a graph that reads {', '.join(INPUTS[:-1])} or {PIXELS}.",
                )
        self._images = {name: tuple(shape[1:]) for name, _, shape in self._inputs if name == PIXELS}

    def __call__(self, batch: Mapping[str, Array]) -> Any:
        return self._session.run(None, self._feed(batch))

    def _feed(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(batch["input_ids"])
        empty = {name: np.zeros((rows, *shape), np.float32) for name, shape in self._model.memory.items()}
        images = {name: random_images(rows, shape) for name, shape in self._images.items()}
        return {name: _as(batch[name], dtype) for name, dtype, _ in self._inputs if name in batch} | empty | images

    @property
    def writes(self) -> bool:
        return bool(self._model.memory)

    @property
    def fixed(self) -> int:
        return int(self._model.metadata.get("distill.max_length", 1)) if len(self._images) == len(self._inputs) else 0

    def behind(self, batch: Mapping[str, Array]) -> Callable[[], Any]:
        ids = batch["input_ids"]
        longest = int(self._model.metadata.get("distill.max_length", ids.shape[1] + 1))
        _, past = self._model.step(ids[:, : max(1, longest - 1)], None)  # there is a position for one more
        return lambda: self._model.step(ids[:, :1], past)

    def count_ids(self) -> int:
        """As the file says; else found by asking, about thirty times: ONNX Runtime refuses a row that is not there.

        But not of a table in blocks: there it reads on behind the end.
        """
        if self.fixed:
            return MOST_IDS
        if said := self._model.metadata.get("distill.vocabulary"):
            return int(said)
        high = 1
        while high < MOST_IDS and self._knows(high):
            high *= 2
        low = high // 2  # low is known, or is 0 where the graph takes nothing: a call will then say why
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._knows(middle) else (low, middle)
        return low + 1

    def _knows(self, identity: int) -> bool:
        import onnxruntime

        fixed = next(shape for name, _, shape in self._inputs if name != PIXELS)
        rows, length = (size if isinstance(size, int) else least for size, least in zip(fixed, (1, 2), strict=True))
        batch = _whole(np.full((rows, length), identity, np.int64), np.ones((rows, length), np.int64))
        quiet = onnxruntime.RunOptions()
        quiet.log_severity_level = 4
        try:
            self._session.run(None, self._feed(batch), quiet)
        except Exception:  # onnxruntime raises classes of its own
            return False
        return True


def _as(values: Array, dtype: Any) -> Array:
    return values if values.dtype == dtype else values.astype(dtype)


def prepare_onnx(path: Path, threads: int) -> Callable[[], Model]:
    """Does what is done once a process; what it returns loads the file, and only that is timed."""
    import distill.export.runtime  # noqa: F401 (imported before the clock starts)
    from distill.export.sessions import overflows

    overflows()
    files = files_of(path)
    if len(files) == 1:
        return lambda: _Onnx(path, threads)
    return lambda: (_DualEncoder if files == towers(path) else _EncoderDecoder)(path, threads)


class _DualEncoder:
    """Two sessions: a call reads texts with one and as many images with the other."""

    writes = False
    fixed = 0

    def __init__(self, path: Path, threads: int) -> None:
        self._texts, self._images = (_Onnx(file, threads) for file in towers(path))

    def __call__(self, batch: Mapping[str, Array]) -> Any:
        return self._texts(batch), self._images(batch)

    def behind(self, batch: Mapping[str, Array]) -> Callable[[], Any]:
        raise BundleError("encoders write nothing", fix="Measure it on whole texts.")

    def count_ids(self) -> int:
        return self._texts.count_ids()


class _EncoderDecoder:
    """Two sessions: a call reads a text, or an image, and writes its first token."""

    writes = True
    fixed = 0

    def __init__(self, path: Path, threads: int) -> None:
        from distill.export.runtime import open_graph

        self._model = open_graph(path, threads=threads)
        read = self._model.encoder.session.get_inputs()
        self._image = next((tuple(value.shape[1:]) for value in read if value.name == PIXELS), ())

    def __call__(self, batch: Mapping[str, Array]) -> Any:
        return self._model.predict({**self._source(batch), "decoder_input_ids": batch["input_ids"][:, :1]})

    def _source(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        """What is read: a caption is as long as a text would be."""
        return {PIXELS: random_images(len(batch["input_ids"]), self._image)} if self._image else batch

    def behind(self, batch: Mapping[str, Array]) -> Callable[[], Any]:
        """One more token, with as many of the text and of what is written before it; of a caption the last one."""
        step, ids = self._model.stepper(self._source(batch)), batch["input_ids"]
        _, past = step(ids[:, : max(1, ids.shape[1] - 1)] if self._image else ids, None)
        return lambda: step(ids[:, :1], past)

    def count_ids(self) -> int:
        return int(self._model.vocabulary)


# PyTorch --------------------------------------------------------------------------------------------------------------


class _Torch:
    """A checkpoint in fp32, as `transformers` loads it."""

    def __init__(self, path: Path, model_class: Any) -> None:
        import inspect

        import torch

        self._torch = torch
        self._model = model_class.from_pretrained(
            path, use_safetensors=True, dtype=torch.float32, local_files_only=True
        ).eval()
        taken = inspect.signature(self._model.forward).parameters
        self._inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in taken]
        self._image = image_shape(self._model.config) if PIXELS in taken else ()

    def __call__(self, batch: Mapping[str, Array]) -> Any:
        with self._torch.inference_mode():
            given = {name: batch[name] for name in self._inputs}
            if self._image:
                given[PIXELS] = random_images(len(batch["input_ids"]), self._image)
            return self._model(**{name: self._torch.from_numpy(value) for name, value in given.items()})[0].numpy()

    @property
    def writes(self) -> bool:
        return False

    def behind(self, batch: Mapping[str, Array]) -> Callable[[], Any]:
        raise BundleError("a checkpoint is measured on whole texts", fix="Give its ONNX file.")

    @property
    def fixed(self) -> int:
        if self._inputs or not self._image:
            return 0
        side = int(self._model.config.patch_size)
        return (self._image[1] // side) * (self._image[2] // side) + 1

    def count_ids(self) -> int:
        return (
            MOST_IDS
            if self.fixed
            else int(getattr(self._model, "text_model", self._model).get_input_embeddings().weight.shape[0])
        )


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model reads, by its config."""
    own = getattr(config, "vision_config", config)
    size = own.image_size if isinstance(own.image_size, (list, tuple)) else (own.image_size,) * 2
    return int(own.num_channels), int(size[0]), int(size[1])


def prepare_torch(path: Path, threads: int) -> Callable[[], Model]:
    """Imports torch and reads the configuration; what it returns loads the weights, and only that is timed."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    named = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, named, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise BundleError(
            f"its config.json names the architecture {named!r}, which transformers {transformers.__version__} lacks",
            fix="Name one of transformers' model classes in `architectures`.",
        )
    return lambda: _Torch(path, model_class)


# Text -----------------------------------------------------------------------------------------------------------------


class _Texts:
    """Real sentences for a model with a tokenizer; tokenising is part of every timed call, as it is in an app."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, count()
        self._texts: Sequence[str] = []

    def take(self, texts: Sequence[str]) -> float:
        """Keeps the texts and returns how many tokens they have on average."""
        from tokenizers import Tokenizer

        folder = self._folder()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        config = _json(folder / "config.json")
        self._padding = config.get("pad_token_id") or 0
        longest = min(
            _json(folder / "tokenizer_config.json").get("model_max_length") or 512,
            config.get("max_position_embeddings") or 512,
        )
        self._tokenizer.enable_truncation(int(longest))
        self._texts = texts
        return float(np.mean([len(encoding.ids) for encoding in self._tokenizer.encode_batch(list(texts))]))

    def next_batch(self, rows: int) -> dict[str, Array]:
        """The next `rows` texts, beginning again after the last, padded to the longest of them."""
        texts = [self._texts[next(self._at) % len(self._texts)] for _ in range(rows)]
        found = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        ids = np.full((rows, max(map(len, found))), self._padding, np.int64)
        mask = np.zeros_like(ids)
        for row, values in enumerate(found):
            ids[row, : len(values)], mask[row, : len(values)] = values, 1
        return _whole(ids, mask)

    def _folder(self) -> Path:
        nearby = (self._path, self._path.parent, self._path.parent.parent)
        for folder in nearby:
            if (folder / "tokenizer.json").is_file():
                return folder
        raise BundleError(
            "there is no tokenizer.json beside it or in the folder above",
            fix="Give a bundle or a checkpoint folder, or measure without texts.",
        )


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
