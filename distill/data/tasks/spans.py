"""Spans of a text, in characters, and the words that they are made of."""

from __future__ import annotations

import re

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef"
    "\U00020000-\U0003ffff]"
)
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese."""
SPLIT_WORD = "spans that begin or end within a word: is their end the character behind them, and no count of bytes?"


def splits_word(text: str, start: int, end: int) -> bool:
    """Tell whether a span [start, end) cuts a word, in scripts that have spaces between words."""
    pairs = (text[max(start - 1, 0) : start + 1], text[end - 1 : end + 1])
    return any(len(pair) == 2 and pair.isalnum() and not UNSPACED.search(pair) for pair in pairs)
