"""Answers in a text: windows, spans and measures by hand, and one whole path on XQuAD."""

import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from distill.data.splits import load_splits
from distill.errors import DataError, RecipeError
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.heads import HEADS
from distill.heads.spans import LONGEST, Read, answer, cut_question, spans
from distill.pipeline import run_stages
from distill.recipe import Recipe
from distill.tasks import TASKS, Padding
from distill.tasks.question_answering import plain, word_f1

TASK = TASKS["question-answering"]
CONTEXT = "The cat sat on the mat. The dog lay in the sun. A bird sang all day long in the old tree."


@pytest.fixture(scope="module")
def tokenizer(minilm_folder):
    return AutoTokenizer.from_pretrained(minilm_folder)


def rows(answers, context=CONTEXT, question="who lay in the sun?"):
    return {"text": [question], "text_pair": [context], "label": [answers]}


def test_labels_are_the_tokens_of_the_answer(tokenizer):
    encoded = TASK.encode(rows({"text": ["The dog"], "answer_start": [24]}), tokenizer, 64)
    first, last = encoded.flat["labels"][0]
    assert tokenizer.decode(encoded[0]["input_ids"][first : last + 1]) == "the dog"
    batch = TASK.collate([encoded[0]], Padding())
    question = len(tokenizer("who lay in the sun?")["input_ids"])
    assert batch["inside"][0].tolist() == [True] + [False] * (question - 1) + [True] * (
        batch["input_ids"].shape[1] - question - 1
    ) + [False]
    assert batch["scored"].tolist() == [[True, True]]


def test_a_long_context_is_read_in_windows_that_overlap(tokenizer):
    encoded = TASK.encode(rows({"text": ["The dog"], "answer_start": [24]}), tokenizer, 24)
    assert len(encoded) > 2
    assert encoded.sources.tolist() == [0] * len(encoded)
    found = [tuple(label) for label in encoded.flat["labels"].tolist()]
    assert (0, 0) in found  # windows without the answer
    for place, (first, last) in enumerate(found):
        if first:
            assert tokenizer.decode(encoded[place]["input_ids"][first : last + 1]) == "the dog"
    covered = {
        int(begin) for begin, there in zip(encoded.ragged["begins"], encoded.ragged["inside"], strict=True) if there
    }
    assert {match.start() for match in re.finditer(r"\w+", CONTEXT)} <= covered


def test_questions_without_answer_or_label(tokenizer):
    assert TASK.encode(rows({"text": [], "answer_start": []}), tokenizer, 64).flat["labels"].tolist() == [[0, 0]]
    assert TASK.encode(rows(None), tokenizer, 64).flat["labels"].tolist() == [[-100, -100]]


