"""Distillation speed and accuracy of our training beside TextBrewer and a plain loop, on the same work.

    python benchmarks/training.py --teacher TEACHER --data ../shared/data/sst2 --seeds 0

A 4-layer student learns from the logits and hidden states of a fine-tuned 6-layer teacher on SST-2: batches of 32, 3
epochs. Every engine gets the same rows, token ids, teacher, starting student, objective, rate, warm-up and clipping.
Speed is taken in blocks: every engine waits in a process of its own, and they take turns, a few hundred rows each; a
ratio is the median over rounds. Ours labels once and then trains, so that its samples a second over the whole run are
epochs / (1 / labelling + epochs / training); the others ask the teacher in every step. `--seeds` also runs every engine
to its end and compares accuracy; CPU seconds are told besides wall seconds, for machines that are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__)
EPOCHS = 3
BATCH = 32
TEXTBREWER = "0.2.1"
BLOCKS = ("label", "distill", "textbrewer", "plain")
FULL = ("distill", "textbrewer", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a fine-tuned 6-layer teacher")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/training"))
    parser.add_argument("--rounds", type=int, default=5, help="0 times nothing")
    parser.add_argument("--steps", type=int, default=8, help="steps of a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="also whole runs with these")
    parser.add_argument("--engines", nargs="+", default=list(FULL), choices=FULL)
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="key=value for our recipe")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    fetch_textbrewer(options.output / "peers")
    results: dict[str, Any] = {}
    if options.rounds:
        results["speed"] = compare(options)
        print(speed_table(results["speed"]), flush=True)
    for seed in options.seeds:
        for engine in options.engines:
            facts = json.loads(start(options, engine, seed, whole=True).communicate()[0].splitlines()[-1])
            results.setdefault("runs", []).append(facts)
            print(json.dumps(facts), flush=True)
    (options.output / "summary.json").write_text(json.dumps(results, indent=1))


def fetch_textbrewer(folder: Path) -> None:
    """TextBrewer without its dependencies: it runs on the torch that is installed here, unchanged."""
    if not (folder / "textbrewer").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, f"textbrewer=={TEXTBREWER}"], check=True)


def start(options: argparse.Namespace, engine: str, seed: int, *, whole: bool) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE), "--worker", engine, "--seed", str(seed), "--teacher", str(options.teacher)]
    command += ["--data", str(options.data), "--output", str(options.output), "--threads", str(options.threads)]
    command += ["--steps", str(options.steps), *(["--whole"] if whole else []), "--set", *options.overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def compare(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Blocks of every engine, in turns; each engine's first block, which warms it up, does not count."""
    names = ["label", *options.engines]
    workers = {name: start(options, name, 0, whole=False) for name in names}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    try:
        for number in range(options.rounds + 1):
            for name in names if number % 2 else reversed(names):
                worker = workers[name]
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
                block = json.loads(worker.stdout.readline())
                if number:
                    found[name].append(block)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return found


def speed_table(blocks: Mapping[str, list[dict[str, float]]]) -> str:
    """Samples a second, by the clock and by CPU time, and times as fast as the others, as Markdown."""
    lines = ["| engine | samples/s | samples per CPU second | ours is faster by |", "|---|---:|---:|---:|"]
    rates = {
        kind: {name: [block["rows"] / block[kind] for block in found] for name, found in blocks.items()}
        for kind in ("seconds", "cpu")
    }
    ours = {
        kind: [EPOCHS / (1 / label + EPOCHS / train) for label, train in zip(by["label"], by["distill"], strict=True)]
        for kind, by in rates.items()
    }
    rows = {
        "distill, labelling": ("label", None),
        "distill, training": ("distill", None),
        "distill, whole run": ("", None),
    }
    for title, (name, _) in rows.items():
        wall, cpu = (statistics.median(rates[kind][name] if name else ours[kind]) for kind in ("seconds", "cpu"))
        lines.append(f"| {title} | {wall:.1f} | {cpu:.1f} | |")
    for name in blocks:
        if name in ("label", "distill"):
            continue
        wall, cpu = (statistics.median(rates[kind][name]) for kind in ("seconds", "cpu"))
        times = [
            statistics.median(mine / theirs for mine, theirs in zip(ours[kind], rates[kind][name], strict=True))
            for kind in ("seconds", "cpu")
        ]
        lines.append(f"| {name} | {wall:.1f} | {cpu:.1f} | {times[0]:.2f}x ({times[1]:.2f}x by CPU time) |")
    return "\n".join(lines)


