r"""What distilling on 1,000 million sentences costs with 8 to 512 GPUs: hours, bytes, network, and what breaks first.

    python benchmarks/scaling.py benchmarks/results/2026-11-23-million-epyc-2-cores.json \
        --memory benchmarks/results/2026-11-28-million-epyc-avx2-2-cores.json

Bytes and processor seconds of a sentence are measured (`million.py`); what GPUs and networks do is assumed, and said.
The work is taken to be divided evenly over all processes, as labelling and training are; cleaning and encoding are the
first process's alone, and the last table says how far one gets.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOUR = 3600.0
SAMPLER = 32
"""Bytes of a row while batches are drawn: its length, its place in the order, in its window and in its batch, int64."""


@dataclass(frozen=True)
class Shape:
    """An encoder: what it computes and sends."""

    layers: int
    width: int
    vocabulary: int = 30_522

    def forward(self, length: float) -> float:
        """FLOPs a token: 24 width^2 a layer for products (feed-forward of 4 widths), 4 length * width for attention."""
        return self.layers * (24 * self.width**2 + 4 * length * self.width)

    @property
    def parameters(self) -> int:
        """Weights, embeddings included."""
        return self.layers * 12 * self.width**2 + self.vocabulary * self.width


@dataclass(frozen=True)
class Cluster:
    """What is assumed of the machines."""

    flops: float = 989e12  # H100 SXM, dense bf16
    label_mfu: float = 0.40
    train_mfu: float = 0.35
    network: float = 50e9  # bytes/s a GPU: one 400 Gb/s link each
    disk: float = 2e9  # bytes/s a GPU: local NVMe, shared by 8
    cores: float = 12.0  # processor cores a GPU
    batch: int = 1024  # sentences a GPU and step
    overlap: float = 0.5  # share of the gradients' exchange that hides behind the backward pass
    memory: float = 200e9  # bytes of main memory a GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, help="JSON of million.py")
    parser.add_argument("--memory", type=Path, help="JSON of another run, whose memory is taken: it went further")
    parser.add_argument("--sentences", type=float, default=1e9)
    parser.add_argument("--epochs", type=float, default=1.0)
    options = parser.parse_args()
    measured = read(json.loads(options.measured.read_text()))
    if options.memory:
        measured["memory"] = read(json.loads(options.memory.read_text()))["memory"]
    teacher, student, cluster = Shape(12, 768), Shape(6, 768), Cluster()
    print(assumptions(measured, teacher, student, cluster))
    print(costs(measured, teacher, student, cluster, options.sentences, options.epochs))
    print(keeping(measured, teacher, cluster, options.sentences))
    print(limits(measured, cluster))


def read(facts: dict[str, Any]) -> dict[str, float]:
    """Slopes a sentence of what was measured."""
    slopes, whole = facts["slopes"], facts["sizes"][-1]
    labelled = next(row for row in reversed(facts["sizes"]) if row["disk_bytes"]["cache"])
    return {
        "tokens": whole["tokens"] / whole["sentences"],
        **{stage: slopes[stage]["microseconds_a_sentence"] / 1e6 for stage in ("clean", "encode")},
        "memory": max(0.0, *(stage["peak_bytes_a_sentence"] for stage in slopes.values())),
        "text": whole["disk_bytes"]["text"] / whole["sentences"],
        "ids": whole["disk_bytes"]["encoded"] / whole["sentences"],
        "logits": labelled["disk_bytes"]["cache"] / labelled["sentences"],
    }


def assumptions(measured: dict[str, float], teacher: Shape, student: Shape, cluster: Cluster) -> str:
    """A line each."""
    return "\n".join(
        [
            f"measured: {measured['tokens']:.1f} tokens a sentence; {1e6 * measured['clean']:.0f} us to clean and "
            f"{1e6 * measured['encode']:.0f} us to encode on one core; on disk {measured['text']:.0f} bytes of text, "
            f"{measured['ids']:.0f} of token ids, {measured['logits']:.1f} of cached logits (2 classes); "
            f"{measured['memory']:.0f} bytes of memory a sentence and process",
            f"assumed: teacher {teacher.layers} x {teacher.width}, student {student.layers} x {student.width} "
            f"({student.parameters / 1e6:.0f} M weights); {cluster.flops / 1e12:.0f} TFLOP/s, MFU "
            f"{cluster.label_mfu:.0%} labelling and {cluster.train_mfu:.0%} training; a GPU has {cluster.cores:.0f} "
            f"cores, {cluster.memory / 1e9:.0f} GB of main memory, {cluster.network / 1e9:.0f} GB/s of network, "
            f"{cluster.disk / 1e9:.0f} GB/s of disk; {cluster.batch} sentences a GPU and step, gradients in fp32, "
            f"{cluster.overlap:.0%} of their exchange behind the backward pass",
            "",
        ]
    )


def costs(
    measured: dict[str, float], teacher: Shape, student: Shape, cluster: Cluster, sentences: float, epochs: float
) -> str:
    """A row for each number of GPUs: hours by stage, and the network of a step."""
    tokens = measured["tokens"]
    lines = [
        "| GPUs | clean + encode h | label h | train h | of it network h | all h | GPU-hours | batch of all GPUs | "
        "a GPU sends |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for gpus in (8, 16, 32, 64, 128, 256, 512):
        prepare = sentences * (measured["clean"] + measured["encode"]) / (gpus * cluster.cores)
        label = sentences * tokens * teacher.forward(tokens) / (gpus * cluster.flops * cluster.label_mfu)
        compute, exchange = step(measured, student, cluster, gpus)
        steps = epochs * sentences / (gpus * cluster.batch)
        train = steps * (compute + exchange)
        hours = [prepare / HOUR, label / HOUR, train / HOUR, steps * exchange / HOUR]
        total = sum(hours[:3])
        cells = [f"{gpus}", *(f"{value:.3f}" for value in hours), f"{total:.3f}", f"{total * gpus:.1f}"]
        cells += [f"{gpus * cluster.batch:,}", f"{steps * sent(student, gpus) / 1e12:.2f} TB"]
        lines.append(f"| {' | '.join(cells)} |")
    one = sent(student, 512)
    lines += [
        "",
        f"a step sends {one / 1e6:,.0f} MB a GPU with DDP, {1.5 * one / 1e6:,.0f} MB with FSDP: weights are gathered "
        "forward and backward, gradients divided once",
    ]
    return "\n".join([*lines, ""])


def sent(student: Shape, gpus: int) -> float:
    """Bytes that a GPU sends in a step: a ring's all-reduce of the gradients, in fp32."""
    return 2 * 4 * student.parameters * (gpus - 1) / gpus


