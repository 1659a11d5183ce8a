"""FSDP2: each process keeps its part of weights, gradients and optimiser state, and gathers a layer when it runs.

PyTorch's `fully_shard` is called here, not by accelerate, which shards on GPUs alone. Checkpoints hold whole tensors,
as those of DDP do, so that any number of processes goes on from them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from distill import processes
from distill.objectives import Objective
from distill.training.trainer import DistillationModule, DistillationTrainer, share_buffers

FREE_BETWEEN = ("logits", "hidden")
"""Kinds of taps that stand between layers: a gradient that enters inside one would find its weights given back."""


def shard(model: nn.Module, device: torch.device, *, keep_layers: bool = False, keep_rest: bool = False) -> None:
    """Divides the weights of a model, layer by layer, over all processes; each must have the same model.

    Args:
        model: Changed in place and moved to `device`.
        device: That of this process.
        keep_layers: A layer's weights stay gathered from its forward to its backward pass.
        keep_rest: The same for the weights outside the layers.
    """
    model.to(device)
    for value in [*model.parameters(), *model.buffers()]:
        torch.distributed.broadcast(value.detach(), 0)
    mesh = init_device_mesh(device.type, (processes.count(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=not keep_layers)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep_rest)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The members of every list of modules that has weights, but for lists inside a member."""
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            yield from _layers(child)
            continue
        for member in child:
            if isinstance(member, (nn.ModuleList, nn.ModuleDict)):
                yield from _layers(member)
            elif next(member.parameters(), None) is not None:
                yield member


def sharded_copy(model: Any, device: torch.device) -> Any:
    """A model that answers only, divided over all processes; all must ask it together. `model` stays as it is."""
    divided = copy.deepcopy(model).requires_grad_(False)
    shard(divided, device)
    return divided


def _whole(value: Any) -> Any:
    """The same nest of dictionaries and lists with whole tensors; every process must ask."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, Mapping):
        return {name: _whole(item) for name, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _part(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `like` is divided and of its shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class ShardedTrainer(DistillationTrainer):
    """A `DistillationTrainer` whose trained module is divided over all processes.

    Student and objective as they were given stay whole: they are filled with the trained weights, in every process,
    whenever the student is measured or saved.

    Args:
        student: The model to train.
        objective: The losses; a projection may be the student's too.
        *args: As in `DistillationTrainer`; there is no table by rows and no writing on policy.
        **more: The same.
    """

    def __init__(self, student: Any, objective: Objective, *args: Any, **more: Any) -> None:
        self._given = {"student": student, "objective": objective}
        divided = copy.deepcopy(self._given)
        super().__init__(divided["student"], divided["objective"], *args, **more)
        self._leave_as_it_is()

    def _place(self, module: DistillationModule, args: TrainingArguments) -> DistillationModule:
        inside = any(tap.split(".")[0] not in FREE_BETWEEN for tap in module.objective.student_taps)
        shard(module, args.device, keep_layers=inside, keep_rest=True)
        share_buffers(module)
        return module

    @property
    def student(self) -> Any:
        """The student as it is now, whole; every process must ask."""
        state = _whole(self.model.state_dict())
        for part, module in self._given.items():
            own = {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}
            module.to(self.args.device).load_state_dict(own)
        return self._given["student"]

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """It is there already, in parts."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return _whole(super()._get_grad_norm(model, grad_norm))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in any Trainer, whole; every process must ask."""
        state = _whole(self.model.state_dict())
        if self.args.should_save:
            self._save(output_dir, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        found = safetensors.torch.load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        state = self.model.state_dict()
        self.model.load_state_dict({name: _part(value, state[name]) for name, value in found.items()})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = _whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _own_part(self, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, values in state["state"].items():
            state["state"][number] = {name: _part(value, parameters[number]) for name, value in values.items()}
        return state