class Gate:
    """Lets `steps` batches through for each line on standard input, and answers how long they took."""

    def __init__(self, steps: int) -> None:
        self.steps, self.passed, self.rows = steps, 0, 0
        self.began = (0.0, 0.0)

    def knock(self, rows: int) -> None:
        """Called before every batch."""
        if self.passed % self.steps == 0:
            if self.passed:
                seconds, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
                print(json.dumps({"rows": self.rows, "seconds": seconds, "cpu": cpu}), flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.rows, self.began = 0, (time.perf_counter(), time.process_time())
        self.passed += 1
        self.rows += rows


class Gated:
    """A teacher that waits at the gate: all else is our own training."""

    def __init__(self, teacher: Any, gate: Gate) -> None:
        self.teacher, self.gate = teacher, gate
        self.taps = teacher.taps

    def features(self, batch: Mapping[str, Any]) -> Any:
        """What the teacher says."""
        self.gate.knock(len(batch["input_ids"]))
        return self.teacher.features(batch)


def recipe_of(options: argparse.Namespace, name: str) -> Any:
    from distill import Recipe

    recipe = Recipe.parse(
        {
            "name": "training",
            "output": str((options.output / name).resolve()),
            "seed": options.seed,
            "teacher": {"checkpoint": str(options.teacher.resolve())},
            "data": {
                "train": str((options.data / "train.csv").resolve()),
                "test": str((options.data / "dev.csv").resolve()),
                "max_length": 64,
            },
            "objective": {"preset": "logits+hidden"},
            "training": {"epochs": EPOCHS, "batch_size": BATCH, "baseline": False},
        }
    )
    if not options.overrides:
        return recipe
    path = options.output / f"{name}-{options.seed}.toml"
    path.write_text(recipe.to_toml())
    return Recipe.load(path, options.overrides)


def work(options: argparse.Namespace) -> None:
    """One engine in this process."""
    import torch

    from distill.ledger import Ledger
    from distill.progress import SILENT
    from distill.run import Run
    from distill.training.fit import flush_denormals

    torch.set_num_threads(options.threads)
    kind = "whole" if options.whole else "blocks"
    recipe = recipe_of(options, f"{kind}-{options.worker}-{options.seed}")
    ours = options.worker in ("label", "distill")
    if ours and options.whole:
        whole_run(recipe)
        return
    run = Run(recipe, Ledger(recipe.folder), SILENT)
    if ours:
        blocks(run, options)
        return
    flush_denormals()
    torch.manual_seed(options.seed)
    engine = {"textbrewer": textbrewer, "plain": plain}[options.worker]
    gate = None if options.whole else Gate(options.steps)
    if options.worker == "textbrewer":
        sys.path.insert(0, str((options.output / "peers").resolve()))
    began, cpu = time.perf_counter(), time.process_time()
    student = engine(run, gate, options)
    tell(run, student, options, time.perf_counter() - began, time.process_time() - cpu)


def blocks(run: Any, options: argparse.Namespace) -> None:
    """Our labelling, or our training from a cache made beforehand, a block at a time."""
    from distill.cache.cached_teacher import build_cache, cache_key
    from distill.teacher import LiveTeacher, use_bf16
    from distill.training.fit import fit, tensor_collate

    objective, _ = run.objective()
    gate = Gate(options.steps // 2)  # batches of 64
    if options.worker == "label":
        live = Gated(LiveTeacher(run.teacher.model, objective.teacher_taps, bf16=use_bf16("auto")), gate)
        collate = tensor_collate(run.task, run.teacher.padding)
        for number in range(1000):
            build_cache(
                live, run.transfer, collate, run.work / f"cache-{number}", key=cache_key(**run.cache_inputs(objective))
            )
        return
    cache = run.cache(objective)
    gate.steps = options.steps
    checkpoint = run.checkpoint_of(run.new_student())
    fit(
        checkpoint.model, objective, Gated(cache, gate), run.transfer_set(checkpoint), run.task, checkpoint.padding,
        run.recipe.training.model_copy(update={"epochs": 1000.0}), run.work / f"train-{os.getpid()}",
        lambda model: {run.task.metric: 0.0}, save=lambda folder: None, logs=run.folder / "logs",
    )  # fmt: skip


def whole_run(recipe: Any) -> None:
    """Our own stages from the data to the trained student, as the command line runs them."""
    from distill.ledger import Ledger
    from distill.pipeline import run_stages
    from distill.progress import SILENT
    from distill.run import Run
    from distill.teacher import load_checkpoint

    began, cpu = time.perf_counter(), time.process_time()
    run_stages(recipe, until="label")
    labelled = time.process_time() - cpu
    run_stages(recipe, until="train")
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    run = Run(recipe, Ledger(recipe.folder), SILENT)
    student = load_checkpoint(str(recipe.folder / "student"), run.task)
    options = argparse.Namespace(worker="distill", seed=recipe.seed)
    tell(run, student.model, options, seconds, spent, cpu_until_labelled=labelled)


def tell(run: Any, student: Any, options: Any, seconds: float, cpu: float, **more: float) -> None:
    """What a whole run came to, on one line; dev accuracy in fp32 by the code that measures every model."""
    from distill.evaluation import TorchPredictor, evaluate

    encoded = run.encode(run.teacher, run.splits.test)
    metrics = evaluate(TorchPredictor(student, run.task), encoded, run.task, run.teacher.padding).metrics
    samples = EPOCHS * len(run.transfer)
    facts = {
        "engine": options.worker,
        "seed": options.seed,
        "accuracy": metrics[run.task.metric],
        "samples": samples,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "samples_per_cpu_second": round(samples / cpu, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **{name: round(value, 1) for name, value in more.items()},
    }
    print(json.dumps(facts), flush=True)


def setting(run: Any, gate: Gate | None, options: argparse.Namespace) -> tuple[Any, Any, Any, Callable[[Any], Any]]:
    """Teacher, starting student, batches in random order padded to their longest row, and AdamW with its schedule."""
    import torch
    import transformers

    from distill.training.fit import tensor_collate

    student = run.new_student().model
    collate = tensor_collate(run.task, run.teacher.padding)
    names = ("input_ids", "attention_mask", "token_type_ids")

    def gather(rows: Any) -> dict[str, Any]:
        return {name: value for name, value in collate(rows).items() if name in names}

    generator = torch.Generator().manual_seed(options.seed)
    loader: Any = torch.utils.data.DataLoader(
        run.transfer, batch_size=BATCH, shuffle=True, collate_fn=gather, generator=generator
    )

    class Loader:
        def __len__(self) -> int:
            return len(loader)

        def __iter__(self) -> Iterator[dict[str, Any]]:
            for batch in loader:
                if gate is not None:
                    gate.knock(len(batch["input_ids"]))
                yield batch

    total = EPOCHS * len(loader)

    def optimise(model: Any) -> tuple[Any, Any]:
        settings = run.recipe.training
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        warmup = round(settings.warmup * total)
        return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)

    return run.teacher.model.eval(), student, Loader(), optimise


def textbrewer(run: Any, gate: Gate | None, options: argparse.Namespace) -> Any:
    """TextBrewer's GeneralDistiller with the same objective: its losses, its loop, not a line of it changed."""
    import textbrewer as tb

    teacher, student, loader, optimise = setting(run, gate, options)
    for model in (teacher, student):
        model.config.output_hidden_states = True
    layers = run.student.layer_map
    temperature = 4.0
    matches = [
        {"layer_T": theirs, "layer_S": mine, "feature": "hidden", "loss": "hidden_mse", "weight": 1 / len(layers)}
        for mine, theirs in layers
    ]
    distil = tb.DistillationConfig(
        temperature=temperature, kd_loss_weight=temperature**2, hard_label_weight=0, intermediate_matches=matches
    )
    folder = str(options.output / "textbrewer")
    train = tb.TrainingConfig(output_dir=folder, log_dir=None, device="cpu", ckpt_frequency=1)

    def adapt(batch: Any, outputs: Any) -> dict[str, Any]:
        return {"logits": outputs.logits, "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}

    optimizer, schedule = optimise(student)
    distiller = tb.GeneralDistiller(train, distil, teacher, student, adapt, adapt)
    epochs = EPOCHS if gate is None else 1000
    with distiller:
        distiller.train(optimizer, loader, epochs, scheduler=schedule, max_grad_norm=1.0, callback=None)
    return student


def plain(run: Any, gate: Gate | None, options: argparse.Namespace) -> Any:
    """What one writes by hand with transformers: the teacher asked in every step, fp32, AdamW."""
    import torch
    from torch.nn import functional as F

    teacher, student, loader, optimise = setting(run, gate, options)
    layers = run.student.layer_map
    temperature = 4.0
    optimizer, schedule = optimise(student)
    student.train()
    for _ in range(EPOCHS if gate is None else 1000):
        for batch in loader:
            with torch.no_grad():
                said = teacher(**batch, output_hidden_states=True)
            mine = student(**batch, output_hidden_states=True)
            wanted, given = said.logits / temperature, mine.logits / temperature
            loss = temperature**2 * F.kl_div(
                given.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            keep = batch["attention_mask"].bool()
            for low, high in layers:
                loss = loss + F.mse_loss(mine.hidden_states[low][keep], said.hidden_states[high][keep]) / len(layers)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return student


if __name__ == "__main__":
    main()
