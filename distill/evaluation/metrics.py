"""Metrics: one plain function per row of the table at the foot; its positional parameters name the columns it reads.

A column is an array with one entry, number, text or row of numbers, per example (a text, or a row of packed documents):

    example                  its number within the split
    predictions, references, teacher_predictions   class, where an example has one label
    nll, tokens, correct     sum of negative log-likelihoods in nats, scored labels, labels predicted right
    generated, target_text   text that a model wrote, text that it should write
    agreed, kl_sum, positions   positions with the teacher's prediction, sum of KL(teacher || student) in nats, compared
                             positions

The metrics of language models are ratios of totals: a mean of per-batch means would weigh short texts too much.
A recipe may name a function of its own, `package.module:function`, written the same way.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from distill.errors import InputError
from distill.evaluation.texts import characters_of, chrf_counts, chrf_score, error_rate, rouge_lcs, rouge_n, words_of
from distill.registry import find

# numpy and evaluate are imported where they are used, so that a recipe's metric names are checked at once: they take
# 0.2 s and several seconds.
if TYPE_CHECKING:
    import numpy as np

    Column = np.ndarray[tuple[int], np.dtype[Any]]

Function = Callable[..., float]


def accuracy(predictions: Column, references: Column) -> float:
    """Share of the examples whose predicted class is the true one."""
    return float((predictions == references).mean())


def f1_macro(predictions: Column, references: Column) -> float:
    """Unweighted mean over classes of F1 = 2 TP / (2 TP + FP + FN), as scikit-learn's `average="macro"`.

    The classes are those of the references and of the predictions together: a class that is predicted and never true
    (or true and never predicted) counts as 0. Its denominator is the times it is true plus the times it is predicted,
    so it is never 0.
    """
    import numpy as np

    classes, codes = np.unique(np.concatenate([predictions, references]), return_inverse=True)
    predicted, true = np.split(codes, 2)
    hits = np.bincount(true[predicted == true], minlength=len(classes))
    return float((2 * hits / np.bincount(codes, minlength=len(classes))).mean())


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


def token_accuracy(correct: Column, tokens: Column) -> float:
    """Share of the scored tokens that are predicted right; nan without any token."""
    return _per(correct, tokens)


def kl(kl_sum: Column, positions: Column) -> float:
    """Mean KL(teacher || student) per position, in nats; nan without any position."""
    return _per(kl_sum, positions)


def rouge_l(generated: Column, target_text: Column) -> float:
    """Mean over texts of the F1 of the longest common subsequence of words."""
    return _mean(rouge_lcs, generated, target_text)


def rouge_1(generated: Column, target_text: Column) -> float:
    """Mean over texts of the F1 of words."""
    return _mean(partial(rouge_n, length=1), generated, target_text)


def rouge_2(generated: Column, target_text: Column) -> float:
    """Mean over texts of the F1 of pairs of words."""
    return _mean(partial(rouge_n, length=2), generated, target_text)


def chrf(generated: Column, target_text: Column) -> float:
    """chrF2 of all texts together, 0 to 1 (sacrebleu's chrF divided by 100): runs of 1 to 6 characters."""
    counts = [chrf_counts(*pair) for pair in zip(generated.tolist(), target_text.tolist(), strict=True)]
    return chrf_score([sum(column) for column in zip(*counts, strict=True)])


def exact_text(generated: Column, target_text: Column) -> float:
    """Share of the texts that are written as they should be, space at both ends left out."""
    return float((generated == target_text).mean())


def wer(generated: Column, target_text: Column) -> float:
    """Word error rate: words inserted, left out or replaced, per true word of all texts; case and punctuation aside."""
    return error_rate(generated.tolist(), target_text.tolist(), words_of)


def cer(generated: Column, target_text: Column) -> float:
    """Character error rate, as `wer`, of the characters of words and the spaces between them."""
    return error_rate(generated.tolist(), target_text.tolist(), characters_of)


def _mean(score: Callable[[str, str], float], written: Column, true: Column) -> float:
    pairs = zip(written.tolist(), true.tolist(), strict=True)
    return math.fsum(score(*pair) for pair in pairs) / len(written)


def _per(amount: Column, count: Column) -> float:
    """Ratio of two totals."""
    total = float(count.sum())
    return float(amount.sum()) / total if total else math.nan


def columns_of(function: Function) -> tuple[str, ...]:
    """List the columns that a metric reads: its positional parameters (keyword-only ones are options).

    >>> columns_of(perplexity)
    ('nll', 'tokens')
    """
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in positional)


