"""Two processes do what one does: the same losses for the same rows a step, and one of them writes."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill import processes
from distill.data.sampling import LengthBucketSampler, ProcessBatches
from distill.recipe import Recipe

CODE = """
import sys, torch
torch.set_num_threads(1)
from distill.pipeline import run_stages
from distill.recipe import Recipe
run_stages(Recipe.load(sys.argv[1]), until="train")
"""


@pytest.fixture
def quiet_teacher(tmp_path, tiny_start):
    """A classifier without dropout: what is random would differ between one process and two."""
    torch.manual_seed(0)
    folder = tmp_path / "quiet-teacher"
    names = ["arrival", "exchange", "password"]
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_start,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(folder)
    return folder


def train(tmp_path, teacher, intents_folder, count, batch_size):
    """Facts of the stage and the student's weights, from `count` processes with `batch_size` rows each."""
    recipe = Recipe.parse(
        {
            "output": str(tmp_path / f"by-{count}"),
            "teacher": {"checkpoint": str(teacher)},
            "student": {"layers": 1},
            "data": {
                "train": str(intents_folder / "train.csv"),
                "validation": str(intents_folder / "validation.csv"),
                "max_length": 32,
            },
            "training": {
                "epochs": 1,
                "learning_rate": 1e-3,
                "batch_size": batch_size,
                "precision": "fp32",
                "baseline": False,
            },
        }
    )
    script, path = tmp_path / "run.py", tmp_path / f"by-{count}.toml"
    script.write_text(CODE)
    path.write_text(recipe.to_toml())
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, str(script), str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((tmp_path / f"by-{count}" / "work" / "state" / "train.json").read_text())["facts"]
    return facts, load_file(tmp_path / f"by-{count}" / "student" / "model.safetensors")


def test_two_processes_learn_what_one_learns(tmp_path, quiet_teacher, intents_folder):
    alone, weights = train(tmp_path, quiet_teacher, intents_folder, 1, 22)
    both, shared = train(tmp_path, quiet_teacher, intents_folder, 2, 11)
    losses = [[point["loss"] for point in facts["curve"] if "loss" in point] for facts in (alone, both)]
    assert len(losses[0]) >= 10
    assert max(losses[0]) - min(losses[0]) > 0.02  # were they all alike, equal curves would say nothing
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    for name, value in weights.items():
        torch.testing.assert_close(
            shared[name], value, rtol=0, atol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def launch(tmp_path, name, recipe):
    script, path = tmp_path / "run.py", tmp_path / f"{name}.toml"
    script.write_text(CODE)
    path.write_text(Recipe.parse({**recipe, "output": str(tmp_path / name)}).to_toml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script), str(path)],
        stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def test_two_processes_killed_and_resumed_end_with_the_same_bits(tmp_path, quiet_teacher, intents_folder):
    """Dropout is on: the random state of each process has to come back, and the rows that wait for their update."""
    teacher = AutoModelForSequenceClassification.from_pretrained(
        quiet_teacher, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    teacher.save_pretrained(quiet_teacher)
    train, validation = (str(intents_folder / f"{split}.csv") for split in ("train", "validation"))
    recipe = {
        "teacher": {"checkpoint": str(quiet_teacher)},
        "student": {"layers": 1},
        "data": {"train": train, "validation": validation, "max_length": 32},
        "training": {"epochs": 4, "learning_rate": 1e-3, "batch_size": 8, "checkpoint_seconds": 0.05},
    }
    recipe["training"]["baseline"] = False
    whole = launch(tmp_path, "whole", recipe)
    assert whole.wait(300) == 0, whole.stderr.read()[-3000:]
    killed = launch(tmp_path, "killed", recipe)
    folder = tmp_path / "killed"
    while killed.poll() is None and not list(folder.glob("work/train/checkpoint-1?/complete.json")):
        time.sleep(0.01)
    assert killed.poll() is None, killed.stderr.read()[-3000:]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    killed.stderr.close()
    for process in workers_of(tmp_path / "killed.toml"):
        os.kill(process, signal.SIGKILL)
    last = launch(tmp_path, "killed", recipe)
    assert last.wait(300) == 0, last.stderr.read()[-3000:]
    one, other = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    for process in (whole, last):
        process.stderr.close()


def workers_of(recipe):
    """Processes whose command line names this recipe: torchrun gives each worker a session of its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(recipe).encode() in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("rows", [1, 15, 16, 33])
def test_each_row_goes_to_one_process(rows, count):
    whole = LengthBucketSampler(range(1, rows + 1), 2 * count, seed=0)
    parts = [list(ProcessBatches(whole, number, count)) for number in range(count)]
    assert {len(part) for part in parts} == {len(whole)}
    assert sorted(row for part in parts for batch in part for row in batch) == list(range(rows))
    for sizes in zip(*[[len(batch) for batch in part] for part in parts], strict=True):
        assert all(first - second in (0, 1) for first, second in pairwise(sizes))


def test_one_process_agrees_with_itself():
    assert processes.count() == 1
    assert processes.is_main()
    assert processes.agree(lambda: {"a": [1, None]}) == {"a": [1, None]}
