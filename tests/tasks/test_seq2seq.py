"""Translators: measures by hand, targets beside sources, and one whole path from English to German."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MBartTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from distill.checks import check_columns
from distill.cli import app
from distill.data.splits import load_splits
from distill.errors import DataError, RecipeError, TeacherError
from distill.evaluation import TorchPredictor, evaluate
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.ledger import claim
from distill.pipeline import run_stages
from distill.progress import SILENT
from distill.recipe import Recipe
from distill.rewriting import rewritten
from distill.run import Run
from distill.shipping import verify_with_data
from distill.tasks import TASKS, Padding, concatenate, find_task
from distill.tasks.writing import rules_of, spelled
from distill.teacher import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]

TASK = TASKS["seq2seq"]
PAD, END, UNKNOWN = 0, 1, 2
PREFIX = "English to German: "


def learn_tokenizer(texts, size):
    """A Unigram tokenizer as T5, Marian and XLM-R have it, learnt from `texts`."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def rows(shared_data, read_rows):
    folder = shared_data / "multi30k"
    found = {"train": read_rows(folder / "train.jsonl", 400), "validation": read_rows(folder / "val.jsonl", 24)}
    told = {True: "a man", False: "others"}
    return {name: [{**row, "who": told[" man " in row["en"]]} for row in rows] for name, rows in found.items()}


@pytest.fixture(scope="module")
def tokenizer(rows):
    return learn_tokenizer([row[side] for row in rows["train"] for side in ("en", "de")], 1200)


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """T5 of 2 + 2 layers, 64 wide, random weights."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=0.5,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    model = T5ForConditionalGeneration(config)
    options = {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 4}
    model.generation_config.update(max_new_tokens=24, min_length=4, max_time=600.0, **options)
    folder = tmp_path_factory.mktemp("t5")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encode(tokenizer, sources, targets, limit=64):
    return TASK.encode({"text": sources, "label": targets}, tokenizer, limit)


def test_the_decoder_sees_the_target_one_token_late(tokenizer):
    encoded = encode(tokenizer, ["A man.", "A very tall man."], ["Ein Mann.", "Ein großer Mann."])
    batch = TASK.collate([encoded[0], encoded[1]], Padding({"decoder_input_ids": 7}, start=5))
    first, second = (tokenizer(text_target=text)["input_ids"] for text in ("Ein Mann.", "Ein großer Mann."))
    assert batch["labels"][1].tolist() == second
    assert batch["labels"][0].tolist() == [*first, *[-100] * (len(second) - len(first))]
    assert batch["decoder_input_ids"][0].tolist() == [5, *first[:-1], *[7] * (len(second) - len(first))]
    assert batch["scored"].sum() == len(first) + len(second)
    assert TASK.tokens(batch).tolist() == [len(first), len(second)]


def test_targets_stay_with_their_sources(tokenizer):
    one = encode(tokenizer, ["A man.", "Two dogs run."], ["Ein Mann.", "Zwei Hunde laufen."])
    both = concatenate([one, encode(tokenizer, ["Snow."], ["Schnee."])]).select([2, 0])
    told = [tokenizer.decode(both[row]["labels"], skip_special_tokens=True) for row in (0, 1)]
    assert told == ["Schnee.", "Ein Mann."]
    assert tokenizer.decode(both[0]["input_ids"], skip_special_tokens=True) == "Snow."


def test_measures_by_hand(tokenizer):
    encoded = encode(tokenizer, ["A man."], ["Ein Mann."])
    labels = encoded.flat["labels"][0]
    batch = TASK.collate([encoded[0]], Padding())
    size = len(tokenizer)
    logits = np.zeros((1, len(labels), size), np.float32)
    logits[0, 0, labels[0]] = math.log(size - 1)  # half of the probability; the others share the rest evenly

    class Fixed:
        def predict(self, batch):
            return {"logits": logits}

        def write(self, batch, rules):
            return [labels.tolist()]

    model = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, num_layers=1, d_ff=8, num_heads=1, d_kv=8))
    said = TASK.examine(Fixed(), model).predict(batch)
    outputs = {"surprise": said["surprise"][0], "chosen": said["chosen"][0], "written": said["written"]}
    measured = TASK.metrics(outputs, encoded)
    surprise = (math.log(2) + (len(labels) - 1) * math.log(size)) / len(labels)
    assert measured["likelihood"] == pytest.approx(math.exp(-surprise), rel=1e-5)
    assert measured["perplexity"] == pytest.approx(math.exp(surprise), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(1 / len(labels))
    assert measured["chrf"] == measured["rouge_1"] == measured["rouge_l"] == pytest.approx(100.0)
    assert TASK.told(outputs, encoded) == [("Ein Mann.", pytest.approx(math.exp(-surprise), rel=1e-5))]
    assert TASK.gold(encoded) == ["Ein Mann."]


def test_architectures_of_this_task():
    assert find_task("auto", ["MarianMTModel"]) is TASK
    assert find_task("auto", ["T5ForConditionalGeneration"]) is TASK


@pytest.mark.parametrize("named", [5, None])
def test_a_decoder_starts_with_what_its_generation_config_names(start, tokenizer, named, tmp_path):
    """mBART's config has none: its decoders start with a language, and never with token 0."""
    model = AutoModelForSeq2SeqLM.from_pretrained(start)
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = named
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    if named is None:
        with pytest.raises(TeacherError, match="nothing says what its decoder is shown before the first token"):
            load_checkpoint(str(tmp_path / "teacher"), TASK)
        return
    teacher = load_checkpoint(str(tmp_path / "teacher"), TASK)
    assert (teacher.padding.start, TASK.rules(teacher.model)["start"]) == (5, 5)
    teacher.save(tmp_path / "student", TASK, 32)
    assert load_checkpoint(str(tmp_path / "student"), TASK).padding.start == 5