def test_a_question_longer_than_half_a_window_loses_its_end(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for prepare in (backend.no_truncation, lambda: HEADS[TASK.name].limit(backend, 32)):
        prepare()
        assert cut_question(backend, "who is " * 20, 7) == "who is who is who is who"
        assert cut_question(backend, "who?", 7) == "who?"
        assert cut_question(backend, "", 7) == ""
    encoded = TASK.encode(rows(None, question="who is " * 40), tokenizer, 32)
    assert encoded.lengths.max() <= 32


@pytest.mark.parametrize("size", [8, 11, 12, 13, 14, 16, 17])
def test_a_small_window_repeats_as_much_as_there_is_room_for(tokenizer, size):
    """tokenizers panics, past any handler, where a window would repeat all that it has room for."""
    question, context = "what is this thing that was asked for so long ago", " ".join("abcdefghij" * 3)
    rows = {"text": [question], "text_pair": [context], "label": [None]}
    encoded = TASK.encode(rows, tokenizer, size)
    assert encoded.lengths.max() <= size
    seen = {int(begin) for begin in encoded.ragged["begins"][encoded.ragged["inside"] == 1]}
    assert seen == set(range(0, len(context), 2))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    HEADS[TASK.name].limit(backend, size)
    (windows,) = HEADS[TASK.name].windows(backend, [(question, context)])
    assert [list(one.ids) for one in windows] == [row["input_ids"].tolist() for row in encoded]


def byte_level():
    """A tokenizer like RoBERTa's: a sign that it has not learnt is three tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the team has seven points and two more"] * 4, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


@pytest.mark.parametrize("signs", [10, 30, 100])
def test_a_question_of_many_bytes_is_cut_by_its_tokens(signs):
    """tokenizers panics, past any handler, where a question leaves its context no room."""
    reader, backend = HEADS[TASK.name], byte_level()
    reader.limit(backend, 64)
    (windows,) = reader.windows(backend, [("\u8fd9" * signs, "the team has seven points " * 10)])
    assert len(windows) > 1
    assert max(len(one.ids) for one in windows) <= 64
    assert windows[0].cut == (signs > 10)


def test_threads_may_share_a_reader(tokenizer):
    reader, backend = HEADS[TASK.name], Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    reader.limit(backend, 32)
    asked = [("who is " * length, CONTEXT) for length in range(1, 9)]
    alone = reader.windows(backend, asked)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == alone for found in pool.map(lambda _: reader.windows(backend, asked), range(40)))


def test_questions_that_lose_their_end_are_counted(tokenizer):
    questions, contexts = ["why", "what is " * 12], ["a thing"] * 2
    rows = {"text": questions, "text_pair": contexts, "label": [None] * 2}
    assert TASK.encode(rows, tokenizer, 32).cut == 1
    assert TASK.encode(rows, tokenizer, 64).cut == 0
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    HEADS[TASK.name].limit(backend, 32)
    found = HEADS[TASK.name].windows(backend, list(zip(questions, contexts, strict=True)))
    assert [any(one.cut for one in row) for row in found] == [False, True]


def test_a_window_without_room_for_a_context_is_refused(tokenizer):
    rows = {"text": ["what is it"], "text_pair": ["a thing"], "label": [None]}
    with pytest.raises(DataError, match="windows of 6 tokens have no room for a question, its context and 3 special"):
        TASK.encode(rows, tokenizer, 6)


def test_spans_are_those_of_every_pair_tried():
    """Against brute force, over two windows that share tokens."""
    draw = np.random.default_rng(0)
    reads = []
    for begin in (0, 30):
        inside = np.array([False] * 4 + [True] * 50 + [False])
        offsets = np.array([(0, 0)] * 4 + [(3 * (begin + n), 3 * (begin + n) + 2) for n in range(50)] + [(0, 0)])
        reads.append(Read(draw.normal(size=55), draw.normal(size=55), inside, offsets))
    every = {}
    for read in reads:
        for start, end in itertools.product(range(4, 54), repeat=2):
            if start <= end < start + LONGEST:
                place = (read.offsets[start][0], read.offsets[end][1])
                every[place] = max(every.get(place, -99), read.starts[start] + read.ends[end])
    best = sorted(every.items(), key=lambda item: -item[1])[:5]
    assert [((one.start, one.end), one.score) for one in spans(reads)][:5] == [(place, score) for place, score in best]


def test_no_answer_is_said_past_the_threshold_alone():
    inside, offsets = np.array([False, True, True]), np.array([(0, 0), (0, 3), (4, 7)])
    read = Read(np.array([2.0, 1.0, 0.0]), np.array([2.0, 0.0, 1.5]), inside, offsets)
    said = answer("one two", [read])
    assert (said.text, said.start, said.end) == ("one two", 0, 7)  # 2.5 against 4 for none
    assert said.probability + said.none < 1.0
    assert answer("one two", [read], null_threshold=2.0).text == "one two"
    assert answer("one two", [read], null_threshold=1.0).text == ""
    assert answer("", [Read(read.starts, read.ends, np.zeros(3, bool), offsets)]).text == ""


def test_measures_by_hand(tokenizer):
    assert plain("The  Old, old-tree!") == "old oldtree"
    assert word_f1("the old tree", "an old tree in the sun") == pytest.approx(2 * 2 / (2 + 4))
    assert (word_f1("", ""), word_f1("", "tree")) == (1.0, 0.0)
    encoded = TASK.encode(rows({"text": ["The dog", "dog lay"], "answer_start": [24, 28]}), tokenizer, 64)
    first, last = encoded.flat["labels"][0]
    starts, ends = np.zeros(len(encoded[0]["input_ids"])), np.zeros(len(encoded[0]["input_ids"]))
    starts[first], ends[last + 1] = 9, 9
    outputs = TASK.postprocess({"start_logits": starts, "end_logits": ends})
    assert TASK.told(outputs, encoded)[0][0] == "The dog lay"  # articles do not count, so it is the second answer
    assert TASK.metrics(outputs, encoded) == pytest.approx({"f1": 1.0, "exact_match": 1.0})
    assert TASK.calibrate(outputs, encoded) == {}


def test_the_threshold_for_no_answer_is_chosen_by_f1(tokenizer):
    """One question has an answer that is found; to the other, less surely answered, there is none."""
    table = {
        "text": ["who lay in the sun?"] * 2,
        "text_pair": [CONTEXT] * 2,
        "label": [{"text": ["The dog"], "answer_start": [24]}, {"text": [], "answer_start": []}],
    }
    encoded = TASK.encode(table, tokenizer, 64)
    length = int(encoded.lengths[0])
    starts, ends = np.zeros((2, length)), np.zeros((2, length))
    first, last = encoded.flat["labels"][0]
    starts[:, first], ends[:, last] = [9, 2], [9, 2]
    outputs = TASK.postprocess({"start_logits": starts.reshape(-1), "end_logits": ends.reshape(-1)})
    chosen = TASK.calibrate(outputs, encoded)
    assert -18 <= chosen["null_threshold"] < -4
    assert TASK.metrics(outputs, encoded)["f1"] == 0.5
    assert TASK.metrics(outputs, encoded, chosen)["f1"] == 1.0


GOOD = {"question": "who sat?", "context": CONTEXT, "answers": {"text": ["The cat"], "answer_start": [0]}}
BAD = {
    "not there": ({"text": ["The cow"], "answer_start": [0]}, "the answer 'The cow' is not in the context"),
    "elsewhere": (
        {"text": ["The dog"], "answer_start": [23]},
        "the answer 'The dog' does not start at character 23 of the context but at 24",
    ),
    "no start": ({"text": ["The dog"]}, "'answers' has no `text` with an `answer_start` for each"),
    "empty": ({"text": [" "], "answer_start": [3]}, "an answer of 'answers' is empty"),
    "missing": (None, "'answers' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_answers_are_named_or_skipped(name, rows_file):
    answers, problem = BAD[name]
    good = [{**GOOD, "question": f"who sat {number} times?"} for number in range(20)]
    path = rows_file([*good[:2], {**GOOD, "answers": answers}, *good[2:]])
    kinds = {"text": "question", "text_pair": "context", "label": "answers", "target": "span"}
    with pytest.raises(DataError, match=re.escape(f"row 3: {problem}")):
        load_splits(path, **kinds)
    splits = load_splits(path, on_bad_row="skip", **kinds)
    assert len(splits.train) + len(splits.validation) == 20
    assert splits.train[0]["label"] == {"text": ["The cat"], "answer_start": [0]}


def test_a_context_is_asked_for(tmp_path, rows_file):
    data = {"train": str(rows_file([GOOD])), "text": "question", "label": "answers"}
    recipe = {"task": "question-answering", "output": str(tmp_path), "teacher": {"checkpoint": "x"}, "data": data}
    with pytest.raises(RecipeError, match=r"`data.text_pair` must name a column for question-answering; got ''"):
        run_stages(Recipe.parse(recipe), until="label")


@pytest.fixture(scope="module")
def finished(shared_data, read_rows, rows_file, make_start, run_example):
    train = read_rows(shared_data / "xquad_en/train.jsonl", 250)
    dev = read_rows(shared_data / "xquad_en/dev.jsonl", 40)
    start = make_start([f"{row['question']} {row['context']}" for row in train], words=3000)
    return run_example(
        "question-answering",
        f'data.train="{rows_file(train, "train")}"',
        f'data.validation="{rows_file(dev, "dev")}"',
        'teacher.checkpoint=""',
        f'teacher.start="{start}"',
        "teacher.finetune={epochs=4, learning_rate=2e-3}",
        "training={epochs=2, learning_rate=2e-3, baseline=false}",
        'student.card="layers-4"',
        "data.max_length=128",
        "export.max_drop=5",
    )


@pytest.mark.slow
def test_question_answering_goes_the_whole_way(finished, outputs_of):
    _, result = finished
    assert outputs_of(result.bundle / "onnx/model_quantized.onnx") == ["start_logits", "end_logits"]
    results = json.loads((result.folder / "results.json").read_text())
    models = {row["role"]: row for row in results["models"]}
    assert models["teacher"]["metrics"]["f1"] > 0.02  # from scratch on 250 questions: nothing that answers well
    assert models["teacher-onnx"]["agreement"] == 1.0
    assert models["student-onnx"]["metrics"] == pytest.approx(models["student"]["metrics"])
    assert models["student-int8"]["bytes"] < models["student-onnx"]["bytes"] / 2
    assert verify_bundle(result.bundle).ok
    golden = json.loads((result.bundle / "golden.jsonl").read_text().splitlines()[0])
    assert np.sum(golden["start_and_end_probabilities"], axis=1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.slow
def test_transformers_and_the_bundle_give_the_same_answers(finished, read_rows):
    """Windows of transformers' tokenizer, logits of its model, every pair of tokens tried: as its old pipeline did."""
    recipe, result = finished
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "student")
    model = AutoModelForQuestionAnswering.from_pretrained(result.folder / "student").eval()
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    asked = read_rows(recipe.data.validation, 12)
    pairs = [(row["question"], row["context"]) for row in asked]
    for (question, context), ours in zip(pairs, bundle.predict(pairs), strict=True):
        tokens = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=128,
            stride=32,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output = model(**{name: tokens[name] for name in tokenizer.model_input_names})
        best = (-1e9, 0, 0)
        for window, offsets in enumerate(tokens["offset_mapping"].tolist()):
            inside = [place for place, sequence in enumerate(tokens.sequence_ids(window)) if sequence == 1]
            for first, last in itertools.product(inside, repeat=2):
                if first <= last < first + LONGEST:
                    score = float(output.start_logits[window, first] + output.end_logits[window, last])
                    best = max(best, (score, offsets[first][0], offsets[last][1]))
        assert ours.text == context[best[1] : best[2]]
        assert (ours.start, ours.end) == best[1:]
        assert ours.candidates[0][0] == ours.text


@pytest.mark.slow
def test_predict_answers_a_question_about_a_context(finished):
    _, result = finished
    asked = [str(result.bundle), "who sat on the mat?"]
    command = [sys.executable, "-m", "distill.cli", "predict", *asked, "--pair", CONTEXT, "--json"]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert CONTEXT[said["start"] : said["end"]] == said["answer"] == said["candidates"][0]["answer"]
    assert said["text"] == ["who sat on the mat?", CONTEXT]
    alone = subprocess.run(command[:6], capture_output=True, text=True, check=False)
    assert alone.returncode != 0
    assert "is no question with its context. Give (question, context)" in alone.stderr.replace("\n", " ")
