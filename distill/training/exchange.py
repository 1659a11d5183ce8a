"""The mean of gradients over processes of one machine, through memory that they share.

gloo sends every number through the network's loopback, which takes the cores that train: 24 ms for 7.1 million numbers
between two processes of one thread each, where shared memory takes 9. A gradient is divided over the processes piece by
piece (reduce-scatter, then all-gather): each adds up its part and all take it over, so every process has the same mean
bit for bit.
"""

from __future__ import annotations

import mmap
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from distill import processes

IN_MEMORY = "/dev/shm"
"""Linux's folder of files that no disk holds; elsewhere the folder for temporary files does."""

PIECE = 1 << 23
"""Bytes of a gradient that are divided over the processes at a time."""

ONE_BUCKET = 1 << 20
"""Megabytes: no process waits for the others between parts of its way back."""


class Exchange:
    """The memory and the sockets of the processes of one machine; `exchange` opens one. All must ask for the same.

    Args:
        memory: (N + 1) * `PIECE` bytes: what each of N processes gives, and what it comes to.
        peers: For the first process a socket to each other one; for these the one to the first.
    """

    def __init__(self, memory: mmap.mmap, peers: list[socket.socket]) -> None:
        self._count, self._number, self._peers = processes.count(), processes.number(), peers
        self._board = torch.frombuffer(memory, dtype=torch.uint8).view(self._count + 1, PIECE)

    def mean_(self, values: Tensor) -> None:
        """Sets `values` (N,) to their mean over the processes: their sum, divided."""
        board = self._board.view(values.dtype)
        for piece in torch.split(values, board.shape[1]):
            ends = [len(piece) * number // self._count for number in range(self._count + 1)]
            parts = [slice(*pair) for pair in pairwise(ends)]
            own, others = parts[self._number], [number for number in range(self._count) if number != self._number]
            for number in others:
                board[self._number, parts[number]] = piece[parts[number]]
            self._meet()
            total = board[self._count, own]
            torch.add(piece[own], board[others[0], own], out=total)
            for number in others[1:]:
                total += board[number, own]
            piece[own] = total.div_(self._count)
            self._meet()
            for number in others:
                piece[parts[number]] = board[self._count, parts[number]]

    def gather(self, values: Tensor) -> Tensor:
        """What every process gives, one behind the other in the order of their numbers.

        Args:
            values: (N, ...), with another N in each process.
        """
        own = values.contiguous().view(-1).view(torch.uint8)
        sizes = self._gather_bytes(torch.tensor([own.numel()]).view(torch.uint8), [8] * self._count).view(torch.int64)
        whole = self._gather_bytes(own, sizes.tolist())
        return whole.view(values.dtype).view(-1, *values.shape[1:])

    def _gather_bytes(self, own: Tensor, sizes: list[int]) -> Tensor:
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
        for start in range(0, max(sizes), PIECE):
            piece = own[start : start + PIECE]
            self._board[self._number, : len(piece)] = piece
            self._meet()
            for number, values in enumerate(torch.split(whole, sizes)):
                part = values[start : start + PIECE]
                part.copy_(self._board[number, : len(part)])
            self._meet()
        return whole

    def reduced(self, gradient: Tensor) -> torch.futures.Future[Tensor]:
        """The mean of a gradient over the processes, as a hook of `DistributedDataParallel` gives it.

        Args:
            gradient: (N,), or sparse: the rows of an embedding that a batch touched. It is written over.
        """
        if gradient.is_sparse:
            rows, values = self.gather(gradient._indices()[0]), self.gather(gradient._values())
            gradient = torch.sparse_coo_tensor(
                rows[None], values.div_(self._count), gradient.shape, check_invariants=False
            )
        else:
            self.mean_(gradient)
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(gradient)
        return done

    def _meet(self) -> None:
        """Returns when every process has come here: what each wrote before can be read then."""
        try:
            if self._number:
                self._peers[0].sendall(b".")
            came = [peer.recv(1) for peer in self._peers]
            if not self._number:
                for peer in self._peers:
                    peer.sendall(b".")
        except OSError:
            came = [b""]
        if not all(came):
            raise ConnectionError("another process of this run has ended")


def wrapped_with(exchange: Exchange, asked: DistributedDataParallelKwargs) -> DistributedDataParallelKwargs:
    """How accelerate is to wrap a module whose gradients `exchange` averages.

    Args:
        exchange: Of these processes.
        asked: How accelerate would wrap it else.
    """

    class Wrapping(DistributedDataParallelKwargs):
        def register_comm_hook(self, model: DistributedDataParallel) -> None:
            model.register_comm_hook(None, lambda _, bucket: exchange.reduced(bucket.buffer()))  # asked for by name

    return Wrapping(**{**asked.to_kwargs(), "gradient_as_bucket_view": True, "bucket_cap_mb": ONE_BUCKET})


@contextmanager
def exchange() -> Iterator[Exchange | None]:
    """What averages gradients within the block; None where their process group has to.

    That is with one process, on several machines, on Windows, and where the processes find no file that all can open.
    """
    if processes.count() == 1 or not hasattr(socket, "AF_UNIX"):
        yield None
        return
    with ExitStack() as stack:
        yield _open(stack)


def _open(stack: ExitStack) -> Exchange | None:
    """The first process offers a file and a socket in a folder that those of this machine reach; it goes at once."""
    link, memory = stack.enter_context(socket.socket(socket.AF_UNIX)), None
    with ExitStack() as until_met:

        def offer() -> str:
            for place in (IN_MEMORY, None):
                with suppress(OSError):  # there is none, it is full, or its name is too long for a socket
                    folder = until_met.enter_context(TemporaryDirectory(prefix="distill-", dir=place))
                    Path(folder, "memory").write_bytes(bytes(PIECE * (processes.count() + 1)))
                    link.bind(f"{folder}/meet")
                    link.listen(processes.count())
                    return folder
            return ""

        folder = processes.agree(offer)
        with suppress(OSError):
            if folder and not processes.is_main():
                link.connect(f"{folder}/meet")
            if folder:
                with open(Path(folder, "memory"), "r+b") as file:
                    memory = mmap.mmap(file.fileno(), 0)
        if not all(processes.gather(memory is not None)) or memory is None:
            return None
    peers = [link]
    if processes.is_main():
        peers = [stack.enter_context(link.accept()[0]) for _ in range(processes.count() - 1)]
    return Exchange(memory, peers)
