"""General distillation: masks, measures by hand, and one whole path on WikiText-2."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM
from transformers import pipeline as transformers_pipeline

from distill.errors import DataError, RecipeError
from distill.evaluation import TorchPredictor
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.features import describe
from distill.objectives import build_objective
from distill.pipeline import run_stages
from distill.recipe import Recipe, TermRecipe, TrainingRecipe
from distill.shipping import verify_with_data
from distill.tasks import TASKS, Padding
from distill.tasks.encoded import pack
from distill.tasks.masked_lm import MaskedLanguageModel, mask
from distill.training.fit import fit

TASK = TASKS["masked-lm"]


def test_masks_hide_a_seventh_and_are_the_same_each_time():
    ids, special = np.arange(1000, 6000), np.zeros(5000, int)
    special[[0, -1]] = 1
    shown, labels = mask(ids, special, 103, seed=5)
    hidden = labels != -100
    assert labels[hidden].tolist() == ids[hidden].tolist()
    assert 0.13 < hidden.mean() < 0.17
    assert (shown[~hidden] == ids[~hidden]).all()
    assert 0.75 < (shown[hidden] == 103).mean() < 0.85
    assert 0.07 < ((shown[hidden] != 103) & (shown[hidden] != ids[hidden])).mean() < 0.13
    assert not hidden[[0, -1]].any()
    assert (mask(ids, special, 103, seed=5)[0] == shown).all()
    assert (mask(ids, special, 103, seed=6)[0] != shown).any()


def test_a_short_row_hides_one_token_and_an_empty_one_none():
    for seed in range(20):
        assert (mask(np.array([101, 7, 8, 102]), np.array([1, 0, 0, 1]), 103, seed)[1] != -100).sum() >= 1
    assert (mask(np.array([101, 102]), np.array([1, 1]), 103, 0)[1] == -100).all()


def test_a_long_text_becomes_several_rows(minilm_folder):
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    encoded = TASK.encode({"text": ["a film " * 40, "dull"], "label": [None, None]}, tokenizer, 32)
    assert encoded.sources.tolist() == [0, 0, 0, 1]
    assert encoded.lengths.max() == 32
    masks = [tuple(encoded[row]["labels"] != -100) for row in (0, 1)]
    assert masks[0] != masks[1]
    batch = TASK.collate([encoded[3]], Padding())
    assert batch["scored"].tolist() == [[False, True, False]]


def test_each_epoch_hides_other_tokens_of_the_same_text(minilm_folder):
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder)
    texts = ["the quick brown fox jumps over the lazy dog " * 3, "a film that is long and dull " * 3]
    encoded = TASK.encode({"text": texts, "label": [None] * 2}, tokenizer, 64)
    whole = [tokenizer(text)["input_ids"] for text in texts]

    def hidden(row, seed, epoch):
        new = TASK.vary(encoded[row], seed, epoch)
        chosen = new["labels"] != -100
        assert np.where(chosen, new["labels"], new["input_ids"]).tolist() == whole[row]
        assert not chosen[[0, -1]].any()
        return tuple(np.flatnonzero(chosen))

    assert hidden(0, 3, 1) == hidden(0, 3, 1)
    assert len({hidden(row, seed, epoch) for row in (0, 1) for seed in (3, 4) for epoch in range(5)}) == 20
    batch = TASK.collate([TASK.vary(encoded[0], 3, 1)], Padding())
    assert tuple(np.flatnonzero(batch["scored"][0])) == hidden(0, 3, 1)


class InterruptedRunError(Exception):
    pass


class Watched(MaskedLanguageModel):
    """Remembers which rows were asked for in which epochs."""

    def __init__(self):
        self.seen = []

    def vary(self, row, seed, epoch):
        self.seen.append((epoch, row["example"]))
        return super().vary(row, seed, epoch)


def fitted(folder, start, tokenizer, interrupt):
    """Weights after three epochs of guessing; cut off behind the second and begun again where `interrupt`."""
    texts = [f"the game was played in the season of {year} by the team" for year in range(1900, 1912)]
    encoded = TASK.encode({"text": texts, "label": [None] * 12}, tokenizer, 32)
    settings = TrainingRecipe(epochs=3, batch_size=4, learning_rate=1e-3, checkpoint_seconds=1e-6, precision="fp32")
    measured = []

    def measure(model):
        measured.append(1)
        if interrupt and len(measured) == 2:
            raise InterruptedRunError
        return {"masked_accuracy": 0.5}

    def go():
        model = AutoModelForMaskedLM.from_pretrained(start)
        shape = describe(model)
        objective = build_objective([TermRecipe(loss="hard_labels")], shape, shape)
        known = {"save": lambda _: None, "logs": folder / "logs", "seed": 7}
        fit(model, objective, None, encoded, task, Padding(), settings, folder, measure, **known)
        return model.state_dict()

    task = Watched()

    if interrupt:
        with pytest.raises(InterruptedRunError):
            go()
        assert list(folder.glob("checkpoint-*"))
    weights = go()
    assert set(task.seen) == {(epoch, row) for epoch in range(3) for row in range(12)}
    return weights


def test_an_interruption_changes_no_mask(tmp_path, start):
    tokenizer = AutoTokenizer.from_pretrained(start)
    whole = fitted(tmp_path / "whole", start, tokenizer, interrupt=False)
    again = fitted(tmp_path / "again", start, tokenizer, interrupt=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_measures_by_hand():
    encoded = pack({"input_ids": [[1, 2, 3]], "labels": [[-100, 7, 8]]}, {})
    outputs = {"guess": np.array([0, 7, 9]), "surprise": np.log([1.0, 2.0, 8.0])}
    assert TASK.metrics(outputs, encoded) == pytest.approx({"masked_accuracy": 0.5, "pseudo_perplexity": 4.0})


@pytest.fixture(scope="module")
def start(make_start, shared_data):
    lines = (shared_data / "wikitext2/train.txt").read_text(encoding="utf-8").splitlines()
    return make_start(lines, words=1500, kind=BertForMaskedLM)


def test_guesses_are_those_of_the_whole_model(start):
    """The head alone on the encoder's states says what the model says; the model is as it was."""
    model = AutoModelForMaskedLM.from_pretrained(start).train()
    tokenizer = AutoTokenizer.from_pretrained(start)
    encoded = TASK.encode(
        {"text": ["the game was played", "it is a species of the"], "label": [None] * 2}, tokenizer, 32
    )
    batch = TASK.collate([encoded[0], encoded[1]], Padding({"input_ids": 0}))
    found = TASK.judge(TorchPredictor(model, TASK), model).predict(batch)
    tensors = {name: torch.from_numpy(batch[name]) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        logits = model.eval()(**tensors).logits
    scored = torch.from_numpy(batch["scored"])
    assert found["guess"][batch["scored"]].tolist() == logits.argmax(-1)[scored].tolist()
    loss = torch.nn.functional.cross_entropy(
        logits[scored], torch.from_numpy(batch["labels"])[scored], reduction="none"
    )
    assert found["surprise"][batch["scored"]] == pytest.approx(loss.numpy(), abs=1e-4)
    empty = replace(encoded, ragged={**encoded.ragged, "labels": np.full_like(encoded.ragged["labels"], -100)})
    silent = TASK.judge(TorchPredictor(model, TASK), model).predict(TASK.collate([empty[0]], Padding()))
    assert not silent["guess"].any()


def test_a_smaller_vocabulary_is_refused(tmp_path):
    recipe = {
        "task": "masked-lm",
        "output": str(tmp_path),
        "teacher": {"checkpoint": "x"},
        "student": {"vocabulary": "used"},
        "data": {"train": "x.txt"},
    }
    with pytest.raises(RecipeError, match=r"`student\.vocabulary` must be \"full\" for masked-lm; got 'used'"):
        run_stages(Recipe.parse(recipe), until="label")


@pytest.fixture(scope="module")
def finished(shared_data, start, tmp_path_factory, run_example):
    folder = tmp_path_factory.mktemp("text")
    for name, source, most in (("train", "train", 900), ("validation", "dev", 150)):
        lines = (shared_data / f"wikitext2/{source}.txt").read_text(encoding="utf-8").splitlines()
        (folder / f"{name}.txt").write_text("\n".join(lines[:most]), encoding="utf-8")
    return run_example(
        "masked-lm",
        f'data.train="{folder / "train.txt"}"',
        f'data.validation="{folder / "validation.txt"}"',
        'teacher.checkpoint=""',
        f'teacher.start="{start}"',
        "teacher.finetune={epochs=2, learning_rate=2e-3}",
        "training={epochs=1, learning_rate=2e-3, baseline=false}",
        'student.card="layers-4"',
        "data.max_length=64",
        "export.max_drop=2",
    )


@pytest.mark.slow
def test_general_distillation_goes_the_whole_way(finished):
    recipe, result = finished
    results = json.loads((result.folder / "results.json").read_text())
    models = {row["role"]: row for row in results["models"]}
    assert models["teacher"]["metrics"]["masked_accuracy"] > 0.05
    assert models["student"]["metrics"]["pseudo_perplexity"] < 800  # of 1,600 pieces
    assert models["student-onnx"]["metrics"] == pytest.approx(models["student"]["metrics"], rel=1e-3)
    assert models["student-int8"]["retention"] > 0.8
    assert not (result.folder / "work" / "cache").exists()  # the teacher answered live
    assert {"query_relation", "soft_labels", "hard_labels"} <= {term["term"] for term in results["objective"]}
    assert verify_bundle(result.bundle).ok
    with pytest.raises(DataError, match="a masked-lm bundle ships without the head"):
        verify_with_data(result.bundle, recipe.data.validation, verify_bundle(result.bundle))


@pytest.mark.slow
def test_transformers_and_the_bundle_give_the_same_states(finished):
    _, result = finished
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    assert bundle.model.outputs == ("last_hidden_state",)
    text = "the game was played in the city"
    states = transformers_pipeline("feature-extraction", model=str(result.folder / "student"))(text)
    ours = bundle(text)
    assert ours.vectors.shape == np.array(states[0]).shape
    assert ours.vectors == pytest.approx(np.array(states[0]), abs=1e-3)
    assert ours.summary() == f"{ours.vectors.shape[0]} tokens, 64 wide"
    guess = transformers_pipeline("fill-mask", model=str(result.folder / "student"))
    hidden = "the [MASK] was played"
    place = guess.tokenizer(hidden)["input_ids"].index(guess.tokenizer.mask_token_id)
    with torch.no_grad():
        chances = guess.model.cls(torch.from_numpy(bundle(hidden).vectors)).softmax(-1)[place]
    best = chances.topk(5)
    assert [one["token"] for one in guess(hidden)] == best.indices.tolist()
    assert [one["score"] for one in guess(hidden)] == pytest.approx(best.values.tolist(), abs=1e-4)
