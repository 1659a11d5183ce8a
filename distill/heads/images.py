"""Images as a model reads them: decoded, resized and cropped by Pillow, scaled and normalised by NumPy.

    images = Preprocessing.of(json.loads(Path("preprocessor_config.json").read_text()))
    pixels = images.pixels(read_image("digit.png"))  # (C, H, W) uint8
    images.normalise(pixels)                         # (C, H, W) fp32, what `pixel_values` takes

Training and the shipped bundle run the same lines. An array that is to be resized to what it has needs no Pillow.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import DataError, needs_extra

Array = np.ndarray

CONFIG = "preprocessor_config.json"
STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
"""What is done here; an image processor that does anything else is refused."""
FIX = "Give a PNG or JPEG file, or an array (H, W) or (H, W, 3) of numbers from 0 to 255."


@dataclass(frozen=True)
class Pixels:
    """What a model read once, as golden vectors keep it: nothing more is done to it.

    Attributes:
        array: (H, W, C) uint8 of the model's own size.
    """

    array: Array


@dataclass(frozen=True)
class Preprocessing:
    """What a `preprocessor_config.json` of transformers says.

    Attributes:
        size: (height, width) that an image is brought to; (short, 0) where only its shorter side is.
        crop: (height, width) that is cut out of the middle then; None where nothing is.
        resample: Pillow's number of the filter.
        scale: What numbers from 0 to 255 are multiplied by.
        mean: By channel, taken away after scaling.
        std: By channel, divided by then.
    """

    size: tuple[int, int]
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def of(config: Mapping[str, Any]) -> Preprocessing:
        """Reads the JSON.

        Raises:
            DataError: It asks for a step that is not known here, or lacks a size.
        """
        strange = [name for name, on in config.items() if name.startswith("do_") and on and name not in STEPS]
        if strange:
            raise DataError(f"{strange[0]} is not known", where=CONFIG, fix=f"Known: {', '.join(STEPS)}.")
        crop = _both(config.get("crop_size")) if config.get("do_center_crop") else None
        size = config.get("size") if config.get("do_resize", True) else None
        if isinstance(size, Mapping) and "shortest_edge" in size and "longest_edge" not in size:
            wanted: tuple[int, int] | None = (int(size["shortest_edge"]), 0)
        else:
            wanted = _both(size)
        if wanted is None or (not wanted[1] and crop is None):
            raise DataError(
                f"size {config.get('size')!r} with crop_size {config.get('crop_size')!r} names no height and width",
                where=CONFIG,
                fix='Write "do_resize": true and "size": {"height": 224, "width": 224}.',
            )
        normal = bool(config.get("do_normalize", True))
        mean = tuple(float(value) for value in config.get("image_mean") or (0.5,) * 3)
        std = tuple(float(value) for value in config.get("image_std") or (0.5,) * 3)
        return Preprocessing(
            size=wanted,
            crop=crop,
            resample=int(config.get("resample", 2)),
            scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
            mean=mean if normal else (0.0,) * len(mean),
            std=std if normal else (1.0,) * len(std),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the model reads."""
        return (len(self.mean), *(self.crop or self.size))

    def pixels(self, image: Any) -> Array:
        """(C, H, W) uint8 of an image as `read_image` takes it, or of `Pixels`.

        Raises:
            DataError: It does not decode, or is `Pixels` of another size.
            MissingExtraError: It needs Pillow, which is not there.
        """
        if isinstance(image, Pixels):
            return self._kept(image.array)
        array = image if isinstance(image, np.ndarray) else read_image(image)
        array = self._resized(_channels(array, len(self.mean)))
        return np.ascontiguousarray(array.transpose(2, 0, 1))

    def _kept(self, array: Array) -> Array:
        found = np.ascontiguousarray(array.transpose(2, 0, 1))
        if found.shape != self.shape:
            raise DataError(
                f"pixels of shape {found.shape} were not read by this model, which reads {self.shape}",
                where="image",
                fix="Copy the whole bundle again.",
            )
        return found

    def normalise(self, pixels: Array) -> Array:
        """(..., C, H, W) fp32 of uint8 ones."""
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        return (pixels.astype(np.float32) * np.float32(self.scale) - mean) / std

    def _resized(self, array: Array) -> Array:
        height, width = array.shape[:2]
        wanted = self.size
        if not wanted[1]:  # the shorter side; the other follows
            short, long = sorted((height, width))
            other = int(wanted[0] * long / short)
            wanted = (wanted[0], other) if height <= width else (other, wanted[0])
        if wanted != (height, width):
            whole = _pillow().fromarray(array[..., 0] if array.shape[2] == 1 else array)
            array = np.asarray(whole.resize((wanted[1], wanted[0]), resample=self.resample)).reshape(*wanted, -1)
        return _cropped(array, self.crop) if self.crop else array