@pytest.fixture(scope="module")
def finished(rows, start, run_example, rows_file):
    files = {name: rows_file(pairs, name) for name, pairs in rows.items()}
    return run_example(
        "seq2seq",
        *(f'data.{name}="{path}"' for name, path in files.items()),
        f'teacher={{start="{start}", finetune={{epochs=3, batch_size=8, learning_rate=4e-3}}}}',
        "student.decoder_layers=1",
        "training={epochs=1, batch_size=8, learning_rate=2e-3, baseline=false}",
        "data.max_length=32",
        f'data.prefix="{PREFIX}"',
        'data.group="who"',
        "export.max_drop=2",
    )


@pytest.mark.slow
def test_a_translator_goes_the_whole_way(finished, outputs_of):
    _, result = finished
    assert outputs_of(result.bundle / "onnx/encoder_model_quantized.onnx") == ["last_hidden_state"]
    remembered = [f"present.0.{side}.{kind}" for side in ("decoder", "encoder") for kind in ("key", "value")]
    assert outputs_of(result.bundle / "onnx/decoder_model_merged_quantized.onnx") == ["logits", *remembered]
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert models["teacher"]["metrics"]["perplexity"] < 300  # by chance 1200
    assert models["student"]["metrics"]["perplexity"] < 300
    assert models["student-int8"]["retention"] > 0.9
    for name in ("perplexity", "chrf"):
        student, onnx = (models[role]["metrics"][name] for role in ("student", "student-onnx"))
        assert onnx == pytest.approx(student, rel=1e-3)
    assert verify_bundle(result.bundle).ok
    assert "the bundle writes without its generation_config's max_time = 600.0" in result.summary()
    files = {path.name for path in (result.bundle / "onnx").iterdir()}
    assert files == {
        *("encoder_model.onnx", "encoder_model_quantized.onnx"),
        *("decoder_model_merged.onnx", "decoder_model_merged_quantized.onnx"),
    }
    assert models["student-int8"]["bytes"] == sum(
        path.stat().st_size for path in (result.bundle / "onnx").glob("*_quantized.onnx")
    )
    bench = json.loads((result.folder / "results.json").read_text())["bench"]
    assert {cell["step"] for cell in bench["cells"]} == {True, False}


