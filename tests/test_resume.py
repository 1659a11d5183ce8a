"""Killed anywhere, the same command goes on where it was and ends with the same weights, bit for bit."""

from pathlib import Path

import pytest

from distill.files import sha256_file


@pytest.fixture
def recipe(intents_folder, tiny_start):
    return {
        "teacher": {"start": str(tiny_start), "finetune": {"epochs": 6, "learning_rate": 3e-3}},
        "student": {"layers": 1},
        "data": {
            "train": str(intents_folder / "train.csv"),
            "validation": str(intents_folder / "validation.csv"),
            "max_length": 32,
        },
        "training": {"epochs": 6, "learning_rate": 3e-3, "checkpoint_seconds": 0.05, "gradient_accumulation": 2},
    }


def weights(folder: Path) -> dict[str, str]:
    return {name: sha256_file(folder / name / "model.safetensors") for name in ("teacher", "student", "baseline")}


def test_four_kills_change_no_bit(recipe, launch, tmp_path):
    launch(undisturbed=(1, recipe)).end()
    folder = tmp_path / "disturbed"
    for moment in (
        "work/finetune/checkpoint-2?/complete.json",  # between checkpoints of the teacher
        "work/finetune/checkpoint-4*/model.safetensors",  # inside a checkpoint that is being written
        "work/train/checkpoint-1?/complete.json",
        "work/baseline/best*/model.safetensors",  # while the best state is being replaced
    ):
        launch(disturbed=(1, recipe)).kill_when(folder, moment)
    launch(disturbed=(1, recipe)).end()
    assert weights(folder) == weights(tmp_path / "undisturbed")
    assert not list(folder.glob("work/*/checkpoint-*"))
