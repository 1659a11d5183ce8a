"""Numbers in blocks of 4 or 8 bits with one scale a block: what MatMulNBits and GatherBlockQuantized read.

They are unsigned, the zero point in the middle; of two in a byte the earlier one is in the low half.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Array = np.ndarray
Bits = Literal[4, 8]

BLOCK = 32
LARGEST_HALF = float(np.finfo(np.float16).max)
LEVELS = (-8.0, -8.8, -7.2, 7.0, 8.0)
"""Where the number of largest magnitude goes in 4 bits, -8 to 7; beyond them it is cut off. A scale may be negative, so
that either sign can have the longer side."""
CHUNK = 2**20  # numbers looked at together: the search takes some ten times as much memory


def round_blocks(numbers: Array, bits: Bits, block: int = BLOCK, *, half: bool = False) -> tuple[Array, Array]:
    """Rounds rows of numbers in blocks; what is missing of the last block counts as 0.

    In 8 bits the largest number of a block goes to 127. In 4 bits each of `LEVELS` is tried, followed by the scale that
    fits those roundings best, and what has the least squared error is kept.

    Args:
        numbers: float32 (rows, width).
        bits: Bits a number.
        block: Numbers that share a scale.
        half: Whether scales are float16.

    Returns:
        uint8 (rows, blocks, block), not packed yet, and scales (rows, blocks), float32 or float16.
    """
    rows, width = numbers.shape
    padded = np.zeros((rows, -(-width // block) * block), np.float32)
    padded[:, :width] = numbers
    blocks = padded.reshape(rows, -1, block)
    kind, middle = np.float16 if half else np.float32, 1 << (bits - 1)
    scales = np.empty(blocks.shape[:2], kind)
    rounded = np.empty(blocks.shape, np.uint8)
    step = max(1, CHUNK // padded.shape[1])
    for begin in range(0, rows, step):
        some = blocks[begin : begin + step]
        best = _least_error(some, kind) if bits == 4 else _kept(np.abs(some).max(axis=-1) / (middle - 1), kind)
        scales[begin : begin + step] = best
        rounded[begin : begin + step] = _rounded(some, best, middle) + middle
    return rounded, scales


def pack(rounded: Array, bits: Bits) -> Array:
    """uint8 (..., n) to uint8 (..., n * bits / 8)."""
    return rounded if bits == 8 else rounded[..., ::2] | rounded[..., 1::2] << 4


def widen(rounded: Array, scales: Array, bits: Bits, width: int) -> Array:
    """float32 (rows, width): what ONNX Runtime makes of the result of `round_blocks`."""
    numbers = (rounded.astype(np.float32) - (1 << (bits - 1))) * scales[..., None].astype(np.float32)
    return numbers.reshape(len(numbers), -1)[:, :width]


def _least_error(blocks: Array, kind: Any) -> Array:
    """(rows, blocks): of every block the scale whose roundings to 4 bits have the least squared error."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    best, least = np.ones(largest.shape, kind), np.full(largest.shape, np.inf, np.float32)
    for level in LEVELS:
        first = _kept(largest / level, kind)
        for scales in (first, _fitted(blocks, _rounded(blocks, first, 8), kind)):
            error = np.square(blocks - _rounded(blocks, scales, 8) * scales[..., None].astype(np.float32)).sum(axis=-1)
            better = error < least
            best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def _fitted(blocks: Array, rounded: Array, kind: Any) -> Array:
    """Of roundings q of blocks x, the scales of least squared error: <x, q> / <q, q>."""
    squares = np.square(rounded).sum(axis=-1)
    return _kept((blocks * rounded).sum(axis=-1) / np.where(squares == 0, 1, squares), kind)


def _rounded(blocks: Array, scales: Array, middle: int) -> Array:
    return np.clip(np.rint(blocks / scales[..., None].astype(np.float32)), -middle, middle - 1)


def _kept(scales: Array, kind: Any) -> Array:
    """Scales as they are stored; a block of zeros has the scale 1."""
    stored = scales.astype(kind)
    return np.where(stored == 0, np.ones_like(stored), stored)
