"""Scores of extracted answers, as the scripts of SQuAD, and of CMRC and MLQA for scripts without spaces, count them."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from distill.evaluation.formulas import Column, mean, of_shares
from distill.evaluation.texts import WITHOUT_SPACES, f1_of_bags

WORDS = re.compile(rf"[{WITHOUT_SPACES}]|[^\s{WITHOUT_SPACES}]+")
ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized_words(answer: str) -> list[str]:
    """Split an answer into words, in small letters, without punctuation and English articles.

    >>> normalized_words("The U.S. Army")
    ['us', 'army']
    >>> normalized_words("北京 2008年。")
    ['北', '京', '2008', '年']
    """
    kept = (letter for letter in answer.lower() if letter not in string.punctuation and not _is_wide_mark(letter))
    return WORDS.findall(ARTICLES.sub(" ", "".join(kept)))


def _is_wide_mark(letter: str) -> bool:
    """Tell punctuation of Chinese and Japanese texts; the script of SQuAD keeps all other but that of ASCII."""
    return letter >= "\u3000" and unicodedata.category(letter).startswith("P")


@of_shares(mean)
def exact_match_answer(answers: Iterable[str], gold: Iterable[str]) -> Column:
    """Share of the answers whose words are those of a true one; `gold` holds JSON lists, an empty one for no answer."""
    return _best(answers, gold, lambda given, true: float(given == true))


@of_shares(mean)
def f1_answer(answers: Iterable[str], gold: Iterable[str]) -> Column:
    """Mean over answers of F1 between their words and those of the true answer that is closest."""
    return _best(answers, gold, lambda given, true: f1_of_bags(Counter(given), Counter(true)))


def _best(answers: Iterable[str], gold: Iterable[str], score: Callable[[list[str], list[str]], float]) -> Column:
    scores = []
    for answer, texts in zip(answers, gold, strict=True):
        given, true = normalized_words(answer), filter(None, map(normalized_words, json.loads(texts)))
        scores.append(max(score(given, words) for words in [*true] or [[]]))
    return np.array(scores)
