"""Two processes do what one does: the same losses for the same rows a step, and one of them writes."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill import processes
from distill.recipe import Recipe
from distill.sampling import LengthBucketSampler, ProcessBatches

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