@pytest.mark.slow
def test_each_group_has_its_own_measure(finished, rows, tokenizer):
    """Over all tokens the surprise is that of the groups together, so every token of a group was counted in it."""
    _, result = finished
    tokens = {"a man": 0, "others": 0}
    for row in rows["validation"]:
        tokens[row["who"]] += len(tokenizer(text_target=row["de"], truncation=True, max_length=32)["input_ids"])
    assert min(tokens.values()) > 100
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    for role in ("teacher", "student", "student-int8"):
        groups, whole = models[role]["groups"], models[role]["metrics"]
        together = sum(count * math.log(groups[name]["perplexity"]) for name, count in tokens.items())
        assert together / sum(tokens.values()) == pytest.approx(math.log(whole["perplexity"]), rel=1e-5)
        assert set(groups["a man"]) == set(whole)
        assert groups["a man"]["chrf"] != groups["others"]["chrf"]


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 4])
def test_the_bundle_writes_what_transformers_write(finished, rows, beams):
    _, result = finished
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "student")
    model = AutoModelForSeq2SeqLM.from_pretrained(result.folder / "student").eval()
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    bundle.rules["beams"] = beams
    texts = [row["en"] for row in rows["validation"][:6]]
    written = [
        model.generate(
            **tokenizer(PREFIX + text, truncation=True, max_length=32, return_tensors="pt"), num_beams=beams
        )[0]
        for text in texts
    ]
    expected = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]
    assert [one.text for one in bundle.predict(texts)] == expected


@pytest.mark.slow
def test_clients_are_told_what_stands_before_each_text(finished):
    _, result = finished
    assert json.loads((result.bundle / "config.json").read_text())["prefix"] == PREFIX
    assert f'each text with "{PREFIX}" put before it' in (result.bundle / "README.md").read_text()
    golden = [json.loads(line) for line in (result.bundle / "golden.jsonl").read_text().splitlines()]
    assert all(line["text"].startswith(PREFIX) for line in golden)


@pytest.mark.slow
def test_the_bundle_says_how_likely_a_target_is(finished, rows):
    _, result = finished
    tokenizer = AutoTokenizer.from_pretrained(result.folder / "student")
    model = AutoModelForSeq2SeqLM.from_pretrained(result.folder / "student").eval()
    row = rows["validation"][0]
    tokens = tokenizer(PREFIX + row["en"], text_target=row["de"], return_tensors="pt")
    with torch.no_grad():
        loss = float(model(**tokens).loss)
    said = Bundle.load(result.bundle, file="onnx/model.onnx")(row["en"], row["de"])
    assert said.likelihood == pytest.approx(math.exp(-loss), rel=1e-3)
    assert said.text == row["de"]


def test_targets_in_the_teachers_words_are_kept(start, rows, tmp_path):
    teacher = load_checkpoint(str(start), TASK)
    texts = [row["en"] for row in rows["validation"][:5]]
    path = tmp_path / "targets.json"
    written = rewritten(texts, teacher, TASK, path, max_length=12)
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**kept, "texts": ["kept", *written[1:]]}), encoding="utf-8")
    assert rewritten(texts, teacher, TASK, path, max_length=12)[0] == "kept"
    assert rewritten(texts, teacher, TASK, path, max_length=13) != ["kept", *written[1:]]


@pytest.mark.parametrize(("longest", "written"), [(None, 128), (16, 15), (30, 29)])
def test_a_text_is_as_long_as_its_generation_config_says(start, longest, written):
    model = AutoModelForSeq2SeqLM.from_pretrained(start)
    model.generation_config.max_new_tokens, model.generation_config.max_length = None, longest
    assert rules_of(model).max_new_tokens == written


