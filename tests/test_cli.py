"""The command line: quick to start, teaches with --help, and every command does what it says."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from distill.cli import app, main
from distill.recipe import Recipe

RUNNER = CliRunner()
COMMANDS = [
    *("new", "compress", "finetune", "label", "train", "evaluate", "export", "report"),
    *("demo", "bench", "predict", "verify", "export-text", "demo-page", "push", "student"),
]


def test_help_names_every_command():
    text = RUNNER.invoke(app, ["--help"]).stdout
    assert [name for name in COMMANDS if f" {name} " not in text] == []


@pytest.mark.parametrize("command", [*COMMANDS, "student list", "student show"])
def test_every_command_explains_itself(command):
    done = RUNNER.invoke(app, [*command.split(), "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.stdout


def test_neither_the_package_nor_the_help_loads_torch():
    code = (
        "import sys, distill, distill.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(distill.cli.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'onnx', 'onnxruntime', 'pydantic'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_new_writes_a_recipe_that_loads_and_keeps_what_is_there(tmp_path):
    path = tmp_path / "mine.toml"
    assert RUNNER.invoke(app, ["new", str(path), "--teacher", "some/model", "--train", "a.csv"]).exit_code == 0
    recipe = Recipe.load(path)
    assert (recipe.name, recipe.teacher.checkpoint, recipe.data.train) == ("mine", "some/model", "a.csv")
    again = RUNNER.invoke(app, ["new", str(path)])
    assert "is there already" in str(again.exception)
    assert Recipe.load(path) == recipe


def test_student_list_and_show(minilm_folder):
    assert "layers-4" in RUNNER.invoke(app, ["student", "list"]).stdout
    shown = RUNNER.invoke(app, ["student", "show", "layers-4", "--teacher", str(minilm_folder)]).stdout
    assert "embeddings" in shown
    assert "total" in shown


@pytest.mark.parametrize("text", ["", "a,b", "0,16", "-3"])
def test_numbers_that_are_none(text):
    done = RUNNER.invoke(app, ["bench", "x.onnx", "--lengths", text])
    assert done.exit_code == 2
    assert "positive whole numbers" in " ".join(done.output.replace("│", " ").split())


def test_predict_answers_on_standard_output(tiny_bundle):
    done = RUNNER.invoke(app, ["predict", str(tiny_bundle), "one", "two words", "--json"])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == ["one", "two words"]
    assert all(answer["label"] in answer["probabilities"] for answer in answers)
    piped = RUNNER.invoke(app, ["predict", str(tiny_bundle)], input="one\ntwo words\n").stdout
    assert [line.split("\t")[0] for line in piped.splitlines()] == [answer["label"] for answer in answers]
    pair = RUNNER.invoke(app, ["predict", str(tiny_bundle), "one", "--pair", "two"]).stdout
    assert pair.rstrip().endswith("one | two")


def test_a_phone_is_named_with_what_measures_on_it(tiny_bundle):
    done = RUNNER.invoke(app, ["bench", str(tiny_bundle), "--device", "R5CT"])
    assert done.exit_code == 2
    assert "give --adb PERF_TEST with it" in " ".join(done.stderr.replace("│", " ").split())


def test_data_is_not_asked_of_a_bundle_that_failed(own_bundle, tmp_path):
    (own_bundle / "recipe.toml").unlink()
    done = RUNNER.invoke(app, ["verify", str(own_bundle), "--data", str(tmp_path / "none.csv"), "--json"])
    assert "recipe.toml is missing" in str(done.exception)
    assert not json.loads(done.stdout)["ok"]


def test_predict_refuses_a_length_for_what_writes_no_text(tiny_bundle):
    done = RUNNER.invoke(app, ["predict", str(tiny_bundle), "one", "--max-new-tokens", "3"])
    assert done.exit_code == 2
    assert "a bundle for text-classification writes no text" in " ".join(done.stderr.replace("│", " ").split())


def test_predict_says_that_a_text_lost_its_end(tiny_bundle):
    done = RUNNER.invoke(app, ["predict", str(tiny_bundle), "where is my card", "card " * 60, "card " * 61, "--json"])
    assert done.stderr == "2 texts are longer than 48 tokens and lost their end\n"
    assert len(done.stdout.splitlines()) == 3
    assert RUNNER.invoke(app, ["predict", str(tiny_bundle), "where is my card"]).stderr == ""


def test_verify_says_ok_and_fails_by_its_exit_code(tiny_bundle, tmp_path):
    import shutil

    assert RUNNER.invoke(app, ["verify", str(tiny_bundle)]).exit_code == 0
    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, copy)
    (copy / "README.md").write_text("changed")
    done = RUNNER.invoke(app, ["verify", str(copy), "--json"])
    assert done.exit_code != 0
    assert json.loads(done.stdout)["ok"] is False
    assert "README.md has changed" in str(done.exception)


def test_an_interrupted_run_says_that_it_goes_on(monkeypatch, capsys):
    """What Ctrl-C leaves behind is said, of commands whose work is kept."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill.recipe.Recipe.load", interrupted)
    monkeypatch.setattr("distill.cards.list_cards", interrupted)
    for command, goes_on in ((["train", "r.toml"], True), (["student", "list"], False)):
        monkeypatch.setattr("sys.argv", ["distill", *command])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 130
        assert ("goes on where it was" in capsys.readouterr().err) is goes_on


def test_a_file_in_a_folder_that_is_not_there_yet(tmp_path):
    result = RUNNER.invoke(app, ["new", str(tmp_path / "new/folder/r.toml")])
    assert result.exit_code == 0
    assert (tmp_path / "new/folder/r.toml").exists()


def test_lines_that_are_not_utf8_are_refused_by_number(tiny_bundle):
    piped = RUNNER.invoke(app, ["predict", str(tiny_bundle)], input="\ufeffone\r\ncafé\n".encode())
    assert [line.split("\t")[-1] for line in piped.stdout.splitlines()] == ["one", "café"]
    wrong = RUNNER.invoke(app, ["predict", str(tiny_bundle)], input="one\ncafé\n".encode("cp1252"))
    assert str(wrong.exception) == "standard input line 2: byte 0xe9 is not UTF-8. Save the file as UTF-8."
