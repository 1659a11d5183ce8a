"""Killed anywhere, the same command goes on where it was and ends with the same weights, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.files import sha256_file
from distill.recipe import Recipe

CODE = """
import sys, torch
torch.set_num_threads(1)
from distill.pipeline import run_stages
from distill.recipe import Recipe
run_stages(Recipe.load(sys.argv[1]), until="train")
"""


@pytest.fixture
def recipe(tmp_path, intents_folder, tiny_start):
    def make(name: str) -> Path:
        values = {
            "output": str(tmp_path / name),
            "teacher": {"start": str(tiny_start), "finetune": {"epochs": 6, "learning_rate": 3e-3}},
            "student": {"layers": 1},
            "data": {
                "train": str(intents_folder / "train.csv"),
                "validation": str(intents_folder / "validation.csv"),
                "max_length": 32,
            },
            "training": {"epochs": 6, "learning_rate": 3e-3, "checkpoint_seconds": 0.05, "gradient_accumulation": 2},
        }
        path = tmp_path / f"{name}.toml"
        path.write_text(Recipe.parse(values).to_toml())
        return path

    return make


def run(path: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CODE, str(path)], stderr=subprocess.PIPE, text=True)


def kill_when(path: Path, appears: str, folder: Path) -> None:
    """Starts the run and sends SIGKILL as soon as a file matching `appears` is there."""
    process = run(path)
    while process.poll() is None and not list(folder.glob(appears)):
        time.sleep(0.005)
    assert process.poll() is None, f"it ended before {appears} was seen: {process.communicate()[1]}"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def weights(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name / "model.safetensors") for name in ("teacher", "student", "baseline")}


def test_four_kills_change_no_bit(recipe, tmp_path):
    undisturbed, disturbed = recipe("undisturbed"), recipe("disturbed")
    whole = run(undisturbed)
    error = whole.communicate()[1]
    assert whole.returncode == 0, error
    folder = tmp_path / "disturbed"
    for moment in (
        "work/finetune/checkpoint-2?/complete.json",  # between checkpoints of the teacher
        "work/finetune/checkpoint-4*/model.safetensors",  # inside a checkpoint that is being written
        "work/train/checkpoint-1?/complete.json",
        "work/baseline/best*/model.safetensors",  # while the best state is being replaced
    ):
        kill_when(disturbed, moment, folder)
    last = run(disturbed)
    error = last.communicate()[1]
    assert last.returncode == 0, error
    assert weights(folder) == weights(tmp_path / "undisturbed")
    assert not list(folder.glob("work/*/checkpoint-*"))
