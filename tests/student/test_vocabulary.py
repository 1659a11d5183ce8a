"""Vocabulary trimming: the same output on covered text, no new unknown tokens on any other, and the right rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from distill.cards import load_student_card
from distill.errors import StudentError
from distill.student.build import build_student, plan_student
from distill.student.tokenizer_json import pieces_of
from distill.student.vocabulary import check_identical, count_pieces, measure_coverage, trim_embeddings, trim_vocabulary

CORPUS = [
    "The weather was wonderful, and the travellers were wandering through the winding valleys.",
    "Nothing in the newest film is newer than its title; everything else has been seen before.",
    "She sells sea shells, he sells seaside shelters: both are selling something they have seen.",
    "An unhappy ending makes an unlikely hero unhappier, unkinder and, finally, undone.",
    "Café, naïve, façade, Straße, Ærø, señor: words that wear their accents well.",
    "Numbers such as 1234, 98.6 and 3,141,592 are split into smaller numbers.",
    "日本語の文章も少し入れておきます。中文也有一点。",
    "Repeat, repeating, repeated, repeater, repetition, repetitive, unrepeatable.",
    "Emails like someone@example.org and links like https://example.org/path?x=1 turn up too.",
    "   Leading blanks,\ttabs\nand new lines; -- dashes -- and (brackets) [of] {kinds}.",
] * 3
COVERED = CORPUS[:3]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def wordpiece() -> Tokenizer:
    """BERT's way, but special tokens stand behind all pieces, so that forgetting to renumber one is noticed."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400))
    spec = spec_of(tokenizer)
    for piece in ("[unused0]", "[UNK]"):
        spec["model"]["vocab"][piece] = len(spec["model"]["vocab"])
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]", length=40)
    tokenizer.enable_truncation(36)
    return tokenizer


def byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>")]
    tokenizer.post_processor = processors.RobertaProcessing(*ids)
    return tokenizer