def test_measured_texts_are_spelled_as_a_bundle_spells_them():
    words = {word: number for number, word in enumerate(["<unk>", "do", "n't", ".", ","])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tidy = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", clean_up_tokenization_spaces=True)
    assert spelled(tidy, [[1, 2, 3], [1, 4]]) == [plain.decode([1, 2, 3]), plain.decode([1, 4])] == ["do n't .", "do ,"]


def test_a_teacher_that_writes_nothing_gives_no_targets():
    values = ['objective.targets="teacher"', 'task="text-classification"']
    recipe = Recipe.load(ROOT / "examples" / "seq2seq.toml", values)
    with pytest.raises(RecipeError, match=r"`objective.targets` must be \"gold\" for text-classification"):
        check_columns(TASKS[recipe.task], recipe)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (['task="text-classification"'], r"`data.prefix` must be empty for text-classification; got 'query: '"),
        (["data.augment.copies=1"], r"`data.augment.copies` must be 0 with `data.prefix`"),
    ],
)
def test_a_prefix_that_cannot_be_is_refused(overrides, match):
    recipe = Recipe.load(ROOT / "examples" / "seq2seq.toml", ['data.prefix="query: "', *overrides])
    with pytest.raises(RecipeError, match=match):
        check_columns(TASKS[recipe.task], recipe)


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_writes(rows, finished, rows_file, tmp_path):
    recipe, result = finished
    few, free = rows_file(rows["train"][:32], "few"), [{"en": row["en"]} for row in rows["train"][32:64]]
    changes = {
        "output": str(tmp_path / "run"),
        "teacher": {"checkpoint": str(result.folder / "teacher")},
        "objective": {"targets": "teacher"},
        "training": {"epochs": 3, "batch_size": 8, "learning_rate": 2e-3, "baseline": False},
        "data": {**recipe.data.model_dump(), "train": str(few), "unlabelled": [str(rows_file(free, "free"))]},
    }
    asked = Recipe.parse({**recipe.model_dump(mode="json", exclude={"teacher", "objective"}), **changes})
    run_stages(asked, until="train")
    with claim(asked) as ledger:
        run = Run(asked, ledger, SILENT)
        gold, unlabelled = run.lessons
        assert gold["text"] == run.splits.train["text"]
        assert gold["label"] != run.splits.train["label"]
        assert unlabelled["text"] == [PREFIX + row["en"] for row in free]
        assert len(run.transfer_set(run.teacher)) == len(gold) + len(unlabelled)
        for row in (*gold.select(range(2)), *unlabelled.select(range(2))):
            tokens = run.teacher.tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=32)
            ids = run.teacher.model.generate(**tokens, do_sample=False, num_beams=4)[0]
            assert row["label"] == run.teacher.tokenizer.decode(ids, skip_special_tokens=True).strip() != ""
        likely = []
        for model in (run.student.model, load_checkpoint(str(run.folder / "student"), TASK).model):
            predictor = TASK.judge(TorchPredictor(model, TASK), model)
            encoded = run.encode(run.teacher, unlabelled)
            likely.append(evaluate(predictor, encoded, TASK, run.teacher.padding).metrics["likelihood"])
        assert likely[1] > 1.1 * likely[0]  # than before training, of texts that the data has no targets for


@pytest.mark.slow
def test_how_the_teacher_writes_is_what_a_student_depends_on(finished):
    recipe, _ = finished
    with claim(recipe) as ledger:
        run = Run(recipe, ledger, SILENT)
        before = run.train_inputs(None)
        run.teacher.model.generation_config.no_repeat_ngram_size = 2
        assert run.train_inputs(None) != before


