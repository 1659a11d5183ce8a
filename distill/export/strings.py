"""Strings on which tokenizers fall out: every script, signs, accents, and the words of a vocabulary itself."""

from __future__ import annotations

import random
from collections.abc import Sequence

SCRIPTS = {
    "latin": (0x41, 0x17F),
    "vietnamese": (0x1EA0, 0x1EF9),
    "greek": (0x391, 0x3C9),
    "cyrillic": (0x410, 0x451),
    "armenian": (0x531, 0x587),
    "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x621, 0x652),
    "devanagari": (0x905, 0x94D),
    "bengali": (0x985, 0x9CD),
    "tamil": (0xB85, 0xBCD),
    "telugu": (0xC05, 0xC4D),
    "thai": (0xE01, 0xE4D),
    "lao": (0xE81, 0xECD),
    "tibetan": (0xF40, 0xF84),
    "georgian": (0x10D0, 0x10FA),
    "hangul": (0xAC00, 0xD7A3),
    "jamo": (0x1100, 0x11FF),
    "ethiopic": (0x1200, 0x135A),
    "khmer": (0x1780, 0x17D3),
    "hiragana": (0x3041, 0x309F),
    "katakana": (0x30A0, 0x30FF),
    "han": (0x4E00, 0x9FA5),
    "rare han": (0x20000, 0x2A6D6),
    "combining": (0x300, 0x36F),
    "punctuation": (0x2010, 0x205E),
    "signs": (0x20A0, 0x2BFF),
    "emoji": (0x1F300, 0x1FAFF),
    "full width": (0xFF01, 0xFFEE),
    "ascii": (0x20, 0x7E),
    "control": (0x01, 0x1F),
    "private": (0xE000, 0xE0FF),
    "supplementary": (0x10000, 0x1FFFF),
}
"""First and last code of each range; what is unassigned in it belongs there too."""

BY_HAND = (
    "",
    " ",
    "\t\n\r",
    "\u00a0\u2003\u3000",
    "\ufeffzero\u200bwidth\u200djoiner",
    "naïve café, e\u0301 ﬁne ǅ İstanbul ẞ ΟΔΟΣ",
    "👩‍👩‍👧🏽 🇫🇷 1️⃣ fine👍 👍fine",
    "don't stop-me_now... (really?!) $5.00 50% a/b c\\d",
    "[CLS] [SEP] [MASK] [UNK] [PAD] ##ing <s> </s> <unk> <pad> <mask>",
    "[SEP]a[MASK]b [ SEP ] [sep] [S\U000f0003EP]",
    "a" * 500,
    "very long " * 500,
    "x\u0000y\ufffdz",
    "日本語とEnglishと한국어",
)
BETWEEN = (" ", " ", "", "-", "\u00a0", ", ", "\n", "  ")


def odd_strings(count: int, words: Sequence[str] = (), *, seed: int = 0) -> list[str]:
    """The same strings each time: those by hand, then words of every script, alone and mixed.

    Args:
        count: How many.
        words: Known ones, which a third of the words are drawn from; pieces of a vocabulary will do.
        seed: Another gives other strings.
    """
    draw = random.Random(seed)
    names = list(SCRIPTS)

    def word(script: str) -> str:
        if words and draw.random() < 0.35:
            return draw.choice(words)
        low, high = SCRIPTS[script]
        return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 8)))

    made = list(BY_HAND[:count])
    while len(made) < count:
        script = names[len(made) % len(names)]
        mixed = draw.random() < 0.3
        parts = [word(draw.choice(names) if mixed else script) for _ in range(draw.randint(1, 12))]
        made.append(draw.choice(BETWEEN).join(parts))
    return made
