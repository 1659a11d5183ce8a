"""An objective that cannot be is refused by the command before the first step: one line, with the fix."""

import json
import sys

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ErnieConfig,
    ErnieForSequenceClassification,
)

from distill import cli

LABELS = ["arrival", "exchange", "password"]


def save_teacher(folder, tiny_start, kind, config_kind):
    start = BertConfig.from_pretrained(tiny_start).to_dict()
    values = {key: value for key, value in start.items() if key not in ("model_type", "architectures")}
    values |= {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    torch.manual_seed(0)
    kind(config_kind(**values)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tiny_start):
    return save_teacher(tmp_path_factory.mktemp("bert"), tiny_start, BertForSequenceClassification, BertConfig)


@pytest.fixture(scope="module")
def ernie(tmp_path_factory, tiny_start):
    """Of a family whose queries, keys and values are not known by name."""
    folder = tmp_path_factory.mktemp("ernie")
    return save_teacher(folder, tiny_start, ErnieForSequenceClassification, ErnieConfig)


@pytest.fixture
def refused(tmp_path, intents_folder, monkeypatch, capsys):
    """Runs `distill train` on a recipe with one term and gives the line that it ends with."""

    def run(teacher, student="", **term):
        written = "\n".join(f"{key} = {value}" for key, value in term.items())
        recipe = tmp_path / "r.toml"
        recipe.write_text(
            f"output = {json.dumps(str(tmp_path / 'run'))}\n[teacher]\ncheckpoint = {json.dumps(str(teacher))}\n"
            f"[student]\nlayers = 1\n{student}\n"
            f"[data]\ntrain = {json.dumps(str(intents_folder / 'train.csv'))}\n"
            f"validation = {json.dumps(str(intents_folder / 'validation.csv'))}\nmax_length = 32\n"
            f"[[objective.terms]]\n{written}\n"
        )
        monkeypatch.setattr(sys, "argv", ["distill", "train", str(recipe)])
        monkeypatch.setenv("COLUMNS", "600")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code > 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(lines) == 1
        assert not list((tmp_path / "run").rglob("checkpoint-*"))
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (
            {"loss": '"hidden_mse"', "layers": "[[1, 9]]"},
            "hidden_mse: layer map [1, 9] names teacher layer 9; the teacher's are 0 to 2",
        ),
        ({"loss": '"hidden_mse"', "layers": "[[3, 1]]"}, "names student layer 3; the student's are 0 to 1"),
        (
            {"loss": '"value_relation"', "options": "{ relation_heads = 7 }"},
            "value_relation: relation_heads = 7 must divide",
        ),
        (
            {"loss": '"hidden_mse"', "options": '{ projection = "none" }'},
            "option projection must be one of 'layer', 'shared'; got 'none'",
        ),
        (
            {"loss": '"hidden_mse"', "options": '{ projection = "shared" }'},
            "wide: there is nothing to project; take projection away",
        ),
        (
            {"loss": '"similarity_kl"'},
            "similarity_kl: reads the vectors of a text and an image, which a 'bert' student does not give",
        ),
        ({"loss": '"nst"', "options": '{ projection = "shared" }'}, "nst has no option 'projection'"),
    ],
)
def test_a_term_that_cannot_be(refused, bert, term, said):
    assert said in refused(bert, **term)


def test_heads_that_differ(refused, bert):
    line = refused(bert, student="attention_heads = 1", loss='"attention_mse"')
    assert "compares head by head, and the student has 1, the teacher 2" in line
    assert "give the student 2 heads, or take a relation loss" in line


def test_heads_that_do_not_divide_the_width(refused, bert):
    assert "7 attention_heads do not divide hidden_size" in refused(
        bert, student="attention_heads = 7", loss='"hidden_mse"'
    )


def test_features_that_the_model_does_not_give(refused, ernie):
    line = refused(ernie, loss='"query_relation"')
    assert "query_relation reads query, which is not known for student 'ernie' and teacher 'ernie'" in line
    assert "take a loss on logits or hidden states" in line