def suffix_bpe() -> Tokenizer:
    """CLIP's way: `</w>` ends a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<cls>", "<sep>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<sep>", "<cls>")]
    tokenizer.post_processor = processors.Sequence([processors.BertProcessing(*ids)])
    return tokenizer


def prefix_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, continuing_subword_prefix="##")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=350, special_tokens=SPECIALS, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = spec_of(tokenizer)
    vocab, unk = spec["model"]["vocab"], spec["model"]["unk_id"]
    vocab[unk], vocab[-1], spec["model"]["unk_id"] = vocab[-1], vocab[unk], len(vocab) - 1  # the unknown token last
    spec["added_tokens"][unk]["id"] = len(vocab) - 1
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.post_processor = processors.Sequence([template])
    return tokenizer


def wordlevel() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIALS))
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "wordpiece": wordpiece,
    "byte_bpe": byte_bpe,
    "suffix_bpe": suffix_bpe,
    "prefix_bpe": prefix_bpe,
    "unigram": unigram,
    "wordlevel": wordlevel,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: Any) -> Tokenizer:
    return KINDS[request.param]()


def spec_of(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())


def test_covered_text_is_split_as_before(tokenizer):
    trimmed = trim_vocabulary(tokenizer, count_pieces(COVERED, tokenizer))
    assert check_identical(tokenizer, trimmed, COVERED) == len(COVERED)
    assert trimmed.after < trimmed.before == len(pieces_of(spec_of(tokenizer)))
    assert trimmed.tokenizer.get_vocab_size() == trimmed.after
    new, old = trimmed.tokenizer, tokenizer
    assert [new.id_to_token(i) for i in range(trimmed.after)] == [old.id_to_token(i) for i in trimmed.kept_ids]


def test_special_tokens_padding_and_truncation_come_along(tokenizer):
    """Ids left as they were in added_tokens, padding or the post-processor would point at other rows."""
    trimmed = trim_vocabulary(tokenizer, count_pieces(COVERED, tokenizer))
    before, after = tokenizer.encode(COVERED[0], COVERED[1]), trimmed.tokenizer.encode(COVERED[0], COVERED[1])
    special = [at for at, flag in enumerate(before.special_tokens_mask) if flag]
    assert [trimmed.kept_ids[after.ids[at]] for at in special] == [before.ids[at] for at in special]
    assert len(after.ids) == len(before.ids) or not tokenizer.padding
    for token in spec_of(trimmed.tokenizer)["added_tokens"]:
        assert trimmed.tokenizer.token_to_id(token["content"]) == token["id"]
    assert {t["content"] for t in spec_of(trimmed.tokenizer)["added_tokens"]} == {
        t["content"] for t in spec_of(tokenizer)["added_tokens"]
    }


def test_the_given_tokenizer_stays_as_it_was(tokenizer):
    before = tokenizer.to_str()
    counts = count_pieces(COVERED, tokenizer)
    trim_vocabulary(tokenizer, counts)
    trim_vocabulary(tokenizer, counts, keep=len(pieces_of(spec_of(tokenizer))) - 5)
    assert tokenizer.to_str() == before


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_of_the_alphabet_meets_no_new_unknown_token(data):
    kind = data.draw(st.sampled_from(sorted(set(KINDS) - {"wordlevel"})))
    if kind not in _CACHE:
        whole = KINDS[kind]()
        _CACHE[kind] = (whole, trim_vocabulary(whole, count_pieces(COVERED, whole), characters="all"))
    whole, trimmed = _CACHE[kind]
    text = data.draw(st.text(alphabet=sorted(set("".join(CORPUS)) | {"é", "Q", "€"}), max_size=40))
    coverage = measure_coverage(whole, trimmed, [text])
    assert coverage.unknown_after <= coverage.unknown_before


_CACHE: dict[str, Any] = {}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_was_counted_is_split_as_before(data):
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    whole = _WHOLE.setdefault(kind, KINDS[kind]())
    words = sorted({word for line in CORPUS for word in line.split(" ")})
    texts = data.draw(st.lists(st.lists(st.sampled_from(words), max_size=6).map(" ".join), min_size=1, max_size=5))
    trimmed = trim_vocabulary(whole, count_pieces(texts, whole))
    assert check_identical(whole, trimmed, texts) == len(texts)


_WHOLE: dict[str, Tokenizer] = {}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_number_keeps_that_many(kind):
    whole = KINDS[kind]()
    counts = count_pieces(CORPUS, whole)
    used = trim_vocabulary(whole, counts).after
    wanted = used - 20
    trimmed = trim_vocabulary(whole, counts, keep=wanted)
    assert wanted - 3 <= trimmed.after <= wanted  # a BPE piece may not fit in with all that leads to it
    if kind != "wordlevel":
        coverage = measure_coverage(whole, trimmed, CORPUS)
        assert coverage.unknown_after == coverage.unknown_before
        assert coverage.tokens_after > coverage.tokens_before


def test_a_number_above_what_is_used_fills_up_with_the_first_pieces():
    whole = wordpiece()
    counts = count_pieces(COVERED, whole)
    used = trim_vocabulary(whole, counts)
    more = trim_vocabulary(whole, counts, keep=used.after + 30)
    assert more.after == used.after + 30
    assert set(more.kept_ids) > set(used.kept_ids)
    assert whole.token_to_id("[unused0]") not in set(more.kept_ids) - set(used.kept_ids)
    assert check_identical(whole, more, COVERED) == len(COVERED)


def test_too_small_a_number_says_what_must_stay():
    whole = wordpiece()
    with pytest.raises(StudentError, match=r"student.vocabulary: 9 pieces are too few: .* take \d+\. Set it to \d+ or"):
        trim_vocabulary(whole, count_pieces(COVERED, whole), keep=9)


def test_the_safety_set_stays_whatever_the_number(tokenizer):
    safety = ["unrepeatable unhappier"]
    least = _least(tokenizer, safety)
    trimmed = trim_vocabulary(tokenizer, count_pieces(COVERED, tokenizer), keep=least, safety=safety)
    assert check_identical(tokenizer, trimmed, safety) == 1


def _least(tokenizer: Tokenizer, safety: list[str]) -> int:
    try:
        return trim_vocabulary(tokenizer, {}, keep=1, safety=safety).after
    except StudentError as error:
        return int(error.fix.split("Set it to ")[1].split()[0])


def test_other_scripts_are_dropped_unless_asked_for():
    whole = unigram()
    counts = count_pieces(COVERED, whole)
    used, everything = trim_vocabulary(whole, counts), trim_vocabulary(whole, counts, characters="all")
    assert used.after < everything.after
    japanese = ["日本語の文章"]
    assert measure_coverage(whole, used, japanese).unknown_after > 0
    assert measure_coverage(whole, everything, japanese).unknown_after == 0


def test_an_unknown_character_is_split_as_before_in_unigram():
    """Its cost hangs on the worst piece of the vocabulary: without that, `x ? ab` would beat `xЖa b` here."""
    scores = {"<unk>": 0.0, "x": -0.1, "ab": -0.1, "a": -0.2, "b": -12.0, "xЖa": -12.0, "bbb": -50.0, "baba": -3.0}
    whole = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    texts = ["xЖab", "ab", "ЖЖ"]
    assert whole.encode("xЖab").tokens == ["xЖa", "b"]
    trimmed = trim_vocabulary(whole, count_pieces(texts, whole))
    assert check_identical(whole, trimmed, texts) == len(texts)
    assert trimmed.tokenizer.token_to_id("baba") is None


def test_pieces_named_by_the_template_and_the_padding_stay():
    vocab = {"[UNK]": 0, "no": 1, "begin": 2, "b": 3, "fill": 4, "##e": 5, "##g": 6, "##i": 7, "##n": 8, "n": 9}
    whole = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    whole.post_processor = processors.TemplateProcessing(single="begin $A", special_tokens=[("begin", 2)])
    whole.enable_padding(pad_id=4, pad_token="fill", length=4)
    trimmed = trim_vocabulary(whole, {9: 1})
    assert trimmed.tokenizer.encode("n").tokens == ["begin", "n", "fill", "fill"]
    assert 1 in trimmed.kept_ids  # `o` alone has no piece, so `no` cannot be spelt otherwise


def test_a_piece_that_characters_cannot_spell_stays():
    """Otherwise a word that had no unknown token before would get one."""
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "qu": 3, "##ix": 4, "aa": 5, "##a": 6}
    whole = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    trimmed = trim_vocabulary(whole, {1: 3})
    assert trimmed.kept_ids == (0, 1, 2, 3, 4, 6)
    assert trimmed.tokenizer.encode("quix").tokens == ["qu", "##ix"]
    assert trimmed.tokenizer.encode("aa").tokens == ["a", "##a"]


def test_a_difference_is_told_with_the_text():
    whole = wordpiece()
    trimmed = trim_vocabulary(whole, count_pieces(["the film"], whole))
    with pytest.raises(StudentError, match=r"the trimmed vocabulary splits 'She sells.* Count this text too"):
        check_identical(whole, trimmed, [CORPUS[2]])
    coverage = measure_coverage(whole, trimmed, [CORPUS[2], "the film"])
    assert (coverage.texts, coverage.identical) == (2, 1)


def test_lookup_turns_old_ids_into_new_ones():
    whole = wordpiece()
    trimmed = trim_vocabulary(whole, count_pieces(COVERED, whole))
    old = whole.encode(COVERED[0], add_special_tokens=True).ids
    assert trimmed.lookup()[old].tolist() == trimmed.tokenizer.encode(COVERED[0]).ids
    gone = next(number for number in range(trimmed.before) if number not in trimmed.old_to_new)
    assert trimmed.lookup()[gone] == -1
    assert len(trimmed.lookup()) == trimmed.before
    assert trimmed.rows(10)[2] == ["saved", *(f"{(trimmed.before - trimmed.after) * n:,}" for n in (1, 40, 10))]


def test_a_tokenizer_of_another_kind_is_refused():
    with pytest.raises(StudentError, match=r"int has no tokenizer\.json behind it"):
        count_pieces(["x"], 3)


def wrapped(kind: str) -> Any:
    """A tokenizer of transformers as hub models come with it."""
    if kind == "bert":
        vocab = wordpiece().get_vocab()
        return BertTokenizer(vocab=dict(sorted(vocab.items(), key=lambda item: item[1])))
    if kind == "roberta":
        model = spec_of(byte_bpe())["model"]
        return RobertaTokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    if kind == "xlm-roberta":
        return XLMRobertaTokenizer(vocab=[tuple(entry) for entry in spec_of(unigram())["model"]["vocab"]])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=unigram(), **names)


@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "plain"])
def test_a_tokenizer_of_transformers_survives_trimming_saving_and_loading(kind, tmp_path):
    whole = wrapped(kind)
    trimmed = trim_vocabulary(whole, count_pieces(COVERED, whole))
    small = trimmed.tokenizer
    assert type(small) is type(whole)
    assert len(small) == trimmed.after
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*COVERED, CORPUS[4]):
        ids = small(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ids
    for text in COVERED:
        assert [trimmed.kept_ids[number] for number in again(text)["input_ids"]] == whole(text)["input_ids"]
    names = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "eos_token_id")
    for name in names:
        old = getattr(whole, name)
        assert getattr(again, name) == (None if old is None else trimmed.old_to_new[old])


def tiny_bert(auto: Any, rows: int, **changes: Any) -> Any:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = AutoConfig.for_model("bert", vocab_size=rows, **(shape | changes))
    return auto.from_config(config).eval()


def test_a_trimmed_model_answers_the_same_on_trimmed_ids():
    whole = wordpiece()
    trimmed = trim_vocabulary(whole, count_pieces(COVERED, whole))
    model = tiny_bert(AutoModelForSequenceClassification, trimmed.before + 6)  # padded, as some checkpoints are
    small = trim_embeddings(model, trimmed.kept_ids)
    assert small.config.vocab_size == trimmed.after == small.get_input_embeddings().num_embeddings
    assert model.config.vocab_size == trimmed.before + 6
    with torch.no_grad():
        before = model(torch.tensor([whole.encode(COVERED[0]).ids])).logits
        after = small(torch.tensor([trimmed.tokenizer.encode(COVERED[0]).ids])).logits
    assert torch.equal(before, after)


def test_a_language_model_keeps_tied_rows_and_biases():
    whole = wordpiece()
    trimmed = trim_vocabulary(whole, count_pieces(COVERED, whole))
    model = tiny_bert(AutoModelForMaskedLM, trimmed.before)
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    small = trim_embeddings(model, trimmed.kept_ids)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    with torch.no_grad():
        before = model(torch.tensor([whole.encode(COVERED[0]).ids])).logits
        after = small(torch.tensor([trimmed.tokenizer.encode(COVERED[0]).ids])).logits
    torch.testing.assert_close(before[..., list(trimmed.kept_ids)], after)


def test_token_ids_of_the_config_move_with_their_rows():
    kept = [2, 5, 9]
    model = tiny_bert(AutoModelForSequenceClassification, 12, pad_token_id=5, eos_token_id=9)
    small = trim_embeddings(model, kept)
    assert (small.config.pad_token_id, small.config.eos_token_id) == (1, 2)
    assert small.get_input_embeddings().padding_idx == 1
    assert torch.equal(small.get_input_embeddings().weight, model.get_input_embeddings().weight[kept])


def test_a_vocabulary_of_another_model_is_refused():
    with pytest.raises(StudentError, match="ids up to 12, the model's embedding has 12 rows"):
        trim_embeddings(tiny_bert(AutoModelForSequenceClassification, 12), [0, 12])


def test_a_student_can_be_built_with_the_kept_rows():
    teacher = tiny_bert(AutoModelForSequenceClassification, 40)
    kept = [0, 3, 4, 7, 30]
    card = load_student_card("layers-4")
    student = build_student(teacher, card, overrides={"layers": 1}, kept_ids=kept)
    plan = plan_student(teacher.config, card, overrides={"layers": 1}, vocabulary=len(kept))
    assert student.size == plan.size
    assert student.model.config.vocab_size == len(kept)
    assert torch.equal(student.model.get_input_embeddings().weight, teacher.get_input_embeddings().weight[kept])


@pytest.fixture(scope="module")
def sst2(shared_data: Path) -> dict[str, list[str]]:
    def texts(name: str) -> list[str]:
        with (shared_data / "sst2" / name).open(encoding="utf-8", newline="") as lines:
            return [row["text"] for row in csv.DictReader(lines)]

    return {"train": texts("train.csv"), "dev": texts("dev.csv")}


def test_real_text_keeps_its_pieces_and_meets_nothing_unknown(sst2, minilm_folder):
    """The bar: about 11.6k of 30.5k pieces, identical on train, nothing unknown on dev; nor with 8k."""
    whole = AutoTokenizer.from_pretrained(minilm_folder)
    counts = count_pieces(sst2["train"], whole)
    trimmed = trim_vocabulary(whole, counts)
    assert trimmed.before == 30_522
    assert 11_500 < trimmed.after < 11_700
    assert check_identical(whole, trimmed, sst2["train"]) == len(sst2["train"])
    coverage = measure_coverage(whole, trimmed, sst2["dev"])
    assert (coverage.unknown_before, coverage.unknown_after) == (0, 0)
    assert coverage.tokens_after / coverage.tokens_before < 1.04
    small = trim_vocabulary(whole, counts, keep=8_000)
    assert small.after == 8_000
    assert measure_coverage(whole, small, sst2["dev"]).unknown_after == 0
    assert measure_coverage(whole, small, sst2["train"]).unknown_after == 0