def step(
    measured: dict[str, float], student: Shape, cluster: Cluster, gpus: int, batch: int | None = None
) -> tuple[float, float]:
    """Seconds of a training step: forward and backward (3 times the forward pass), and the exchange that is left."""
    tokens = (batch or cluster.batch) * measured["tokens"]
    compute = 3 * tokens * student.forward(measured["tokens"]) / (cluster.flops * cluster.train_mfu)
    return compute, (1 - cluster.overlap) * sent(student, gpus) / cluster.network


def keeping(measured: dict[str, float], teacher: Shape, cluster: Cluster, sentences: float) -> str:
    """What is written for each way of keeping the teacher's answers, and the reading that keeps up with a step."""
    tokens = measured["tokens"]
    vector = tokens * teacher.width
    ways = {
        "logits of 2 classes": measured["logits"],
        "and 3 hidden states, int8": measured["logits"] + 3 * (vector + 2 * tokens),
        "and 3 hidden states, fp16": measured["logits"] + 3 * 2 * vector,
        "logits of 50,257 tokens, 64 likeliest": tokens * (64 * 2 + 65 * 2),
        "logits of 50,257 tokens, all": tokens * 50_257 * 4,
    }
    compute, _ = step(measured, Shape(6, 768), cluster, 8)
    again = cluster.batch * tokens * teacher.forward(tokens) / (cluster.flops * cluster.label_mfu)
    lines = [
        "| kept | bytes a sentence | of the whole set | GB/s a GPU to keep up with training |",
        "|---|---:|---:|---:|",
    ]
    for name, size in ways.items():
        whole = size * sentences / 1e12
        lines.append(f"| {name} | {size:,.0f} | {whole:,.2f} TB | {size * cluster.batch / compute / 1e9:.2f} |")
    lines.append("")
    lines.append(f"a teacher that runs along adds {again / compute:.0%} to each step's computation and keeps nothing")
    return "\n".join([*lines, ""])


def limits(measured: dict[str, float], cluster: Cluster) -> str:
    """How many sentences each part carries in one process, the least first."""
    day = 24 * HOUR
    found = {
        "cleaning and encoding by one process: a day": day / (measured["clean"] + measured["encode"]),
        "memory maps of one cache, a shard of 1,024 sentences each (vm.max_map_count = 65,530)": 65_530 * 1024,
        f"memory of one process: {cluster.memory / 1e9:.0f} GB": cluster.memory / (measured["memory"] + SAMPLER),
    }
    lines = ["| what ends first in one process | sentences |", "|---|---:|"]
    lines += [
        f"| {name} | {count / 1e6:,.0f} million |" for name, count in sorted(found.items(), key=lambda item: item[1])
    ]
    small, wide = (step(measured, Shape(6, 768), cluster, 512, batch) for batch in (32, cluster.batch))
    lines.append("")
    lines.append(
        f"at 512 GPUs the rest of the gradients' exchange takes {small[1] / small[0]:.1f} times a step's computation "
        f"at 32 sentences a GPU, {wide[1] / wide[0]:.2f} times with {cluster.batch}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
