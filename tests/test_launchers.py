"""Both launchers, through the command line, as docs/training.md gives them."""

import json
import os
import subprocess
import sys

import pytest

from distill.recipe import Recipe

TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.mark.parametrize(
    "launcher, command, stages",
    [
        (TORCHRUN, "evaluate", ["teacher", "label", "train", "evaluate"]),
        (ACCELERATE, "train", ["label", "train"]),
    ],
    ids=["torchrun", "accelerate"],
)
def test_it_starts_two_processes_that_work_together(
    tmp_path, tiny_start, quiet_teacher, intents_folder, launcher, command, stages
):
    names = ("train", "validation", "test")
    data = {name: str(intents_folder / f"{name}.csv") for name in names}
    start = {"start": str(tiny_start), "finetune": {"epochs": 1, "batch_size": 40}}
    recipe = {
        "output": str(tmp_path / "run"),
        "teacher": start if "teacher" in stages else {"checkpoint": str(quiet_teacher)},
        "student": {"layers": 1},
        "data": {**data, "max_length": 32},
        "training": {"epochs": 1, "batch_size": 40, "baseline": False},
    }
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe.parse(recipe).to_toml())
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "distill.cli", command, str(path)],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = len((intents_folder / "train.csv").read_text().splitlines()) - 1
    for stage in stages:
        facts = json.loads((tmp_path / "run" / "work" / "state" / f"{stage}.json").read_text())["facts"]
        if "curve" in facts:
            assert facts["curve"][-1]["step"] == -(-rows // 80)
        if stage == "evaluate":
            assert {"teacher", "student"} <= facts["models"].keys()
