"""The engines that `training.py` sets beside ours: TextBrewer, torchdistill and a loop by hand.

All of them get the same teacher, starting student, batches, AdamW, schedule and clipping, and ask the teacher in every
step, as their documentation has it. On a GPU they run under the same bf16 autocast as ours, on a processor with
`--peers-bf16`.

textbrewer    0.2.1: `GeneralDistiller`, `kd_loss_weight` at temperature 4, `hidden_mse` matches with its mask.
torchdistill  1.1.5: `DistillationBox` and its loop's two calls; `KDLoss` (alpha 0, so its soft part; factor 16) on the
              classifier's output and `MSELoss` in a `SimpleLossWrapper` on the outputs of layers, all by its own
              forward hooks, in a `WeightedSumLoss`. That MSELoss averages over padding as well, which its classes
              cannot leave out. It imports torchvision for image models that no text needs: where that is not installed,
              empty names stand for the four classes.
plain         What one writes by hand with transformers, fp32 on a processor.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSIONS = {"textbrewer": "0.2.1", "torchdistill": "1.1.5"}
TEMPERATURE = 4.0


def fetch(folder: Path) -> None:
    """The peers without their dependencies: they run on the torch that is installed here, unchanged."""
    for name, version in VERSIONS.items():
        if not (folder / name).is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, f"{name}=={version}"], check=True)


@dataclass
class Setting:
    """What every peer works with.

    Attributes:
        teacher: In evaluation mode, on the device.
        student: The starting student, on the device.
        batches: Length is that of an epoch; in random order, padded to their longest row.
        optimise: From a model to AdamW and its linear schedule.
        layers: (student, teacher) layers, from 1.
        epochs: How many times to go through the batches.
        device: Where the models are.
    """

    teacher: Any
    student: Any
    batches: Any
    optimise: Callable[[Any], tuple[Any, Any]]
    layers: list[tuple[int, int]]
    epochs: int
    device: Any


def setting(run: Any, gate: Any, options: argparse.Namespace, epochs: int) -> Setting:
    """Teacher, starting student, batches and AdamW; a gate lets batches through one by one."""
    import torch
    import transformers

    from distill.training.fit import tensor_collate

    device = torch.device(options.device)
    student = run.new_student().model.to(device)
    collate = tensor_collate(run.task, run.teacher.padding)
    names = ("input_ids", "attention_mask", "token_type_ids")

    def gather(rows: Any) -> dict[str, Any]:
        return {name: value for name, value in collate(rows).items() if name in names}

    generator = torch.Generator().manual_seed(options.seed)
    loader: Any = torch.utils.data.DataLoader(
        run.transfer, batch_size=options.batch, shuffle=True, collate_fn=gather, generator=generator,
        pin_memory=device.type == "cuda",
    )  # fmt: skip

    class Batches:
        def __len__(self) -> int:
            return len(loader)

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for batch in loader:
                if gate is not None:
                    gate.knock(batch["attention_mask"])
                yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    total = epochs * len(loader)

    def optimise(model: Any) -> tuple[Any, Any]:
        settings = run.recipe.training
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        warmup = round(settings.warmup * total)
        return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)

    turns = epochs if gate is None else 1000
    teacher = run.teacher.model.eval().to(device)
    return Setting(teacher, student, Batches(), optimise, run.student.layer_map, turns, device)


def textbrewer(work: Setting, options: argparse.Namespace) -> Any:
    """TextBrewer's GeneralDistiller with the same objective: its losses, its loop, not a line of it changed."""
    import textbrewer as tb

    for model in (work.teacher, work.student):
        model.config.output_hidden_states = True
    matches = [
        {"layer_T": theirs, "layer_S": mine, "feature": "hidden", "loss": "hidden_mse", "weight": 1 / len(work.layers)}
        for mine, theirs in work.layers
    ]
    distil = tb.DistillationConfig(
        temperature=TEMPERATURE, kd_loss_weight=TEMPERATURE**2, hard_label_weight=0, intermediate_matches=matches
    )
    folder = str(options.output / "textbrewer")
    train = tb.TrainingConfig(output_dir=folder, log_dir=None, device=work.device, ckpt_frequency=1)

    def adapt(batch: Any, outputs: Any) -> dict[str, Any]:
        return {"logits": outputs.logits, "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}

    optimizer, schedule = work.optimise(work.student)
    distiller = tb.GeneralDistiller(train, distil, work.teacher, work.student, adapt, adapt)
    with distiller:
        distiller.train(optimizer, work.batches, work.epochs, scheduler=schedule, max_grad_norm=1.0, callback=None)
    return work.student


def torchdistill(work: Setting, options: argparse.Namespace) -> Any:
    """Torchdistill's box, losses and hooks; the loop is the one of its text classification example."""
    _stand_in_for_torchvision()
    from torchdistill.core.distillation import get_distillation_box

    stem = work.student.base_model_prefix

    def tap(layer: int) -> str:
        return f"{stem}.encoder.layer.{layer - 1}" if layer else f"{stem}.embeddings"

    box = get_distillation_box(
        work.teacher, work.student, {}, _torchdistill_config(work, tap), work.device, None, False, 1.0
    )
    box.train_data_loader = work.batches
    box.optimizer, box.lr_scheduler = work.optimise(work.student)
    box.scheduling_step = 1
    for epoch in range(work.epochs):
        box.pre_epoch_process(epoch=epoch)
        for batch in box.train_data_loader:
            loss = box.forward_process(batch, targets=None, supp_dict=None)
            box.post_forward_process(loss=loss)
        box.post_epoch_process()
    return work.student


def _torchdistill_config(work: Setting, tap: Callable[[int], str]) -> dict[str, Any]:
    """What one writes for torchdistill in YAML."""

    def model(side: int) -> dict[str, Any]:
        outputs = ["classifier", *(tap(pair[side]) for pair in work.layers)]
        return {
            "forward_proc": "forward_batch_only_as_kwargs",
            "forward_hook": {"input": [], "output": outputs},
            "requires_grad": side == 0,
        }

    said = {f"{whose}_module_{what}": where for whose in ("student", "teacher")
            for what, where in (("path", "classifier"), ("io", "output"))}  # fmt: skip
    soft = {"key": "KDLoss", "kwargs": {**said, "temperature": TEMPERATURE, "alpha": 0.0, "reduction": "batchmean"}}
    terms: dict[str, Any] = {"soft": {"criterion": soft, "weight": TEMPERATURE**2}}
    for mine, theirs in work.layers:
        ends = {
            "input": {"is_from_teacher": False, "module_path": tap(mine), "io": "output"},
            "target": {"is_from_teacher": True, "module_path": tap(theirs), "io": "output"},
        }
        terms[f"hidden-{mine}"] = {
            "criterion": {"key": "MSELoss", "kwargs": {"reduction": "mean"}},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": ends},
            "weight": 1 / len(work.layers),
        }
    return {
        "num_epochs": work.epochs,
        "student": model(0),
        "teacher": model(1),
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.0}, "max_grad_norm": 1.0},  # the shared AdamW takes its place
    }


