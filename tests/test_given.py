"""What a run is given: teacher cards fill in what a recipe leaves empty, and nothing else."""

import pytest
from transformers import AutoTokenizer, BertForMaskedLM, BertForSequenceClassification

from distill.cards import load_teacher_card
from distill.errors import CardError, RecipeError, TeacherError
from distill.given import Given
from distill.progress import SILENT
from distill.recipe import Recipe


@pytest.fixture
def given(tmp_path):
    (tmp_path / "rows.csv").write_text(
        "\n".join(["text,label", *(f"tell me {number},{('yes', 'no')[number % 2]}" for number in range(40))])
    )

    def make(task="auto", data=None, **teacher):
        wanted = {"train": str(tmp_path / "rows.csv"), "max_length": 8, **(data or {})}
        recipe = {"task": task, "teacher": teacher, "data": wanted, "output": str(tmp_path / "run")}
        return Given(Recipe.parse(recipe), SILENT)

    return make


@pytest.fixture
def card(tmp_path):
    """Writes a teacher card and gives its path."""

    def make(checkpoint, more="", task="text-classification"):
        path = tmp_path / "mine.toml"
        path.write_text(f'checkpoint = "{checkpoint}"\ntask = "{task}"\nlicence = "MIT"\n{more}')
        return str(path)

    return make


def saved(model, tiny_start, folder, **config):
    model.from_pretrained(tiny_start, **config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_start).save_pretrained(folder)
    return folder


def test_the_card_of_a_pretrained_model_is_fine_tuned_first(given, minilm_folder, tmp_path):
    one = given(card="minilm-l6-start")
    assert one.task.name == "text-classification"
    assert one.start == str(minilm_folder)
    assert one.source == str(tmp_path / "run" / "teacher")
    assert one.revision == load_teacher_card("minilm-l6-start").revision
    assert given("question-answering", {"text_pair": "label"}, card="minilm-l6-start").start == str(minilm_folder)
    asis = given("sentence-embedding", card="minilm-l6-start")  # its vectors are what it teaches
    assert (asis.start, asis.source) == ("", str(minilm_folder))


def test_a_card_without_labels_of_a_model_that_has_the_head_is_a_teacher(given, card, tiny_start, tmp_path):
    model = saved(BertForSequenceClassification, tiny_start, tmp_path / "model", num_labels=2)
    assert given(card=card(model)).start == ""
    guesser = saved(BertForMaskedLM, tiny_start, tmp_path / "guesser")
    assert given(card=card(guesser)).start == str(guesser)
    assert given("masked-lm", card=card(guesser)).start == ""


def test_a_checkpoint_of_ones_own_is_not_looked_for_at_the_cards_revision(given):
    assert given(checkpoint="me/x", card="bert-sst2").revision == ""
    assert given(checkpoint="me/x", card="bert-sst2", revision="v1").revision == "v1"
    assert given(card="bert-sst2").revision == load_teacher_card("bert-sst2").revision


def test_the_recipes_floor_stands_before_the_cards(given):
    measured = {"accuracy": 0.85, "macro_f1": 0.8}
    assert given(card="bert-sst2").floor(measured) == ("accuracy", 0.9)
    assert given(card="bert-sst2", floor=0.5).floor(measured) == ("accuracy", 0.5)


def test_a_cards_floor_is_of_the_metric_that_it_names(given, card):
    path = card("me/x", 'labels = ["no", "yes"]\n[floor]\nmetric = "macro_f1"\nvalue = 0.7')
    assert given(card=path).floor({"accuracy": 0.85, "macro_f1": 0.8}) == ("macro_f1", 0.7)
    with pytest.raises(CardError, match="its floor is of macro_f1, and text-classification measures accuracy"):
        given(card=path).floor({"accuracy": 0.85})


def test_labels_that_are_not_the_heads_are_refused(given, card, tiny_start, tmp_path):
    model = saved(BertForSequenceClassification, tiny_start, tmp_path / "model", num_labels=2)
    assert given(card=card(model, 'labels = ["no", "yes"]')).teacher.labels == ["no", "yes"]
    with pytest.raises(TeacherError, match="its head has 2 classes, and card mine names 3: no, yes, both"):
        _ = given(card=card(model, 'labels = ["no", "yes", "both"]')).teacher


def test_a_card_says_how_much_its_model_reads_and_for_which_task(given, card):
    with pytest.raises(RecipeError, match=r"`data.max_length` must be at most 7, as card mine says; got 8"):
        _ = given(card=card("me/x", "max_length = 7")).card
    with pytest.raises(CardError, match="its `task` is 'classification', which is none"):
        _ = given(card=card("me/x", task="classification")).card
