"""Memory that the processes of one machine share: what they tell each other in every step, and what all of them read.

gloo sends every number through the network's loopback, which takes the cores that train: 24 ms for 7.1 million numbers
between two processes of one thread each, where shared memory takes 9.
"""

from __future__ import annotations

import mmap
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from distill import processes

IN_MEMORY = "/dev/shm"
"""Linux's folder of files that no disk holds; elsewhere the folder for temporary files does."""

PAGE = 1 << 22
"""Bytes that a process writes before the others read them."""


class Exchange:
    """The memory and the sockets of the processes of one machine; `exchange` opens one. All must ask for the same.

    Each writes its row of a page, all meet, each reads the others' rows. There are two pages in turn, so that nobody
    need wait until a page was read: who writes on it again has met those who read it since.

    Args:
        memory: 2 * N * `PAGE` bytes for the pages of N processes, and what `shared` is to give.
        peers: For the first process a socket to each other one; for these the one to the first.
    """

    def __init__(self, memory: mmap.mmap, peers: list[socket.socket]) -> None:
        self.count, self.number, self._peers, self._memory = processes.count(), processes.number(), peers, memory
        self._size = 2 * self.count * PAGE
        self._pages = torch.frombuffer(memory, dtype=torch.uint8, count=self._size).view(2, self.count, PAGE)
        self._turn = 0

    def shared(self, like: Tensor, place: int) -> Tensor:
        """Memory that all processes read and write, for a tensor.

        Args:
            like: Of its shape and dtype.
            place: At which of these bytes it begins: a multiple of the size of a number.
        """
        if not like.numel():
            return torch.empty_like(like)
        values = torch.frombuffer(self._memory, dtype=like.dtype, count=like.numel(), offset=self._size + place)
        return values.view(like.shape)

    def page(self) -> Tensor:
        """(N, `PAGE`) bytes: row `number` is to be written before the next `meet`, the others to be read after it."""
        self._turn = 1 - self._turn
        return self._pages[self._turn]

    def gather(self, values: Tensor) -> Tensor:
        """What every process gives, one behind the other in the order of their numbers.

        Args:
            values: (N, ...), with another N in each process.
        """
        own = values.contiguous().view(-1).view(torch.uint8)
        sizes = self._gather_bytes(torch.tensor([own.numel()]).view(torch.uint8), [8] * self.count).view(torch.int64)
        whole = self._gather_bytes(own, sizes.tolist())
        return whole.view(values.dtype).view(-1, *values.shape[1:])

    def _gather_bytes(self, own: Tensor, sizes: list[int]) -> Tensor:
        whole = torch.empty(sum(sizes), dtype=torch.uint8)
        for start in range(0, max(sizes), PAGE):
            page, piece = self.page(), own[start : start + PAGE]
            page[self.number, : len(piece)] = piece
            self.meet()
            for row, values in zip(page, torch.split(whole, sizes), strict=True):
                part = values[start : start + PAGE]
                part.copy_(row[: len(part)])
        return whole

    def meet(self) -> None:
        """Returns when every process has come here: what each wrote before can be read then."""
        try:
            if self.number:
                self._peers[0].sendall(b".")
            came = [peer.recv(1) for peer in self._peers]
            if not self.number:
                for peer in self._peers:
                    peer.sendall(b".")
        except OSError:
            came = [b""]
        if not all(came):
            raise ConnectionError("another process of this run has ended")


@contextmanager
def exchange(size: int = 0) -> Iterator[Exchange | None]:
    """What processes tell each other through within the block; None where their process group has to do.

    That is with one process, on several machines, on Windows, and where the processes find no file that all can open.

    Args:
        size: Bytes that `Exchange.shared` is to give.
    """
    if processes.count() == 1 or not hasattr(socket, "AF_UNIX"):
        yield None
        return
    with ExitStack() as stack:
        yield _open(stack, 2 * PAGE * processes.count() + size)


def _open(stack: ExitStack, size: int) -> Exchange | None:
    """The first process offers a file and a socket in a folder that those of this machine reach; it goes at once."""
    link, memory = stack.enter_context(socket.socket(socket.AF_UNIX)), None
    with ExitStack() as until_met:

        def offer() -> str:
            for place in (IN_MEMORY, None):
                with suppress(OSError):  # there is none, it is full, or its name is too long for a socket
                    folder = until_met.enter_context(TemporaryDirectory(prefix="distill-", dir=place))
                    with open(Path(folder, "memory"), "wb") as file:
                        for start in range(0, size, PAGE):  # what is written there is room for
                            file.write(bytes(min(PAGE, size - start)))
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
