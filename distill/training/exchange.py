"""Memory that the processes of one machine share: what they tell each other in every step, and what all of them read.

gloo sends every number through the network's loopback, which takes the cores that train: 24 ms for 7.1 million numbers
between two processes of one thread each, where shared memory takes 9.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

import torch
from torch import Tensor

from distill import processes

IN_MEMORY = hasattr(os, "memfd_create")
"""Whether there are files that no disk holds, as on Linux; elsewhere temporary ones do."""

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
        self.count, self.number, self._peers = processes.count(), processes.number(), peers
        self._memory: mmap.mmap | None = memory
        self._size = 2 * self.count * PAGE
        self._pages = torch.frombuffer(memory, dtype=torch.uint8, count=self._size).view(2, self.count, PAGE)
        self._turn = 0

    def close(self) -> None:
        """Lets go of the memory, which ends with the last tensor that is in it."""
        self._memory, self._pages = None, torch.empty(0)

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
            if not self.number and all(came):
                for peer in self._peers:
                    peer.sendall(b".")
        except OSError:
            came = [b""]
        if not all(came):
            raise ConnectionError("another process of this run has ended")


@contextmanager
def exchange(size: int = 0) -> Iterator[Exchange | None]:
    """What processes tell each other through within the block; None where their process group has to do.

    That is with one process, on several machines, on Windows, and where there is no room for a file.

    Args:
        size: Bytes that `Exchange.shared` is to give.
    """
    if processes.count() == 1 or not hasattr(socket, "send_fds"):
        yield None
        return
    with ExitStack() as stack:
        opened = _open(stack, 2 * PAGE * processes.count() + size)
        if opened:
            stack.callback(opened.close)
        yield opened


def _open(stack: ExitStack, size: int) -> Exchange | None:
    """The first process listens on a socket that those of its machine reach, and hands them its file."""
    link, file = stack.enter_context(socket.socket(socket.AF_UNIX)), None
    with ExitStack() as until_met:

        def listen() -> str:
            nonlocal file
            with suppress(OSError):  # there is no room, or the folder's name is too long for a socket
                file = stack.enter_context(_file(size))
                folder = until_met.enter_context(TemporaryDirectory(prefix="distill-"))
                link.bind(f"{folder}/meet")
                link.listen(processes.count())
                return folder
            return ""

        folder = processes.agree(listen)
        reached = bool(folder)
        if folder and not processes.is_main():
            try:
                link.connect(f"{folder}/meet")
            except OSError:
                reached = False
        if not all(processes.gather(reached)):
            return None
    if file is None:
        _, (number,), _, _ = socket.recv_fds(link, 1, 1)
        with open(number, "r+b"):
            return Exchange(mmap.mmap(number, size), [link])
    peers = [stack.enter_context(link.accept()[0]) for _ in range(processes.count() - 1)]
    for peer in peers:
        socket.send_fds(peer, [b"."], [file.fileno()])
    return Exchange(mmap.mmap(file.fileno(), size), peers)


def _file(size: int) -> IO[bytes]:
    """A file without a name that there is room for: in memory on Linux, elsewhere where temporary files are."""
    file: IO[bytes] = open(os.memfd_create("distill"), "w+b") if IN_MEMORY else TemporaryFile()  # noqa: SIM115
    for start in range(0, size, PAGE):
        file.write(bytes(min(PAGE, size - start)))
    file.flush()
    return file
