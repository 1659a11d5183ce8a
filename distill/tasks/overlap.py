"""How near written texts are to their targets: BLEU, chrF and ROUGE, in every script."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np

HAN = ("CJK",)
UNSPACED = (*HAN, "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts that put no space between words, as the names of their characters begin in Unicode."""


def compare(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF of sacreBLEU and the mean F of ROUGE-1, ROUGE-2 and ROUGE-L, all in [0, 100].

    BLEU is `bleu` with sacreBLEU's default tokenizer, 13a. With another one it carries that one's name: `bleu_zh`,
    `bleu_char`. ROUGE counts `words`.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    pairs = list(zip(targets, written, strict=True))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())
    scores = [scorer.score(target, text) for target, text in pairs]
    rouge = {name: 100.0 * float(np.mean([score[f"rouge{name}"].fmeasure for score in scores])) for name in "12L"}
    tokenizer = bleu_tokenizer(targets)
    bleu = "bleu" if tokenizer == "13a" else f"bleu_{tokenizer}"
    return {
        bleu: float(BLEU(tokenize=tokenizer).corpus_score(list(written), [list(targets)]).score),
        "chrf": float(CHRF().corpus_score(list(written), [list(targets)]).score),
        "rouge_1": rouge["1"],
        "rouge_2": rouge["2"],
        "rouge_l": rouge["L"],
    }


def bleu_tokenizer(targets: Sequence[str]) -> str:
    """SacreBLEU's tokenizer for a language, told by its characters.

    `13a` where words are spaced, `zh` for Chinese, `char` for Japanese, Thai and their like: what cuts those into words
    is not installed everywhere, and BLEU must not depend on that.
    """
    counts = Counter(_script(character) for target in targets for character in unicodedata.normalize("NFKC", target))
    whole = sum(count for script, count in counts.items() if script)
    unspaced = sum(count for script, count in counts.items() if script.startswith(UNSPACED))
    if unspaced <= whole / 2:
        return "13a"
    han = sum(count for script, count in counts.items() if script.startswith(HAN))
    return "zh" if han > 0.9 * unspaced else "char"


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; of scripts that put no space between words, each character.

    Of English they are those of rouge-score, which drops all but a-z and 0-9 in every language.
    """
    spaced = []
    for character in unicodedata.normalize("NFKC", text.lower()):
        script = _script(character)
        spaced.append(f" {character} " if script.startswith(UNSPACED) else character if script else " ")
    return "".join(spaced).split()


class _Words:
    """`words` as rouge-score calls it."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _script(character: str) -> str:
    """How the name of a letter, mark or digit begins; empty for what is no part of a word."""
    return unicodedata.name(character, "").split(" ")[0] if unicodedata.category(character)[0] in "LMN" else ""
