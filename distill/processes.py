"""The processes of one run: which one this is, and what all of them agree on.

`torchrun --nproc-per-node N -m distill.cli train RECIPE` starts N of them. The first alone writes; all of them learn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from distill.errors import TrainingError

T = TypeVar("T")
_LONGEST = timedelta(hours=24)
"""How long one process waits for another: the first alone cleans and encodes."""


def number() -> int:
    """Which process this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this is the one that writes."""
    return number() == 0


def count() -> int:
    """How many processes work together now; 1 outside `together`."""
    if alone():
        return 1
    import torch.distributed

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def alone() -> bool:
    """Whether there is this process only: else it may not train outside `together`."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@contextmanager
def together() -> Iterator[None]:
    """Joins the processes that a launcher started; does nothing where there is only this one.

    Raises:
        TrainingError: The launcher asks for a way to divide the model that is not read here.
    """
    if alone():
        yield
        return
    _refuse_plugins()
    import torch
    import torch.distributed

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_LONGEST)
    yield  # after an error nothing waits for the others: the launcher ends them
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _refuse_plugins() -> None:
    """`accelerate launch` tells by the environment what its configuration asks for."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise TrainingError(
                f"accelerate's settings of {name} are not read",
                where="accelerate launch",
                fix='Set training.sharding = "fsdp" in the recipe, and launch without them (`accelerate launch '
                "--multi_gpu`, or torchrun).",
            )


def agree(decide: Callable[[], T]) -> T:
    """What the first process decides, in every process; the others wait for it.

    Args:
        decide: Called in the first process alone; gives a JSON value.
    """
    if count() == 1:
        return decide()
    import torch
    import torch.distributed

    text = bytearray(json.dumps(decide()).encode() if is_main() else b"")
    size = torch.tensor([len(text)])
    torch.distributed.broadcast(size, 0)
    data = torch.frombuffer(text, dtype=torch.uint8) if is_main() else torch.empty(int(size), dtype=torch.uint8)
    torch.distributed.broadcast(data, 0)
    agreed: Any = json.loads(data.numpy().tobytes())
    return agreed


def yes(decide: Callable[[], bool]) -> bool:
    """`agree` for a yes or no that is asked in every step: one number on its way."""
    if count() == 1:
        return decide()
    import torch
    import torch.distributed

    said = torch.tensor([1 if is_main() and decide() else 0], dtype=torch.uint8)
    torch.distributed.broadcast(said, 0)
    return bool(said)


def gather(own: T) -> list[T]:
    """What each process gives, in the order of their numbers, in every process.

    Args:
        own: What this process gives: anything that can be pickled.
    """
    if count() == 1:
        return [own]
    import torch.distributed

    given: list[Any] = [None] * count()
    torch.distributed.all_gather_object(given, own)
    return given


def part() -> slice:
    """Which of many things this process works off, where each is one process's: `things[part()]`."""
    return slice(number() if count() > 1 else 0, None, count())


def first_then_all(work: Callable[[], T]) -> T:
    """What `work` gives in each process; the first is done with it, and has written what the others read, before."""
    if not is_main():
        wait()
    made = work()
    if is_main():
        wait()
    return made


def wait() -> None:
    """Returns when every process has come here."""
    if count() > 1:
        import torch.distributed

        torch.distributed.barrier()