@pytest.mark.slow
def test_pairs_keep_their_targets_and_free_text_gets_the_teachers(rows, finished, rows_file, tmp_path, monkeypatch):
    recipe, result = finished
    monkeypatch.setattr("distill.lessons.LARGE", 1)
    free = [{"en": row["en"]} for row in rows["train"][32:36]]
    files = {"train": str(rows_file(rows["train"][:32], "few")), "unlabelled": [str(rows_file(free, "free"))]}
    changes = {
        "output": str(tmp_path / "run"),
        "teacher": {"checkpoint": str(result.folder / "teacher")},
        "data": {**recipe.data.model_dump(), **files},
    }
    asked = Recipe.parse({**recipe.model_dump(mode="json", exclude={"teacher"}), **changes})
    with claim(asked) as ledger:
        run = Run(asked, ledger, SILENT)
        gold, unlabelled = run.lessons
        assert gold["label"] == run.splits.train["label"] == [row["de"] for row in rows["train"][:32]]
        texts, path = list(unlabelled["text"]), tmp_path / "again.json"
        assert texts == [PREFIX + row["en"] for row in free]
        assert unlabelled["label"] == rewritten(texts, run.teacher, TASK, path, max_length=recipe.data.max_length)
        assert all(unlabelled["label"])
        assert len(run.transfer) == len(gold) + len(unlabelled)
        known, kept = tmp_path / "run/work/targets.json", run.transfer[len(gold)]["labels"]
        said = json.loads(known.read_text(encoding="utf-8"))
        known.write_text(json.dumps({**said, "texts": [f"{text} {text}" for text in said["texts"]]}), encoding="utf-8")
        assert len(Run(asked, ledger, SILENT).transfer[len(gold)]["labels"]) > len(
            kept
        )  # as another teacher's would be


def test_a_target_has_its_own_language_around_it(tmp_path):
    """As mBART and NLLB have it, whose tokenizers keep in tokenizer.json what stands around a source."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581a", "\u2581b", "\u2581c", "\u2581"]
    words = MBartTokenizer(vocab=[(piece, -float(n > 3)) for n, piece in enumerate(pieces)], src_lang="en_XX")
    words.tgt_lang = "ro_RO"
    words.save_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path, src_lang="en_XX", tgt_lang="ro_RO")
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rules = TASK.around(words)
    assert words.convert_ids_to_tokens(rules["around"][1]) == ["</s>", "ro_RO"]
    metadata = {
        "distill.task": "seq2seq", "distill.labels": "[]", "distill.max_length": "6", "distill.rules": json.dumps(rules)
    }  # fmt: skip
    shown = []

    def predict(batch):
        shown.append(batch)
        return {"logits": np.zeros((*batch["decoder_input_ids"].shape, len(words)), np.float32)}

    graph = SimpleNamespace(metadata=metadata, encodes=True, writes=True, predict=predict)
    bundle = Bundle(graph, backend, {"input_ids": 1}, tmp_path)
    for target in ("b c", "b c a a a a b"):
        (window,) = bundle.head.windows(bundle.reader, [("a b", target)])[0]
        (said,) = bundle.ask([window])
        wanted = words(text_target=target, truncation=True, max_length=6)["input_ids"]
        assert said["labels"].tolist() == wanted
        assert shown[-1]["decoder_input_ids"].tolist() == [[0, *wanted[:-1]]]
    assert TASK.around(PreTrainedTokenizerFast(tokenizer_object=backend)) == {}


def test_an_empty_target_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["text,label", *(f"text {n},Text {n}" for n in range(20)), "lost,", "more,mehr"]))
    with pytest.raises(DataError, match=r"row 21: 'label' is (empty|missing)"):
        load_splits(path, target="text")


@pytest.mark.slow
def test_a_bundle_is_measured_on_data_elsewhere(finished, rows, rows_file):
    _, result = finished
    source = rows_file(rows["validation"], "elsewhere")
    verdict = verify_with_data(result.bundle, str(source), verify_bundle(result.bundle))
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    assert verdict.facts["likelihood"] == pytest.approx(models["student-int8"]["metrics"]["likelihood"], rel=0.02)


@pytest.mark.slow
def test_the_command_prints_what_is_written(finished, rows):
    _, result = finished
    text = rows["validation"][0]["en"]
    said = CliRunner().invoke(app, ["predict", str(result.bundle), text])
    assert said.exit_code == 0
    written = " ".join(Bundle.load(result.bundle)(text).text.split())
    assert said.output == f"{written}\t{text}\n"
    assert written
