"""Scores of written texts, derived by hand."""

from __future__ import annotations

import numpy as np
import pytest

from distill.evaluation.metrics import compute
from distill.evaluation.texts import characters_of, chrf_counts, chrf_score, edits, rouge_lcs, rouge_n, words_of


def measured(metric, *pairs):
    written, true = (np.array(side) for side in zip(*pairs, strict=True))
    return compute([metric], {"generated": written, "target_text": true})[metric]


def test_words_are_runs_of_letters_and_single_characters_where_scripts_have_no_spaces():
    assert words_of("It's 2 Cats, naïve!") == ["it's", "2", "cats", "naïve"]
    assert words_of("猫 eats 魚です") == ["猫", "eats", "魚", "で", "す"]
    assert words_of("แมวกิน") == list("แมวกิน")
    assert (characters_of("It's  so."), characters_of("猫 が")) == ("it's so", "猫が")
    assert characters_of("the cat sat 猫") == "the cat sat猫"  # spaces that both texts have are no errors
    assert words_of("𠀀𠀁") == ["𠀀", "𠀁"]


CAT = ("the cat sat on the mat", "The cat is on the mat.")


def test_rouge_counts_runs_of_words_and_the_longest_common_subsequence():
    assert rouge_n(*CAT, 1) == pytest.approx(5 / 6)  # all but sat and is
    assert rouge_n(*CAT, 2) == pytest.approx(3 / 5)  # the cat, on the, the mat
    assert rouge_lcs(*CAT) == pytest.approx(5 / 6)
    assert rouge_n("the cat", CAT[1], 1) == pytest.approx(0.5)  # P 1, R 1 / 3
    assert (rouge_n("mat the", "the mat", 1), rouge_lcs("mat the", "the mat")) == (1, 0.5)
    assert rouge_n("the the the", "the", 1) == pytest.approx(0.5)  # a word counts as often as it is true
    assert (rouge_lcs("", "a"), rouge_lcs("a", ""), rouge_lcs("", "")) == (0, 0, 1)


def test_chrf_is_a_mean_over_lengths_weighted_towards_recall():
    # 1: a, b of 2 and 4; 2: ab of 1 and 3; longer ones have no runs on the written side. P = 1, R = 5 / 12.
    assert chrf_score(chrf_counts("ab", "a bcd")) == pytest.approx(25 / 53)
    # 1: 2 of 3; 2: 1 of 2; 3: 0 of 1. P = R = 7 / 18.
    assert chrf_score(chrf_counts("abc", "abd")) == pytest.approx(7 / 18)
    assert chrf_score(chrf_counts("", "abc")) == chrf_score(chrf_counts("x", "a")) == 0


def test_edits_are_the_fewest_insertions_deletions_and_replacements():
    assert [edits(*pair) for pair in (("", "abc"), ("abc", ""), ("flaw", "lawn"), ("ab", "ba"), ("a", "a"))] == [
        *(3, 3, 2, 2, 0)
    ]


def test_scores_of_a_corpus():
    pairs = [CAT, ("the cat", "the cat is on the mat")]
    assert measured("rouge_1", *pairs) == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert measured("rouge_2", *pairs) == pytest.approx((3 / 5 + 1 / 3) / 2)  # P 1, R 1 / 5
    assert measured("rouge_l", *pairs) == pytest.approx((5 / 6 + 1 / 2) / 2)
    # Totals: 1: 4 of 5 and 7; 2: 2 of 3 and 5; 3: 0 of 1 and 3; 4: none written.
    precision, recall = (4 / 5 + 2 / 3 + 0) / 3, (4 / 7 + 2 / 5 + 0) / 3
    expected = 5 * precision * recall / (4 * precision + recall)
    assert measured("chrf", ("abc", "abd"), ("ab", "abcd")) == pytest.approx(expected)
    assert measured("wer", ("a x c d", "a b c"), ("", "a")) == pytest.approx((2 + 1) / 4)
    assert measured("cer", ("cat", "cart"), ("A b", "a b.")) == pytest.approx(1 / (4 + 3))
    assert measured("wer", ("你好吗", "你们好")) == measured("cer", ("你好吗", "你们好")) == pytest.approx(2 / 3)
    assert measured("exact_text", ("a b", "a b"), ("A b", "a b")) == 0.5
    assert np.isnan(measured("wer", ("a", "")))
