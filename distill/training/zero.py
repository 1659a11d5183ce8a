"""ZeRO (Rajbhandari et al., 1910.02054, stage 2) on the processors of one machine: each process steps a part.

Clipping and the optimiser take as long for half a batch as for a whole one. So each weight matrix has one process that
owns it: gradients add up at their owners, who clip and step. These weights are in memory that the processes share, so
that what one has stepped all read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from transformers import TrainerCallback

from distill import processes
from distill.training.exchange import PAGE, Exchange

LINE = 64
"""Bytes: every piece begins at a multiple of as many, so that it can be read as numbers of any kind."""


class Piece(NamedTuple):
    """Values `start` to `stop` of the parameter `number`, flat, and the byte at which they stand in a lane."""

    number: int
    start: int
    stop: int
    place: int


class Zero(TrainerCallback):
    """A process's part of every step.

    Args:
        exchange: Of these processes, with as much memory as `room` says.
        module: What is trained, on the CPU. All processes begin with the first one's weights and buffers.
        table: An embedding whose gradients are sparse: each process has its own, and steps all of its rows.
    """

    def __init__(self, exchange: Exchange, module: nn.Module, table: nn.Embedding | None = None) -> None:
        self._exchange, self._module, self._table = exchange, module, table.weight if table else None
        self._others = [number for number in range(exchange.count) if number != exchange.number]
        self._parameters = divided(module, table)
        owning = owners([one.numel() for one in self._parameters], exchange.count)
        self._owner = dict(zip(self._parameters, owning, strict=True))
        self._flags = _lines(len(self._parameters))
        self._lane = (PAGE - self._flags) // (exchange.count - 1) // LINE * LINE
        numbered = list(enumerate(self._parameters))
        plans = [
            pieces([one for one in numbered if self._owner[one[1]] == owner], self._lane)
            for owner in range(exchange.count)
        ]
        self._turns = list(itertools.zip_longest(*plans, fillvalue=[]))  # in each, what is for each owner

    @torch.no_grad()
    def on_train_begin(self, *_: Any, **more: Any) -> None:
        """Shares the weights, now that the Trainer has moved and loaded them.

        From here to `close` there is one copy: who writes it while another may read changes the other's step. Owners
        step after `collect`, when all are done with their passes; what else writes has to let all wait.
        """
        for value in self._module.state_dict().values():
            torch.distributed.broadcast(value, 0)
        place = 0
        for parameter in self._parameters:
            shared = self._exchange.shared(parameter, place)
            if self._exchange.number == 0:
                shared.copy_(parameter)
            parameter.data = shared
            place += _lines(parameter.numel() * parameter.element_size())
        self._exchange.meet()

    def on_optimizer_step(self, *_: Any, **more: Any) -> None:
        """Waits until all have stepped what they own: nobody reads weights before."""
        self._exchange.meet()

    def close(self) -> None:
        """Gives each process weights of its own again."""
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether this process counts and saves it: one does for each."""
        return self._owner.get(parameter, 0) == self._exchange.number

    @torch.no_grad()
    def collect(self) -> None:
        """Adds up gradients over the processes: each is at its owner then and nowhere else, the table's everywhere.

        Those that no process has stay None.
        """
        if self._table is not None:
            self._table.grad = self._rows(self._table)
        own = self._exchange.number
        given: list[list[int]] = []
        flags = torch.tensor([parameter.grad is not None for parameter in self._parameters], dtype=torch.uint8)
        for turn, planned in enumerate(self._turns):
            page = self._exchange.page()
            for owner in self._others:
                self._write(page[own], self._lane_of(own, owner), planned[owner])
            if turn == 0:
                page[own, : len(flags)] = flags
            self._exchange.meet()
            if turn == 0:
                given = page[:, : len(flags)].tolist()
                self._begin([any(of_all) for of_all in zip(*given, strict=True)])
            for other in self._others:
                self._add(page[other], self._lane_of(other, own), planned[own], given[other])
        for parameter in self._parameters:
            if not self.owns(parameter):
                parameter.grad = None

    def norm(self, own: Tensor) -> Tensor:
        """The norm of all gradients as one vector.

        Args:
            own: (), that of those which this process `owns`.
        """
        return self._exchange.gather(own.double()[None]).square().sum().sqrt().to(own.dtype)

    @contextmanager
    def whole(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within the block the first process has the optimiser's state of every parameter, to be saved."""
        kept = {
            number: {name: (value.shape, value.dtype) for name, value in optimizer.state[parameter].items()}
            for number, parameter in enumerate(self._parameters)
            if self.owns(parameter) and parameter in optimizer.state
        }
        for owner, states in enumerate(processes.gather(kept)):
            for number, named in states.items():
                parameter = self._parameters[number]
                for name, (shape, dtype) in named.items():
                    own = owner == self._exchange.number
                    values = optimizer.state[parameter][name].view(-1) if own else torch.empty(0, dtype=dtype)
                    values = self._exchange.gather(values)
                    if processes.is_main():
                        optimizer.state[parameter][name] = values.view(shape)
        yield
        self.forget(optimizer)

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Drops the optimiser's state of what other processes own."""
        for parameter in self._parameters:
            if not self.owns(parameter):
                optimizer.state.pop(parameter, None)

    def _lane_of(self, writer: int, owner: int) -> int:
        """Where in its row a process writes what is for an owner: behind the flags, a lane for each other process."""
        return self._flags + self._lane * (owner - (owner > writer))

    def _rows(self, weight: Tensor) -> Tensor | None:
        """The sum of a sparse gradient: of the rows that a batch read, each with its number beside it."""
        gradient, columns = weight.grad, weight.shape[1]
        number = torch.empty(0, 8 // weight.element_size(), dtype=weight.dtype)
        rows = torch.empty(0, number.shape[1] + columns, dtype=weight.dtype)
        if gradient is not None:
            number = gradient._indices()[0][:, None].view(weight.dtype)
            rows = torch.cat([number, gradient._values()], 1)
        rows = self._exchange.gather(rows)
        if not len(rows):
            return None
        numbers = rows[:, : number.shape[1]].contiguous().view(torch.int64)
        return torch.sparse_coo_tensor(numbers.T, rows[:, number.shape[1] :], weight.shape, check_invariants=False)

    def _write(self, row: Tensor, lane: int, planned: Sequence[Piece]) -> None:
        for piece in planned:
            gradient = self._parameters[piece.number].grad
            if gradient is not None:
                _numbers(row[lane:], piece, gradient).copy_(gradient.view(-1)[piece.start : piece.stop])

    def _begin(self, given: Sequence[bool]) -> None:
        """Zeros where others have a gradient of what this process owns, and it has none."""
        for number, parameter in enumerate(self._parameters):
            if given[number] and parameter.grad is None and self.owns(parameter):
                parameter.grad = torch.zeros_like(parameter)

    def _add(self, row: Tensor, lane: int, planned: Sequence[Piece], given: Sequence[int]) -> None:
        for piece in planned:
            gradient = self._parameters[piece.number].grad
            if given[piece.number] and gradient is not None:
                gradient.view(-1)[piece.start : piece.stop].add_(_numbers(row[lane:], piece, gradient))


def divided(module: nn.Module, table: nn.Embedding | None = None) -> list[nn.Parameter]:
    """The parameters that are trained, but for the table's."""
    return [one for one in module.parameters() if one.requires_grad and (table is None or one is not table.weight)]


def room(module: nn.Module, table: nn.Embedding | None = None) -> int:
    """Bytes of memory in which `Zero` shares the weights of a module."""
    return sum(_lines(one.numel() * one.element_size()) for one in divided(module, table))


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """Which of `count` processes owns each of some parameters: the largest first, each goes to whoever has least."""
    chosen, loads = [0] * len(sizes), [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        chosen[number] = loads.index(min(loads))
        loads[chosen[number]] += sizes[number]
    return chosen


def pieces(parameters: Sequence[tuple[int, Tensor]], lane: int) -> list[list[Piece]]:
    """The values of some numbered parameters one behind the other, cut so that those of a turn fill `lane` bytes."""
    turns: list[list[Piece]] = [[]]
    place = 0
    for number, parameter in parameters:
        start = 0
        while start < parameter.numel():
            if place >= lane:
                turns.append([])
                place = 0
            stop = min(parameter.numel(), start + (lane - place) // parameter.element_size())
            turns[-1].append(Piece(number, start, stop, place))
            place += _lines((stop - start) * parameter.element_size())
            start = stop
    return turns


def _lines(size: int) -> int:
    """Bytes in whole lines."""
    return -(-size // LINE) * LINE


def _numbers(lane: Tensor, piece: Piece, like: Tensor) -> Tensor:
    """A piece of a lane of bytes, as numbers of the kind of `like`."""
    size = (piece.stop - piece.start) * like.element_size()
    return lane[piece.place : piece.place + size].view(like.dtype)
