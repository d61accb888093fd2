"""Formulas of the metrics: plain functions whose positional parameters name the columns that they read.

A column is an array with one entry, number, text or row of numbers, per example (a text, or a row of packed documents):

    example                  its number within the split
    predictions, references, teacher_predictions   class, where an example has one label; where it has a set of classes
                             a row of 0 and 1, one for each class (and none of the teacher)
    confidence               probability of the predicted class, where an example has one label
    values, targets, teacher_values   number, in a regression; cosine of two texts, and the score of their pair
    nll, tokens, correct     sum of negative log-likelihoods in nats, scored labels, labels predicted right
    answers, gold            text of an answer, empty for none; JSON list of the true ones
    none_class               class of examples without a relation, the same for all; negative: there is none
    text_bytes               bytes of the text in UTF-8, of texts whose tokens are predicted
    embeddings, pair_embeddings, teacher_embeddings   vector of the text, of its pair, the teacher's of the text
    teacher_cosine           cosine with the teacher's vectors, mean over the texts of an example
    generated, target_text   text that a model wrote, text that it should write
    agreed, kl_sum, positions   positions with the teacher's prediction, sum of KL(teacher || student) in nats, compared
                             positions; of a set each class is a position, since each is a choice of its own
    entities_found, entities_predicted, entities_true   spans predicted and true, spans predicted, true spans

The metrics of language models are ratios of totals: a mean of per-batch means would weigh short texts too much.
A recipe may name a function of its own, `package.module:function`, written the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from typing import Any

import numpy as np

from distill.evaluation.texts import characters_of, chrf_counts, chrf_score, edits, rouge_lcs, rouge_n, words_of
from distill.evaluation.vectors import NEIGHBOURS, neighbours, ranks_of_pairs

Column = np.ndarray[tuple[int], np.dtype[Any]]

BINS = 15
"""Of the expected calibration error."""
MANY = 10_000
"""Numbers of classes below this are counted without being sorted."""


class OfShares:
    """A metric made of a share of each row, which is computed once however often the rows are drawn again."""

    def __init__(self, total: Callable[[Column], float], shares: Callable[..., Column]):
        self.total, self.shares = total, shares
        update_wrapper(self, shares)  # so that its parameters are those of `shares`

    def __call__(self, *columns: Any) -> float:
        """Compute the metric of whole columns."""
        return self.total(self.shares(*columns))


def of_shares(total: Callable[[Column], float]) -> Callable[[Callable[..., Column]], OfShares]:
    """Decorate a function of columns that gives each row's share [n] or [n, k] of what `total` makes of all of them."""
    return partial(OfShares, total)


def mean(shares: Column) -> float:
    """Average the shares, exactly summed."""
    return math.fsum(shares) / len(shares)


def ratio(shares: Column) -> float:
    """Divide the totals of two columns of shares; nan where the second is 0."""
    return _per(shares[:, 0], shares[:, 1])


def accuracy(predictions: Column, references: Column) -> float:
    """Share of the examples whose predicted class, or whose whole set of classes, is the true one."""
    right = predictions == references
    return float((right.all(axis=-1) if right.ndim > 1 else right).mean())


def f1_macro(predictions: Column, references: Column) -> float:
    """Unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN), as scikit-learn's `average="macro"`.

    The classes are those of the references and of the predictions together: a class that is predicted and never true
    (or true and never predicted) counts as 0. Its denominator is the times it is true plus the times it is predicted,
    so it is never 0. nan where there is no class at all, which sets allow.
    """
    scores = _f1_by_class(predictions, references)[1]
    return float(scores.mean()) if len(scores) else math.nan


def f1_relations(predictions: Column, references: Column, none_class: Column) -> float:
    """Unweighted mean of F1 over the classes of `f1_macro` that are relations; nan where nothing else is found.

    `none_class` is the class of examples without a relation; negative where there is no such class.
    """
    classes, scores = _f1_by_class(predictions, references)
    relations = scores[classes != none_class[0]]
    return float(relations.mean()) if len(relations) else math.nan


def _f1_by_class(predictions: Column, references: Column) -> tuple[Column, Column]:
    if predictions.ndim > 1:
        times = (predictions + references).sum(axis=0)
        (classes,) = np.nonzero(times)
        return classes, 2 * (predictions * references).sum(axis=0)[classes] / times[classes]
    classes, predicted, true = _numbered(predictions, references)
    times = np.bincount(predicted, minlength=len(classes)) + np.bincount(true, minlength=len(classes))
    hits, there = np.bincount(true[predicted == true], minlength=len(classes)), times > 0
    return classes[there], 2 * hits[there] / times[there]


