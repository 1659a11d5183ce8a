"""Batches of texts of like length, in an order that depends on (seed, epoch) and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler


class LengthBucketSampler(Sampler[list[int]]):
    """A batch sampler that wastes little on padding and that a resume can fast-forward exactly.

    All rows are shuffled, cut into windows of `window` batches, each window is sorted by length and cut into batches,
    and the batches are shuffled. The order is a pure function of (seed, epoch): it draws from no global generator, so
    a run that is killed and resumed (`accelerate.skip_first_batches`) sees the batches it has not seen yet. The one
    batch that may be short comes last, as sharding over processes (`accelerate.BatchSamplerShard`) needs it.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows a batch.
        seed: With the epoch, the whole state.
        drop_last: Leave out the rows that do not fill a batch.
        window: Batches sorted together: larger wastes less on padding, smaller mixes better.
    """

    def __init__(
        self,
        lengths: Sequence[int] | npt.NDArray[np.integer],
        batch_size: int,
        *,
        seed: int,
        drop_last: bool = False,
        window: int = 50,
    ) -> None:
        if batch_size < 1 or window < 1:
            raise ValueError(f"batch_size and window must be at least 1; got {batch_size} and {window}")
        self.lengths = np.asarray(lengths, np.int64)
        self.batch_size, self.seed, self.drop_last, self.window = batch_size, seed, drop_last, window
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; accelerate and the Trainer call it."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        whole = len(order) // self.batch_size * self.batch_size
        rest = order[whole:]  # cut off before sorting: were the longest rows left over, they would always come last
        step = self.window * self.batch_size
        windows = [order[start : min(start + step, whole)] for start in range(0, whole, step)]
        ordered = [rows[np.argsort(self.lengths[rows], kind="stable")] for rows in windows]
        batches = np.concatenate(ordered).reshape(-1, self.batch_size) if ordered else order[:0].reshape(0, 1)
        for index in random.permutation(len(batches)):
            yield batches[index].tolist()
        if len(rest) and not self.drop_last:
            yield rest.tolist()


class TokenBudgetSampler(Sampler[list[int]]):
    """A batch sampler that fills batches of like length up to a number of tokens, padding included.

    Rows stand in the order of their lengths, those of equal length shuffled in every epoch, and are cut where one more
    row would not fit; the batches are shuffled. Where the cuts are depends on the lengths alone, so every epoch has as
    many batches, and the order is a pure function of (seed, epoch) as `LengthBucketSampler`'s is.

    Args:
        lengths: Tokens of each row.
        tokens: Rows times longest row of a batch at most; a row that is longer than that stands alone.
        seed: With the epoch, the whole state.
    """

    def __init__(self, lengths: Sequence[int] | npt.NDArray[np.integer], tokens: int, *, seed: int) -> None:
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1; got {tokens}")
        self.lengths, self.seed, self.epoch = np.asarray(lengths, np.int64), seed, 0
        ordered = np.sort(self.lengths).tolist()
        self._starts = [0] if ordered else []
        for row, length in enumerate(ordered):
            if row > self._starts[-1] and (row + 1 - self._starts[-1]) * length > tokens:
                self._starts.append(row)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = np.lexsort((random.permutation(len(self.lengths)), self.lengths))
        batches = np.split(order, self._starts[1:])
        for index in random.permutation(len(self)):
            yield batches[index].tolist()


Batches = LengthBucketSampler | TokenBudgetSampler


def sample_batches(
    lengths: Sequence[int] | npt.NDArray[np.integer], rows: int, tokens: int, *, seed: int = 0
) -> Batches:
    """Batches of so many rows or, where `tokens` is not 0, of so many tokens."""
    return TokenBudgetSampler(lengths, tokens, seed=seed) if tokens else LengthBucketSampler(lengths, rows, seed=seed)


class ProcessBatches(Sampler[list[int]]):
    """One process's part of every batch: each row goes to one process, none is repeated.

    A batch may be too short for all: who gets nothing of it is given an empty list.

    Args:
        whole: Batches for all processes together.
        number: Which process this is.
        count: How many there are.
        pieces: Batches that a part is cut into: a run that more processes began keeps their batches, in pieces.
    """

    def __init__(self, whole: Batches, number: int, count: int, pieces: int = 1) -> None:
        self.whole, self.number, self.count, self.pieces = whole, number, count, pieces

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.whole.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.whole) * self.pieces

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.whole:
            own = rows[self.number :: self.count]
            size = -(-len(own) // self.pieces)
            for piece in range(self.pieces):
                yield own[piece * size : (piece + 1) * size]
