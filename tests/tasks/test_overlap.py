"""BLEU and ROUGE are those of their libraries, and count words of every script."""

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu

from distill.tasks.overlap import bleu_tokenizer, compare, words

CHINESE = (["今天天气很好。", "他在读 BERT 的书。"], ["今天的天气非常好。", "她在看 BERT 的书。"])
JAPANESE = (["今日はいい天気です。", "彼は本を読んでいる。"], ["今日は天気がいいです。", "彼女は本を読んでいます。"])
THAI = (["วันนี้อากาศดีมาก", "เขาอ่านหนังสือ"], ["วันนี้อากาศดี", "เธออ่านหนังสืออยู่"])
KOREAN = (["오늘은 날씨가 아주 좋다 .", "그는 책을 읽는다 ."], ["오늘은 날씨가 좋다 .", "그녀는 책을 읽는다 ."])
GERMAN = (["Der große Hund läuft über die Straße.", "Ein Bär"], ["Der große Bär läuft über die Straße.", "Ein Hund"])
ENGLISH = (["The cat's sat on the mat, twice.", "A well-known dog"], ["The cat is on the mat.", "A dog runs here"])


@pytest.mark.parametrize(
    ("texts", "tokenizer", "name"),
    [
        (ENGLISH, "13a", "bleu"),
        (GERMAN, "13a", "bleu"),
        (KOREAN, "13a", "bleu"),
        (CHINESE, "zh", "bleu_zh"),
        (JAPANESE, "char", "bleu_char"),
        (THAI, "char", "bleu_char"),
    ],
    ids=["en", "de", "ko", "zh", "ja", "th"],
)
def test_bleu_is_that_of_sacrebleu_with_the_tokenizer_of_the_language(texts, tokenizer, name):
    written, targets = texts
    assert bleu_tokenizer(targets) == tokenizer
    found = compare(written, targets)
    assert found[name] == pytest.approx(corpus_bleu(written, [targets], tokenize=tokenizer).score)
    assert [key for key in found if key.startswith("bleu")] == [name]


def test_a_few_foreign_characters_choose_no_tokenizer():
    assert bleu_tokenizer(["The word 天気 means weather."]) == "13a"
    assert bleu_tokenizer(["好の天气很好今天天气很好" * 2]) == "zh"
    assert bleu_tokenizer(["", "..."]) == "13a"


def test_rouge_of_english_is_that_of_rouge_score():
    written, targets = ENGLISH
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(target, text) for text, target in zip(written, targets, strict=True)]
    found = compare(written, targets)
    for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        expected = 50 * sum(score[theirs].fmeasure for score in scores)
        assert 0 < found[ours] == pytest.approx(expected)


def test_words_of_every_script_are_counted():
    """rouge-score's own tokenizer makes `stra e` of Straße and nothing of Chinese or Hindi."""
    assert words("Die Straße, 3-mal ÜBER_die") == ["die", "straße", "3", "mal", "über", "die"]
    assert words("读BERT的书。") == ["读", "bert", "的", "书"]
    assert words("यह हिन्दी है।") == ["यह", "हिन्दी", "है"]
    found = compare(["天气很好"], ["天气不好"])
    assert (found["rouge_1"], found["rouge_2"], found["rouge_l"]) == pytest.approx((75.0, 100 / 3, 75.0))
