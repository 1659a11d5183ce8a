"""A stage is done once for its inputs; a folder belongs to one recipe and one process."""

import subprocess
import sys

import pytest

from distill.errors import OutputError
from distill.ledger import Ledger, claim
from distill.recipe import Recipe


def recipe_in(folder, **training):
    return Recipe.parse(
        {"teacher": {"checkpoint": "m"}, "data": {"train": "t.csv"}, "output": str(folder), "training": training}
    )


def test_a_stage_runs_once_for_its_inputs(tmp_path):
    ledger, calls, scratch, made = Ledger(tmp_path / "state"), [], tmp_path / "scratch", tmp_path / "made"

    def work():
        calls.append(1)
        scratch.mkdir(exist_ok=True)
        made.touch()
        return {"value": len(calls)}

    for _ in range(2):
        assert ledger.once("train", {"seed": 1}, work, scratch=scratch, makes=[made])["value"] == 1
    made.unlink()
    assert ledger.once("train", {"seed": 1}, work, scratch=scratch, makes=[made])["value"] == 2
    assert ledger.facts("train")["value"] == 2
    assert ledger.facts("export") is None


def test_unfinished_work_survives_the_same_inputs_and_no_others(tmp_path):
    ledger, scratch = Ledger(tmp_path / "state"), tmp_path / "scratch"

    def fail():
        scratch.mkdir(exist_ok=True)
        (scratch / "checkpoint").touch()
        raise RuntimeError("killed")

    def look():
        return {"resumed": (scratch / "checkpoint").exists()}

    with pytest.raises(RuntimeError, match="killed"):
        ledger.once("train", {"seed": 1}, fail, scratch=scratch)
    assert ledger.facts("train") is None
    assert ledger.once("train", {"seed": 1}, look, scratch=scratch)["resumed"] is True
    with pytest.raises(RuntimeError, match="killed"):
        ledger.once("train", {"seed": 2}, fail, scratch=scratch)
    assert ledger.once("train", {"seed": 3}, look, scratch=scratch)["resumed"] is False


def test_another_recipe_is_refused_with_what_differs(tmp_path):
    folder = tmp_path / "run"
    with claim(recipe_in(folder, epochs=7)):
        pass
    with claim(recipe_in(folder)) as ledger:  # of the one before, no stage was begun
        ledger.once("teacher", {}, dict)
    with claim(recipe_in(folder).model_copy(update={"name": "other"})):
        pass
    with (
        pytest.raises(OutputError, match=r"holds another recipe's work \(training.epochs was 5.0, is 3.0\)"),
        claim(recipe_in(folder, epochs=3)),
    ):
        pass
    assert "epochs = 5.0" in (folder / "recipe.toml").read_text()
    with claim(recipe_in(folder, epochs=3), replace=True):
        pass
    assert "epochs = 3.0" in (folder / "recipe.toml").read_text()


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputError, match=r"holds files that distill did not make \(thesis.tex\)"),
        claim(recipe_in(tmp_path)),
    ):
        pass
    assert not (tmp_path / "recipe.toml").exists()


def test_two_processes_do_not_share_a_folder(tmp_path):
    code = (
        "from distill.recipe import Recipe; from distill.ledger import claim\n"
        f"r = Recipe.parse(dict(teacher=dict(checkpoint='m'), data=dict(train='t.csv'), output={str(tmp_path)!r}))\n"
        "with claim(r): pass"
    )
    with claim(recipe_in(tmp_path)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is working here" in done.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("added", ["oops\n", "\n[export]\nold_setting = 1\n"])
def test_a_recipe_of_another_version_is_named(tmp_path, added):
    with claim(recipe_in(tmp_path)) as ledger:
        ledger.once("train", {}, dict)
    path = tmp_path / "recipe.toml"
    text = path.read_text()
    path.write_text(text + added if added == "oops\n" else text.replace("[export]\n", added.lstrip()))
    with (
        pytest.raises(
            OutputError, match=r"toml: is no recipe of this version .*(old_setting|not a readable TOML).*--replace"
        ),
        claim(recipe_in(tmp_path)),
    ):
        pass


def test_all_that_differs_is_counted(tmp_path):
    with claim(recipe_in(tmp_path)) as ledger:
        ledger.once("train", {}, dict)
    other = recipe_in(tmp_path, epochs=9, batch_size=3, learning_rate=0.1, warmup=0.5, weight_decay=0.2)
    with pytest.raises(OutputError, match="and 2 more"), claim(other):
        pass