def read_image(given: Any) -> Array:
    """(H, W, C) uint8 of a file's path, a file's bytes, a mapping with `bytes`, or nested lists of numbers.

    Raises:
        DataError: It is none of these, or does not decode.
        MissingExtraError: It needs Pillow, which is not there.
    """
    if isinstance(given, Mapping):
        given = given.get("bytes")
    if isinstance(given, (list, tuple, np.ndarray)):
        return _from_numbers(given)
    where = str(given) if isinstance(given, (str, Path)) else "image"
    if isinstance(given, (str, Path)):
        path = Path(given)
        if not path.is_file():
            raise DataError("there is no such image file", where=where, fix=FIX)
        given = path.read_bytes()
    if not isinstance(given, bytes):
        raise DataError(f"{given!r:.40} is no image", where=where, fix=FIX)
    return _decoded(given, where)


def encode_image(array: Array) -> bytes:
    """A PNG of (H, W) or (H, W, C) uint8."""
    file = io.BytesIO()
    _pillow().fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array).save(file, "PNG")
    return file.getvalue()


def written(array: Array) -> dict[str, Any]:
    """uint8 numbers as JSON holds them; `reread` gives them back without Pillow."""
    packed = base64.b64encode(zlib.compress(np.ascontiguousarray(array, np.uint8).tobytes(), 9)).decode("ascii")
    return {"shape": list(array.shape), "zlib": packed}


def reread(value: Mapping[str, Any]) -> Pixels:
    """What `written` was given, known as pixels that a model read.

    Raises:
        ValueError: It is something else.
    """
    shape = tuple(int(size) for size in value["shape"])
    if len(shape) != 3 or min(shape) < 1 or max(shape) > 4096:
        raise ValueError(f"shape {shape}")
    count = int(np.prod(shape))
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(value["zlib"]), count + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    return Pixels(np.frombuffer(unpacked, np.uint8, count).reshape(shape).copy())


def _decoded(content: bytes, where: str) -> Array:
    import warnings

    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what cameras write beside the pixels; lost pixels are an error
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            with pillow.open(io.BytesIO(content)) as stored:
                image = _upright(stored)
                if image.mode.startswith("I;16"):  # whose numbers Pillow would cut off at 255
                    return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
                if image.mode in ("I", "F"):
                    return _from_numbers(np.asarray(image))
                return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except DataError as error:
        raise DataError(error.what, where=where, fix=FIX) from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more, by format
        reason = " ".join(str(error).split())[:100]
        raise DataError(f"{len(content):,} bytes do not decode as an image ({reason})", where=where, fix=FIX) from None


def _from_numbers(values: Any) -> Array:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)
    numbers = array.dtype.kind in "iufb" and array.size > 0
    if not numbers or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        shown = f"{array.ndim} dimensions {array.shape}" if numbers else "rows of unequal length, or no numbers"
        raise DataError(f"an array of {shown} is no image", where="image", fix=FIX)
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 255):
        raise DataError(f"numbers from {array.min():g} to {array.max():g} are no pixels", where="image", fix=FIX)
    return array if array.dtype == np.uint8 else np.rint(array).astype(np.uint8)


def _channels(array: Array, wanted: int) -> Array:
    """(H, W, wanted): grey is repeated, and colours become grey by Pillow's own weights."""
    array = _from_numbers(array)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] == wanted:
        return array
    if array.shape[2] == 1:
        return np.repeat(array, wanted, axis=2)
    return np.asarray(_pillow().fromarray(array).convert("L"))[..., None]


def _cropped(array: Array, crop: tuple[int, int]) -> Array:
    """The middle; black where the image is smaller."""
    out = np.zeros((*crop, array.shape[2]), array.dtype)
    spans = []
    for have, want in zip(array.shape[:2], crop, strict=True):
        begin = (have - want) // 2 if have >= want else 0
        place = 0 if have >= want else -(-(want - have) // 2)
        spans.append((slice(place, place + min(have, want)), slice(begin, begin + min(have, want))))
    (to_row, from_row), (to_column, from_column) = spans
    out[to_row, to_column] = array[from_row, from_column]
    return out


def _both(size: Any) -> tuple[int, int] | None:
    """(height, width) of the ways in which processors write one."""
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    return (int(size), int(size)) if isinstance(size, int) else None


def _upright(image: Any) -> Any:
    """As it is to be seen: a camera may store it sideways, and say so."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise needs_extra("images", "Pillow") from error
    return Image