def compute(names: Sequence[str], columns: Mapping[str, Column]) -> dict[str, float]:
    """Compute the named metrics over all examples (of all ranks: gather first); a column that none reads is ignored.

    Values are plain floats, not always finite: an overflowing perplexity is inf, a mean over no tokens nan.

    Raises:
        InputError: An unknown metric, or a column that is missing, empty, or as long as no other.
    """
    functions = {name: find_metric(name, columns) for name in names}
    read = {column: columns[column] for function in functions.values() for column in columns_of(function)}
    lengths = {column: len(values) for column, values in read.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise InputError(f"metrics need columns with one row per example, at least one: the rows are {lengths}")
    with tempfile.TemporaryDirectory() as folder:  # evaluate would keep files in the user's cache
        metric = metric_class(functions, read)(keep_in_memory=True, cache_dir=folder)
        return dict(metric.compute(**read))


def measurable(names: Sequence[str], columns: Collection[str]) -> list[str]:
    """Choose the metrics whose columns are there: some are read from what a model writes, which takes long."""
    return [name for name in names if set(columns_of(find(METRICS, name, "metric"))) <= set(columns)]


def find_metric(name: str, columns: Collection[str]) -> Function:
    """Find the function of a metric. Raises InputError when there is none, or it reads other columns than there are."""
    function: Function = find(METRICS, name, "metric")
    wanted = columns_of(function)
    if not wanted:
        raise InputError(f"metric {name!r} has no positional parameter; each one names a column, e.g. predictions")
    if missing := [column for column in wanted if column not in columns]:
        raise InputError(
            f"metric {name!r} needs the columns {', '.join(wanted)}; there is no {', '.join(missing)} "
            f"(there are: {', '.join(sorted(columns)) or 'none'})"
        )
    return function


def metric_class(functions: Mapping[str, Function], columns: Mapping[str, Column]) -> Any:
    """Wrap metric functions, by the name of their result, in an `evaluate.Metric` that reads these columns.

    It lives in this package because `evaluate.load` needs the hub and runs a file of that name in the working folder.
    """
    import datasets
    import evaluate
    import numpy as np

    types = {"b": "int64", "i": "int64", "u": "int64", "f": "float64", "U": "string"}  # by kind of a numpy type
    values = {column: datasets.Value(types[own.dtype.kind]) for column, own in columns.items()}
    features = datasets.Features(
        {name: datasets.List(value) if columns[name].ndim > 1 else value for name, value in values.items()}
    )

    class FunctionMetrics(evaluate.Metric):  # type: ignore[misc]  # evaluate has no types
        def _info(self) -> Any:
            about = {"description": ", ".join(functions), "citation": "", "inputs_description": ""}
            return evaluate.MetricInfo(features=features, **about)

        def _compute(self, **rows: Any) -> dict[str, float]:
            # They arrive as lists: the "numpy" format of datasets would round float64 to float32.
            arrays = {column: np.asarray(values) for column, values in rows.items()}
            return {
                name: float(function(*(arrays[column] for column in columns_of(function))))
                for name, function in functions.items()
            }

    return FunctionMetrics


METRICS: dict[str, Function] = {
    "accuracy": accuracy,
    "f1_macro": f1_macro,
    "agreement": agreement,
    "perplexity": perplexity,
    "token_accuracy": token_accuracy,
    "kl": kl,
    "loss": loss,
    "rouge_l": rouge_l,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "chrf": chrf,
    "exact_text": exact_text,
    "wer": wer,
    "cer": cer,
}

LOWER_IS_BETTER = ("perplexity", "kl", "loss", "wer", "cer")


def higher_is_better(name: str) -> bool:
    """Tell the direction of a metric; of the user's own, more is better."""
    return name not in LOWER_IS_BETTER
