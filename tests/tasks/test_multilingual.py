"""One classifier for two languages, XLM-R-shaped, with a Unigram tokenizer: measures by language beside the overall."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel, pipeline

from distill.evaluation import Evaluation, by_group
from distill.export.runtime import Bundle
from distill.export.verify import verify_bundle
from distill.tasks import TASKS
from distill.tasks.encoded import pack

TOPICS = {"dog": (" dog",), "street": (" street", " road"), "water": (" water", " ocean", " lake", " beach")}


def topic(english):
    """The one topic that the English sentence names; None where it names none or several."""
    found = [name for name, words in TOPICS.items() if any(word in english.lower() for word in words)]
    return found[0] if len(found) == 1 else None


def learn_tokenizer(texts, size):
    """A Unigram tokenizer with XLM-R's special tokens and normalisation."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    named = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", mask_token="<mask>", **named)


@pytest.fixture(scope="module")
def rows(shared_data, read_rows):
    pairs = read_rows(shared_data / "multi30k" / "train.jsonl", 6000)
    told = [(pair, topic(pair["en"])) for pair in pairs]
    made = [
        {"text": pair[language], "label": name, "language": language}
        for pair, name in told
        if name is not None
        for language in ("en", "de")
    ]
    return {"test": made[:240], "train": made[240:1840]}


@pytest.fixture(scope="module")
def finished(rows, run_example, rows_file, tmp_path_factory):
    tokenizer = learn_tokenizer([row["text"] for row in rows["train"]], 1500)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=66,
        initializer_range=0.1,
    )
    start = tmp_path_factory.mktemp("xlmr")
    XLMRobertaModel(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    files = {name: rows_file(part, name) for name, part in rows.items()}
    return run_example(
        "multilingual",
        *(f'data.{name}="{path}"' for name, path in files.items()),
        f'teacher={{start="{start}", finetune={{epochs=4, learning_rate=2e-3}}}}',
        "training={epochs=3, learning_rate=2e-3, baseline=false}",
        "data.max_length=48",
    )


@pytest.mark.slow
def test_each_language_has_its_own_measure(finished):
    _, result = finished
    models = {row["role"]: row for row in json.loads((result.folder / "results.json").read_text())["models"]}
    for role in ("teacher", "student", "student-int8"):
        facts = models[role]
        assert set(facts["groups"]) == {"de", "en"}
        alone = [facts["groups"][language]["accuracy"] for language in ("de", "en")]
        assert min(alone) > 0.6  # by chance 0.33
        assert min(alone) <= facts["metrics"]["accuracy"] <= max(alone)
    report = (result.folder / "report.md").read_text(encoding="utf-8")
    assert "| accuracy | de | en |" in report
    assert '<th scope="col" class="n">de</th>' in (result.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_both_languages_are_answered_as_transformers_answer(finished, rows):
    _, result = finished
    assert verify_bundle(result.bundle).ok
    bundle = Bundle.load(result.bundle, file="onnx/model.onnx")
    texts = [row["text"] for row in rows["test"][:20]]
    expected = pipeline("text-classification", model=str(result.folder / "student"))(texts)
    for said, wanted in zip(bundle.predict(texts), expected, strict=True):
        assert said.label == wanted["label"]
        assert said.probability == pytest.approx(wanted["score"], abs=1e-4)


def test_measures_of_a_group_are_those_of_its_rows():
    task = TASKS["text-classification"]
    encoded = pack({"input_ids": [[1], [1, 2], [1], [1]]}, {"labels": np.array([0, 1, 1, -100])})
    logits = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = Evaluation({}, {"logits": logits}, encoded)
    measured = by_group(found, ["en", "de", "en", "fr"], task)
    assert {name: facts["accuracy"] for name, facts in measured.items()} == {"de": 0.0, "en": 1.0}


def test_measures_of_words_follow_windows_and_sentences():
    tags, words = [[0, 1], [1], [0, 0, 1]], [["a", "b"], ["c"], ["d", "e", "f"]]
    ragged = {"input_ids": [[5, 6], [7], [5, 6], [7]], "labels": [[0, 1], [1], [0, 0], [1]]}
    ragged |= {"scored": [[1, 1], [1], [1, 1], [1]], "words": [[0, 1], [0], [0, 1], [2]]}
    packed = pack(ragged, {"source": np.array([0, 1, 2, 2])})  # the third sentence is read in two windows
    given = {"text": words, "label": tags}
    encoded = replace(packed, names=["O", "B-x"], given=given)
    chosen = np.array([0, 1, 0, 0, 0, 1])  # the second sentence alone is wrong
    found = Evaluation({}, {"logits": np.eye(2)[chosen]}, encoded)
    measured = by_group(found, ["en", "de", "en"], TASKS["token-classification"])
    assert {name: facts["f1"] for name, facts in measured.items()} == {"de": 0.0, "en": 1.0}