def _numbered(predictions: Column, references: Column) -> tuple[Column, Column, Column]:
    """Number the classes of both sides; returns them (and, of small numbers, those between them), and both sides."""
    both = np.concatenate([predictions, references])
    if both.dtype.kind == "i" and both.min() >= 0 and (highest := int(both.max())) < MANY:
        return np.arange(highest + 1), predictions, references  # nothing to sort, which is slow
    classes, codes = np.unique(both, return_inverse=True)
    return classes, codes[: len(predictions)], codes[len(predictions) :]


def f1_micro(predictions: Column, references: Column) -> float:
    """F1 over all decisions of all classes; with one class per example it is the accuracy."""
    if predictions.ndim == 1:
        return accuracy(predictions, references)
    return _per(2 * predictions * references, predictions + references)


def matthews(predictions: Column, references: Column) -> float:
    """Compute Matthews' correlation coefficient over any number of classes (Gorodkin 2004), -1 to 1.

    0 where one side has only one class, as in scikit-learn.
    """
    classes, *sides = _numbered(predictions, references)
    ours, true = (np.bincount(own, minlength=len(classes)).astype(float) for own in sides)
    size = float(len(references))
    covariance = (predictions == references).sum() * size - ours @ true
    spread = (size**2 - ours @ ours) * (size**2 - true @ true)
    return float(covariance / math.sqrt(spread)) if spread else 0.0


def ece(confidence: Column, correct: Column) -> float:
    """Expected calibration error: mean over examples of |accuracy - mean confidence| of the bin that they are in.

    15 bins of equal width, as in Guo et al. 2017; nan where a confidence is.
    """
    if np.isnan(confidence).any():
        return math.nan
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(bins))


def mse(values: Column, targets: Column) -> float:
    """Mean squared error of the predicted numbers."""
    return float(((values - targets) ** 2).mean())


def rmse(values: Column, targets: Column) -> float:
    """Square root of the mean squared error, in the unit of the labels."""
    return math.sqrt(mse(values, targets))


def pearson(values: Column, targets: Column) -> float:
    """Pearson's correlation of predicted and true numbers; nan where all of one side are equal."""
    ours, theirs = values - values.mean(), targets - targets.mean()
    spread = math.sqrt(float((ours @ ours) * (theirs @ theirs)))
    return float(np.clip(ours @ theirs / spread, -1, 1)) if spread else math.nan


def spearman(values: Column, targets: Column) -> float:
    """Spearman's correlation: Pearson's of the ranks; equal numbers share the mean of their ranks. nan where one is."""
    return pearson(_ranks(values), _ranks(targets))


def _ranks(values: Column) -> Column:
    if np.isnan(values).any():
        return np.full(len(values), math.nan)
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Column = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def teacher_mse(values: Column, teacher_values: Column) -> float:
    """Mean squared difference between the student's numbers and the teacher's."""
    return mse(values, teacher_values)


def entity_precision(entities_found: Column, entities_predicted: Column) -> float:
    """Share of the predicted spans that are true in both ends and type; 0 where none is predicted, as in seqeval."""
    return _per(entities_found, entities_predicted) if entities_predicted.sum() else 0.0


def entity_recall(entities_found: Column, entities_true: Column) -> float:
    """Share of the true spans that are predicted with both ends and type; 0 where there are none, as in seqeval."""
    return _per(entities_found, entities_true) if entities_true.sum() else 0.0


def entity_f1(entities_found: Column, entities_predicted: Column, entities_true: Column) -> float:
    """F1 of spans over all examples together (micro): 2 found / (predicted + true); 0 where there are none at all."""
    count = entities_predicted + entities_true
    return _per(2 * entities_found, count) if count.sum() else 0.0


def agreement(agreed: Column, positions: Column) -> float:
    """Share of the compared positions where student and teacher predict the same, right or wrong; nan without any."""
    return _per(agreed, positions)


def loss(nll: Column, tokens: Column) -> float:
    """Mean negative log-likelihood per token, in nats; nan without any token."""
    return _per(nll, tokens)


def perplexity(nll: Column, tokens: Column) -> float:
    """exp(sum of nll / sum of tokens); inf where that overflows, nan without any token."""
    try:
        return math.exp(loss(nll, tokens))
    except OverflowError:
        return math.inf


def bits_per_byte(nll: Column, text_bytes: Column) -> float:
    """Bits that the model needs for a byte of the text, whatever tokens it is cut into: sum of nll / (ln 2 · bytes)."""
    return _per(nll, text_bytes) / math.log(2)


