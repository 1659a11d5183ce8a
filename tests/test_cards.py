"""Cards: every shipped one loads, and a bad one says everything that is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distill.cards import StudentCard, list_cards, load_student_card, load_teacher_card, replace_card
from distill.errors import CardError
from distill.tasks import TASKS

STUDENTS = {"layers-4", "layers-6", "minilm-6", "tinybert-4", "tinybert-6", "distilbert-6", "mobile-4", "mobile-6"}


def test_the_promised_student_cards_are_there():
    assert set(list_cards("student")) >= STUDENTS


@pytest.mark.parametrize("name", list_cards("student"))
def test_every_student_card_loads_under_its_own_name_and_declares_a_size(name):
    card = load_student_card(name)
    assert card.name == name
    assert card.declared is not None
    assert card.declared.int8_bytes < 2 * card.declared.parameters


@pytest.mark.parametrize("name", list_cards("teacher"))
def test_every_teacher_card_loads_and_a_fine_tuned_one_has_a_floor(name):
    card = load_teacher_card(name)
    assert card.task in TASKS
    assert (card.floor is not None) == card.fine_tuned
    assert len(set(card.labels)) == len(card.labels)
    if card.floor is not None:
        assert card.floor.metric in ("accuracy", "macro_f1")


def test_a_card_is_found_by_path(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('description = "mine"\nlayers = 3\n')
    card = load_student_card(path)
    assert (card.name, card.layers, card.hidden_size) == ("mine", 3, "teacher")
    assert load_student_card(str(path)) == card


def test_an_unknown_card_names_the_near_ones_and_all_of_them():
    with pytest.raises(
        CardError, match=r"no student card 'layer-4'\. Did you mean .*layers-4.*There are: .*tinybert-6"
    ):
        load_student_card("layer-4")
    with pytest.raises(CardError, match=r"no teacher card 'zzz'\. There are: bert-base-start"):
        load_teacher_card("zzz")
    with pytest.raises(CardError, match=r"no student card at '.*absent\.toml'"):
        load_student_card("some/absent.toml")


def test_all_problems_of_a_card_are_told_at_once(tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text('layers = 0\nlayer = 4\nactivation = 3\nhidden_size = "wide"\n[inherits]\nparts = ["body"]\n')
    with pytest.raises(CardError) as error:
        load_student_card(path)
    said = str(error.value)
    assert "\n" not in said
    for piece in ("`description` is missing", "`layers`", "got 0", "`layer` is not a field. Did you mean `layers`?"):
        assert piece in said
    for piece in ("`activation`", "got 3", "`hidden_size`", "got 'wide'", "`inherits.parts.0`", "got 'body'"):
        assert piece in said


def test_toml_that_does_not_parse_and_a_wrong_name_are_refused(tmp_path: Path):
    path = tmp_path / "torn.toml"
    path.write_text("layers = ")
    with pytest.raises(CardError, match=r"torn\.toml: not a readable TOML file"):
        load_student_card(path)
    path.write_text('name = "other"\ndescription = "x"\nlayers = 2\n')
    with pytest.raises(CardError, match=r"`name` is 'other' but the file is called 'torn\.toml'"):
        load_student_card(path)


def test_overrides_make_a_new_card_without_the_declared_size():
    card = load_student_card("layers-4")
    changed = replace_card(card, {"layers": 2, "activation": None})
    assert (changed.layers, changed.activation, changed.declared) == (2, "teacher", None)
    assert replace_card(card, {"layers": None}) is card
    assert card.layers == 4
    with pytest.raises(CardError, match=r"student: `layers`: .*; got 0"):
        replace_card(card, {"layers": 0}, where="student")


def test_a_packaged_starting_point_is_found_on_this_machine(minilm_folder: Path):
    assert Path(load_teacher_card("minilm-l6-start").location()) == minilm_folder
    assert (
        load_teacher_card("distilbert-sst2").location() == "distilbert/distilbert-base-uncased-finetuned-sst-2-english"
    )


def test_cards_load_without_torch():
    program = "import sys, distill.cards as c; c.load_student_card('layers-4'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_cards_cannot_be_changed_in_place():
    card = StudentCard(name="x", description="x", layers=2)
    with pytest.raises(ValueError, match="frozen"):
        card.layers = 3
