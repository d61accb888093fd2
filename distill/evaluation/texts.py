"""Scores of written texts against the true ones, from one pair of texts each.

Words are runs of letters, digits and apostrophes; scripts without spaces between words (Chinese, Japanese, Thai, Lao,
Burmese, Khmer) count character by character.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

WITHOUT_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Letters of these scripts, for a regular expression: each counts as a word."""
WORD = re.compile(rf"[{WITHOUT_SPACES}]|(?:(?![{WITHOUT_SPACES}])[\w'\u2019])+")
CHRF_ORDER, CHRF_BETA = 6, 2


def words_of(text: str) -> list[str]:
    """Split a text into words, in lower case.

    >>> words_of("It's 2 猫!")
    ["it's", '2', '猫']
    """
    return WORD.findall(text.lower())


def grams_of(items: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    """Count the runs of so many items."""
    return Counter(tuple(items[start : start + length]) for start in range(len(items) - length + 1))


def f1_of_counts(hits: int, found: int, true: int) -> float:
    """Compute F1 = 2 hits / (found + true), the harmonic mean of hits / found and hits / true; 1 where nothing is."""
    return 2 * hits / (found + true) if found + true else 1.0


def f1_of_bags(found: Counter[Any], true: Counter[Any]) -> float:
    """Compute F1 of what both hold, counted as often as both do."""
    return f1_of_counts((found & true).total(), found.total(), true.total())


def rouge_n(written: str, true: str, length: int) -> float:
    """Compute ROUGE-N, the F1 of runs of so many words (Lin 2004); of two texts without any, whether they are equal."""
    words = words_of(written), words_of(true)
    found, wanted = (grams_of(own, length) for own in words)
    if not found and not wanted:
        return float(words[0] == words[1])
    return f1_of_bags(found, wanted)


def rouge_lcs(written: str, true: str) -> float:
    """Compute ROUGE-L, the F1 of the longest common subsequence of words; 1 for two texts without words."""
    found, wanted = words_of(written), words_of(true)
    return f1_of_counts(_common(found, wanted), len(found), len(wanted))


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    """Count the items of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for item in left:
        before = 0
        for place, other in enumerate(right, start=1):
            above = row[place]
            row[place] = before + 1 if item == other else max(above, row[place - 1])
            before = above
    return row[-1]


def chrf_counts(written: str, true: str) -> list[int]:
    """Count hits, runs written and true runs of 1 to 6 characters, spaces left out: three numbers for each length."""
    found, wanted = ("".join(text.split()) for text in (written, true))
    counts = []
    for length in range(1, CHRF_ORDER + 1):
        own, other = grams_of(found, length), grams_of(wanted, length)
        counts += [(own & other).total(), own.total() if other else 0, other.total()]  # as sacrebleu counts
    return counts


def chrf_score(totals: Sequence[int]) -> float:
    """Compute chrF2 (Popović 2015), 0 to 1, from the summed counts of a corpus.

    As sacrebleu has it: precision and recall are means over the lengths that both sides have runs of.
    """
    parts = [totals[at : at + 3] for at in range(0, len(totals), 3)]
    used = [(hits / found, hits / true) for hits, found, true in parts if found and true]
    if not used:
        return 0.0
    precision, recall = (sum(values) / len(used) for values in zip(*used, strict=True))
    weight = CHRF_BETA**2
    return (1 + weight) * precision * recall / (weight * precision + recall) if precision + recall else 0.0


def edits(written: Sequence[str], true: Sequence[str]) -> int:
    """Count the insertions, deletions and replacements that make one sequence the other (Levenshtein distance).

    >>> edits("kitten", "sitting")
    3
    """
    row = list(range(len(true) + 1))
    for deleted, item in enumerate(written, start=1):
        before, row[0] = row[0], deleted
        for place, other in enumerate(true, start=1):
            above = row[place]
            row[place] = min(before + (item != other), above + 1, row[place - 1] + 1)
            before = above
    return row[-1]


def characters_of(text: str) -> str:
    """Join the words of a text with single spaces, but for those beside letters that are written without.

    >>> characters_of("The cat, 猫 が")
    'the cat猫が'
    """
    return re.sub(rf"(?<=[{WITHOUT_SPACES}]) | (?=[{WITHOUT_SPACES}])", "", " ".join(words_of(text)))