def token_accuracy(correct: Column, tokens: Column) -> float:
    """Share of the scored tokens that are predicted right; nan without any token."""
    return _per(correct, tokens)


def kl(kl_sum: Column, positions: Column) -> float:
    """Mean KL(teacher || student) per position, in nats; nan without any position."""
    return _per(kl_sum, positions)


@of_shares(mean)
def mrr_at_10(embeddings: Column, pair_embeddings: Column) -> Column:
    """Mean over texts of 1 / rank of their own pair among all pairs by cosine; 0 where it is not among the first 10."""
    return 1 / _first_ranks(embeddings, pair_embeddings)


@of_shares(mean)
def ndcg_at_10(embeddings: Column, pair_embeddings: Column) -> Column:
    """As `mrr_at_10`, with 1 / log2(1 + rank): one pair is right, so the ideal gain is 1."""
    gains: Column = 1 / np.log2(1 + _first_ranks(embeddings, pair_embeddings))
    return gains


@of_shares(mean)
def recall_at_10(embeddings: Column, pair_embeddings: Column) -> Column:
    """Share of the texts whose own pair is among the first 10."""
    return np.isfinite(_first_ranks(embeddings, pair_embeddings)).astype(float)


def _first_ranks(texts: Column, pairs: Column) -> Column:
    """Rank of each text's own pair; inf where it is not among the first."""
    ranks = ranks_of_pairs(texts, pairs)
    return np.where(ranks <= NEIGHBOURS, ranks, np.inf)


def cosine_to_teacher(teacher_cosine: Column) -> float:
    """Mean cosine of a text's vector with the teacher's."""
    return float(teacher_cosine.mean())


@of_shares(mean)
def neighbours_kept(embeddings: Column, teacher_embeddings: Column) -> Column:
    """Share of the teacher's ten nearest other texts that are among the ten nearest here; nan for a single text."""
    if len(embeddings) < 2:
        return np.full(len(embeddings), math.nan)
    own, theirs = neighbours(embeddings), neighbours(teacher_embeddings)
    found: Column = np.array([len(np.intersect1d(*rows)) for rows in zip(own, theirs, strict=True)]) / own.shape[1]
    return found


@of_shares(mean)
def rouge_l(generated: Column, target_text: Column) -> Column:
    """Mean over texts of the F1 of the longest common subsequence of words."""
    return _of_pairs(rouge_lcs, generated, target_text)


@of_shares(mean)
def rouge_1(generated: Column, target_text: Column) -> Column:
    """Mean over texts of the F1 of words."""
    return _of_pairs(partial(rouge_n, length=1), generated, target_text)


@of_shares(mean)
def rouge_2(generated: Column, target_text: Column) -> Column:
    """Mean over texts of the F1 of pairs of words."""
    return _of_pairs(partial(rouge_n, length=2), generated, target_text)


@of_shares(lambda counts: chrf_score(counts.sum(axis=0).tolist()))
def chrf(generated: Column, target_text: Column) -> Column:
    """chrF2 of all texts together, 0 to 1 (sacrebleu's chrF divided by 100): runs of 1 to 6 characters."""
    return _of_pairs(chrf_counts, generated, target_text)


def exact_text(generated: Column, target_text: Column) -> float:
    """Share of the texts that are written as they should be, space at both ends left out."""
    return float((generated == target_text).mean())


@of_shares(ratio)
def wer(generated: Column, target_text: Column) -> Column:
    """Word error rate: words inserted, left out or replaced, per true word of all texts; case and punctuation aside."""
    return _of_pairs(partial(_errors, split=words_of), generated, target_text)


@of_shares(ratio)
def cer(generated: Column, target_text: Column) -> Column:
    """Character error rate, as `wer`, of the characters of words and the spaces between them."""
    return _of_pairs(partial(_errors, split=characters_of), generated, target_text)


def _errors(written: str, true: str, split: Callable[[str], Sequence[str]]) -> tuple[int, int]:
    """Count the edits from one text to the other, and the true units."""
    units = split(true)
    return edits(split(written), units), len(units)


def _of_pairs(score: Callable[[str, str], Any], written: Column, true: Column) -> Column:
    return np.array([score(*pair) for pair in zip(written.tolist(), true.tolist(), strict=True)])


def _per(amount: Column, count: Column) -> float:
    """Ratio of two totals."""
    total = float(count.sum())
    return float(amount.sum()) / total if total else math.nan