def _stand_in_for_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: one that was built for another torch
        classes = {"models.resnet": ("BasicBlock", "conv1x1"), "models.densenet": ("_DenseBlock", "_Transition")}
        for name in ("", "models", "models.resnet", "models.densenet", "datasets", "transforms"):
            part = types.ModuleType(f"torchvision.{name}".rstrip("."))
            for each in classes.get(name, ()):
                setattr(part, each, type(each, (), {}))
            sys.modules[part.__name__] = part
            if name:
                above, _, last = part.__name__.rpartition(".")
                setattr(sys.modules[above], last, part)


def plain(work: Setting, options: argparse.Namespace) -> Any:
    """What one writes by hand with transformers: the teacher asked in every step, AdamW."""
    import torch
    from torch.nn import functional as F

    optimizer, schedule = work.optimise(work.student)
    work.student.train()
    for batch in itertools.chain.from_iterable(work.batches for _ in range(work.epochs)):
        with torch.no_grad():
            said = work.teacher(**batch, output_hidden_states=True)
        mine = work.student(**batch, output_hidden_states=True)
        wanted, given = said.logits / TEMPERATURE, mine.logits / TEMPERATURE
        loss = TEMPERATURE**2 * F.kl_div(
            given.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        keep = batch["attention_mask"].bool()
        for low, high in work.layers:
            here, there = mine.hidden_states[low][keep], said.hidden_states[high][keep]
            loss = loss + F.mse_loss(here, there) / len(work.layers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(work.student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return work.student


PEERS: dict[str, Callable[[Setting, argparse.Namespace], Any]] = {
    "textbrewer": textbrewer,
    "torchdistill": torchdistill,
    "plain": plain,
}
