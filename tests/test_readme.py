"""The README's own words, run one after the other in an empty folder. What cannot run here is named."""

import contextlib
import csv
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from distill.cli import app

ROOT = Path(__file__).resolve().parent.parent
NOT_RUN_HERE = ("make demo", "make test", "pip install", *(() if shutil.which("npm") else ("distill demo-page",)))
"""`make demo` takes minutes and is run by itself; `make test` is what runs this; installing is tested on its own."""


NEED_TORCH = ("compress", "export-text", "push")
"""Run in this process, which has imported it; what the base install can do runs as a shell runs it."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def newcomer(tmp_path, tiny_start, intents_folder):
    """A folder with what the README says one needs: `my-teacher` and `train.csv`."""
    with (intents_folder / "train.csv").open(encoding="utf-8") as file:
        labels = sorted({row["label"] for row in csv.DictReader(file)})
    config = BertConfig.from_pretrained(tiny_start, num_labels=3, id2label=dict(enumerate(labels)))
    config.max_position_embeddings = 128
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "my-teacher")
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(tmp_path / "my-teacher")
    shutil.copy(intents_folder / "train.csv", tmp_path)
    return tmp_path


def test_every_command_of_the_readme_runs(newcomer, monkeypatch):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    monkeypatch.chdir(newcomer)
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    run = [command for command in commands if command and not command.startswith(NOT_RUN_HERE)]
    assert len(run) >= 5
    for command in run:
        words = shlex.split(command)
        if words[:2] == ["distill", "compress"]:  # two layers cannot give four; int8 of random weights may flip answers
            words += ["--set", "student.layers=1", "--set", "export.max_drop=100", "--set", "bench.runs=10"]
        if words[0] == "distill" and words[1] in NEED_TORCH:
            said = CliRunner().invoke(app, words[1:])
            assert said.exit_code == 0, f"{command}\n{said.exception!r}"
            continue
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    for code in blocks("python"):
        settings = '"reviews.toml", ["student.layers=1", "export.max_drop=100", "bench.runs=10", "training.epochs=5"]'
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code.replace('"reviews.toml"', settings), {"__name__": "__main__"})
        assert said.getvalue().strip() in ("arrival", "exchange", "password")


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_makefile_has_what_the_readme_calls():
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in ("demo", "test", "lint", "bench"))
